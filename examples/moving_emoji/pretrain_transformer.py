# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

r"""Builds and pretrains the tiny `WanPipeline` of the moving-emoji world by flow matching.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/moving_emoji/pretrain_transformer.py \
        --work_dir /tmp/moving --minutes 30

Two processes of one thread each are faster than one of two threads when other programs use the cores, too. It needs
`WORK_DIR/vae` from `pretrain_vae.py`. A prompt does not name the kind of a clip, so each prompt is learnt in
all three. The run resumes from `WORK_DIR/state.pt` and exports the averaged weights to `pipeline/` as it goes.
"""

import argparse
import copy
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from clips import (
    DIRECTIONS,
    HERE,
    KINDS,
    SUBJECTS,
    all_prompts,
    draw_clip,
    load_subjects,
    parse_prompt,
    save_strips,
    to_tensor,
)
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from parallel import all_average, start_processes
from sampling import MAX_LENGTH, SHIFT, sample, use_euler
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel


sys.path.append(str(HERE.parent / "emoji"))

from common import replace_folder, save_atomically  # noqa: E402


def build_tokenizer(prompts: list[str]) -> T5Tokenizer:
    """A unigram vocabulary in which every word of the prompts is one token; other words are spelt."""
    words = " ".join(prompts).split()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + word, math.log(words.count(word) / len(words))) for word in sorted(set(words))]
    pieces += [(letter, -20.0) for letter in "▁abcdefghijklmnopqrstuvwxyz0123456789-.,'!?"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def build_pipeline(vae: AutoencoderKLWan, layers: int, heads: int) -> WanPipeline:
    """The untrained pipeline around the trained autoencoder, with the scheduler that Wan2.1 ships."""
    tokenizer = build_tokenizer(all_prompts())
    text_config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=32,
        d_ff=128,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=32,
        in_channels=vae.config.z_dim,
        out_channels=vae.config.z_dim,
        text_dim=64,
        freq_dim=128,
        ffn_dim=4 * 32 * heads,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=SHIFT
    )
    return WanPipeline(tokenizer, UMT5EncoderModel(text_config), vae, scheduler, transformer)


def encode(pipeline: WanPipeline, tokens: torch.Tensor, length: int) -> torch.Tensor:
    """What `WanPipeline.encode_prompt` does, from token numbers `[B, 8]` and with gradients: `[B, length, 64]`."""
    mask = tokens != pipeline.tokenizer.pad_token_id
    hidden = pipeline.text_encoder(tokens, mask.long()).last_hidden_state * mask[..., None]
    return torch.nn.functional.pad(hidden, (0, 0, 0, length - hidden.shape[1]))


