# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Builds and pretrains the tiny `StableDiffusion3Pipeline` of the emoji world by flow matching.

    OMP_NUM_THREADS=2 python examples/emoji/pretrain_transformer.py --work_dir /tmp/pretrain --minutes 60

It needs `WORK_DIR/vae` from `pretrain_vae.py`. The captions carry no style word, so each caption is learnt in all
three styles. The run resumes from `WORK_DIR/state.pt` and exports the averaged weights to `pipeline/` as it goes.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
from common import HERE, load_images, replace_folder, save_atomically, save_grid
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer


ZERO_TOKENS = 1  # the `max_sequence_length` of the pipeline call: how many zero tokens stand for the absent T5
MAX_LENGTH = 12  # tokens of a caption, start and end included


def build_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """Trains a byte-pair vocabulary on the captions; nearly every word of them becomes one token."""
    words: dict[tuple[str, ...], int] = {}
    for caption in captions:
        for word in caption.replace("-", " - ").split():
            symbols = (*word[:-1], word[-1] + "</w>")
            words[symbols] = words.get(symbols, 0) + 1
    letters = "abcdefghijklmnopqrstuvwxyz0123456789-'.,!?&"
    vocabulary, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    while True:
        pairs: dict[tuple[str, str], int] = {}
        for symbols, count in words.items():
            for pair in zip(symbols, symbols[1:], strict=False):
                pairs[pair] = pairs.get(pair, 0) + count
        if not pairs:
            break
        best = max(sorted(pairs), key=pairs.get)
        merges.append(best)
        if "".join(best) not in vocabulary:
            vocabulary.append("".join(best))
        merged = {}
        for symbols, count in words.items():
            output, i = [], 0
            while i < len(symbols):
                joined = symbols[i : i + 2] == best
                output.append("".join(best) if joined else symbols[i])
                i += 2 if joined else 1
            merged[tuple(output)] = merged.get(tuple(output), 0) + count
        words = merged
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=MAX_LENGTH
    )


def build_text_encoder(tokenizer: CLIPTokenizer, hidden_size: int) -> CLIPTextModelWithProjection:
    """A two-layer CLIP text model."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        projection_dim=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=hidden_size // 32,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="gelu",
        initializer_factor=1.0,
    )
    return CLIPTextModelWithProjection(config)


def build_pipeline(vae: AutoencoderKL, captions: list[str], folder: Path, layers: int, heads: int):
    """The untrained pipeline around the trained autoencoder."""
    tokenizer = build_tokenizer(captions, folder)
    text_encoders = [build_text_encoder(tokenizer, hidden_size) for hidden_size in (64, 96)]
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=heads,
        caption_projection_dim=32 * heads,
        joint_attention_dim=64 + 96,
        pooled_projection_dim=64 + 96,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=text_encoders[1],
        tokenizer_2=copy.deepcopy(tokenizer),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def encode(pipeline: StableDiffusion3Pipeline, tokens: torch.Tensor, zeros: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `StableDiffusion3Pipeline.encode_prompt` does without T5, from token numbers and with gradients."""
    first = pipeline.text_encoder(tokens, output_hidden_states=True)
    second = pipeline.text_encoder_2(tokens, output_hidden_states=True)
    hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    hidden = torch.cat([hidden, hidden.new_zeros(len(tokens), zeros, hidden.shape[-1])], dim=1)
    return hidden, torch.cat([first.text_embeds, second.text_embeds], dim=-1)


def flow_loss(pipeline: StableDiffusion3Pipeline, latents: torch.Tensor, tokens: torch.Tensor, zeros: int):
    """Flow-matching loss at logit-normal times, shifted like the times of the scheduler."""
    u = torch.sigmoid(torch.randn(len(latents)))
    shift = pipeline.scheduler.config.shift
    sigma = shift * u / (1 + (shift - 1) * u)
    noise = torch.randn_like(latents)
    level = sigma[:, None, None, None]
    # With so few tokens the plain attention is several times faster on a processor than the fused one.
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
        hidden, pooled = encode(pipeline, tokens, zeros)
        velocity = pipeline.transformer((1 - level) * latents + level * noise, hidden, pooled, sigma * 1000).sample
    return (velocity.float() - (noise - latents)).square().mean()