def flow_loss(pipeline: WanPipeline, latents: torch.Tensor, tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Flow-matching loss at logit-normal times, shifted like the times of the scheduler."""
    u = torch.sigmoid(torch.randn(len(latents)))
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    noise = torch.randn_like(latents)
    level = sigma[:, None, None, None, None]
    # With so few tokens the plain attention is several times faster on a processor than the fused one.
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
        hidden = encode(pipeline, tokens, length)
        noisy = (1 - level) * latents + level * noise
        velocity = pipeline.transformer(noisy, sigma * 1000, hidden, return_dict=False)[0]
    return (velocity.float() - (noise - latents)).square().mean()


@torch.no_grad()
def encode_pool(vae: AutoencoderKLWan, per_kind: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised latents `[N, 16, 3, 6, 6]` of random clips, as many of each prompt and kind, and prompt numbers."""
    rng, subjects, latents, rows = random.Random(seed), load_subjects(), [], []
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    for row, prompt in enumerate(all_prompts()):
        subject, direction = parse_prompt(prompt)
        clips = to_tensor([draw_clip(subjects[subject], direction, kind, rng) for kind in KINDS * per_kind])
        with torch.autocast("cpu", torch.bfloat16):
            codes = torch.cat([vae.encode(batch).latent_dist.mode() for batch in clips.split(16)])
        latents.append((codes.float() - mean) / std)
        rows += [row] * len(clips)
    return torch.cat(latents), torch.tensor(rows)


@torch.no_grad()
def export(pipeline: WanPipeline, averages: dict, folder: Path) -> WanPipeline:
    """Saves the averaged weights, the large models in half precision; returns the pipeline in single precision."""
    averaged = WanPipeline(**copy.deepcopy(pipeline.components))
    for name, weights in averages.items():
        getattr(averaged, name).load_state_dict(weights)
        getattr(averaged, name).eval()
    half = WanPipeline(**copy.deepcopy(averaged.components))
    half.transformer.half(), half.vae.half()  # a text encoder loads in its saved precision, so this one stays single
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(folder.name + ".new")
    half.save_pretrained(aside)
    replace_folder(aside, folder)
    return averaged


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE / "pipeline")
    parser.add_argument("--work_dir", type=Path, required=True, help="Holds `vae/`; receives the state and pictures.")
    parser.add_argument("--minutes", type=float, default=30.0, help="The learning rate falls to zero at this time.")
    parser.add_argument("--export_minutes", type=float, default=8.0)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--dropout", type=float, default=0.1, help="The share of empty prompts.")
    parser.add_argument("--clips_per_kind", type=int, default=48, help="Clips of each prompt and kind.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rank, processes = start_processes()
    torch.manual_seed(args.seed)
    vae = AutoencoderKLWan.from_pretrained(args.work_dir / "vae").eval().requires_grad_(False)
    vae.register_to_config(_name_or_path="")
    pools = [args.work_dir / f"pool{i}.pt" for i in range(processes)]
    if not pools[rank].exists():
        save_atomically(encode_pool(vae, args.clips_per_kind // processes, args.seed + rank), pools[rank])
    if processes > 1:
        dist.barrier()
    latents, prompt_rows = (torch.cat(parts) for parts in zip(*map(torch.load, pools), strict=True))
    print(f"latents {list(latents.shape)}, mean {latents.mean():.3f}, deviation {latents.std():.3f}", flush=True)
    pipeline = build_pipeline(vae, args.layers, args.heads)
    prompts = all_prompts()
    token_table = pipeline.tokenizer(
        ["", *prompts], padding="max_length", max_length=MAX_LENGTH, return_tensors="pt"
    ).input_ids

    trained = {name: getattr(pipeline, name).train() for name in ("transformer", "text_encoder")}
    parameters = [parameter for model in trained.values() for parameter in model.parameters()]
    averages = {name: copy.deepcopy(model.state_dict()) for name, model in trained.items()}
    pairs = [(averages[name][key], p) for name, model in trained.items() for key, p in model.named_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    step, elapsed = 0, 0.0
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in {**trained, "vae": vae}.items()}
    print(f"parameters {counts}, {sum(counts.values())} in all; vocabulary {len(pipeline.tokenizer)}", flush=True)
    if (args.work_dir / "state.pt").exists():
        state = torch.load(args.work_dir / "state.pt")
        for name, model in trained.items():
            model.load_state_dict(state["models"][name])
        for (average, _), saved in zip(pairs, state["averages"], strict=True):
            average.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed = state["step"], state["elapsed"]
        print(f"resumed at step {step}", flush=True)

    shown = [f"{subject} moving {list(DIRECTIONS)[i % 4]}" for i, subject in enumerate(SUBJECTS)]
    last_export, losses, order, batch_size = elapsed, [], [], args.batch_size // processes
    torch.manual_seed(1000 * (args.seed + step) + rank)
    while True:
        start = time.time()
        progress = elapsed / (60 * args.minutes)
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        rate = args.learning_rate * min(1.0, (step + 1) / 300) * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Now and then a small batch with many zero tokens, so that the pipeline's default of 512 works as well.
        long = step % 16 == 15
        size = batch_size // 8 if long else batch_size
        if len(order) < size:
            order = torch.randperm(len(latents)).tolist()
        rows, order = torch.tensor(order[:size]), order[size:]
        tokens = token_table[torch.where(torch.rand(size) < args.dropout, 0, 1 + prompt_rows[rows])]
        length = MAX_LENGTH + 1 + 5039 * step % (512 - MAX_LENGTH) if long else MAX_LENGTH
        loss = flow_loss(pipeline, latents[rows], tokens, length)
        optimizer.zero_grad()
        loss.backward()
        if (
            processes > 1
        ):  # all take the clock from the average, so that they agree about the learning rate and the end
            elapsed = all_average(parameters, elapsed)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(args.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_([a for a, _ in pairs], [v.detach() for _, v in pairs], 1 - decay)
        step += 1
        elapsed += time.time() - start
        losses = [*losses[-199:], loss.item()]
        if step % 100 == 0 and rank == 0:
            message = f"step {step} {elapsed:.0f}s loss {sum(losses) / len(losses):.4f}"
            print(f"{message} norm {norm:.2f} lr {rate:.1e}", flush=True)
        done = progress >= 1
        if rank == 0 and (done or elapsed - last_export > 60 * args.export_minutes):
            last_export = elapsed
            state = {"models": {name: model.state_dict() for name, model in trained.items()}, "step": step}
            state |= {"averages": [a for a, _ in pairs], "optimizer": optimizer.state_dict(), "elapsed": elapsed}
            save_atomically(state, args.work_dir / "state.pt")
            averaged = export(pipeline, averages, args.output_dir)
            save_strips(sample(use_euler(averaged), shown), args.work_dir / f"step{step}.png", 2)
            print(f"exported step {step} to {args.output_dir}", flush=True)
        if done:
            break
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