@torch.no_grad()
def export(pipeline: StableDiffusion3Pipeline, averages: dict, folder: Path) -> StableDiffusion3Pipeline:
    """Saves the averaged weights, the large models in half precision; returns the pipeline in single precision."""
    averaged = StableDiffusion3Pipeline(**copy.deepcopy(pipeline.components))
    for name, weights in averages.items():
        getattr(averaged, name).load_state_dict(weights)
        getattr(averaged, name).eval()
    half = StableDiffusion3Pipeline(**copy.deepcopy(averaged.components))
    half.transformer.half(), half.vae.half()  # a text encoder loads in its saved precision, so these stay single
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(folder.name + ".new")
    half.save_pretrained(aside)
    replace_folder(aside, folder)
    return averaged


def load_pipeline(folder: Path | str) -> StableDiffusion3Pipeline:
    """Loads an exported pipeline in single precision; diffusers wants to be told that there is no T5."""
    return StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)


def sample(pipeline, prompts: list[str], seed: int = 0, steps: int = 20, guidance: float = 3.0) -> torch.Tensor:
    """Samples one image per prompt, [N, 3, 64, 64] in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=ZERO_TOKENS,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images
    return images.float().cpu()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE / "data" / "emoji.parquet")
    parser.add_argument("--output_dir", type=Path, default=HERE / "pipeline")
    parser.add_argument("--work_dir", type=Path, required=True, help="Holds `vae/`; receives the state and grids.")
    parser.add_argument("--minutes", type=float, default=60.0, help="The learning rate falls to zero at this time.")
    parser.add_argument("--export_minutes", type=float, default=10.0)
    parser.add_argument("--batch_size", type=int, default=96)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--dropout", type=float, default=0.1, help="The share of empty captions.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    images, prompts, _ = load_images(args.data)
    vae = AutoencoderKL.from_pretrained(args.work_dir / "vae").eval().requires_grad_(False)
    vae.register_to_config(_name_or_path="")
    with torch.no_grad():
        latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in (images * 2 - 1).split(64)])
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    captions = sorted(set(prompts))
    pipeline = build_pipeline(vae, captions, args.work_dir / "tokenizer", args.layers, args.heads)
    token_table = pipeline.tokenizer(
        ["", *captions], padding="max_length", max_length=MAX_LENGTH, return_tensors="pt"
    ).input_ids
    token_rows = torch.tensor([1 + captions.index(prompt) for prompt in prompts])

    trained = {name: getattr(pipeline, name).train() for name in ("transformer", "text_encoder", "text_encoder_2")}
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

    shown = [captions[i] for i in range(0, len(captions), max(1, len(captions) // 24))][:24]
    last_export, losses, order = elapsed, [], []
    while True:
        start = time.time()
        progress = elapsed / (60 * args.minutes)
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        rate = args.learning_rate * min(1.0, (step + 1) / 300) * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Now and then a small batch with many zero tokens, so that the pipeline's default of 256 works as well.
        long = step % 16 == 15
        size = args.batch_size // 8 if long else args.batch_size
        if len(order) < size:
            order = torch.randperm(len(latents)).tolist()
        rows, order = torch.tensor(order[:size]), order[size:]
        tokens = token_table[torch.where(torch.rand(size) < args.dropout, 0, token_rows[rows])]
        zeros = int(torch.randint(2, 257, ())) if long else ZERO_TOKENS
        loss = flow_loss(pipeline, latents[rows], tokens, zeros)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(args.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_([a for a, _ in pairs], [v.detach() for _, v in pairs], 1 - decay)
        step += 1
        elapsed += time.time() - start
        losses = [*losses[-199:], loss.item()]
        if step % 100 == 0:
            seen = step * args.batch_size * (1 - 7 / 128) / len(latents)
            message = f"step {step} {elapsed:.0f}s seen {seen:.0f} loss {sum(losses) / len(losses):.4f}"
            print(f"{message} norm {norm:.2f} lr {rate:.1e}", flush=True)
        done = progress >= 1
        if done or elapsed - last_export > 60 * args.export_minutes:
            last_export = elapsed
            state = {"models": {name: model.state_dict() for name, model in trained.items()}, "step": step}
            state |= {"averages": [a for a, _ in pairs], "optimizer": optimizer.state_dict(), "elapsed": elapsed}
            save_atomically(state, args.work_dir / "state.pt")
            averaged = export(pipeline, averages, args.output_dir)
            save_grid(sample(averaged, [p for p in shown for _ in range(8)]), args.work_dir / f"step{step}.png", 24)
            print(f"exported step {step} to {args.output_dir}", flush=True)
        if done:
            break


if __name__ == "__main__":
    main()
