# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

r"""Builds and pretrains the tiny `WanPipeline` of the moving-emoji world by flow matching.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/moving_emoji/pretrain_transformer.py \
        --work_dir /tmp/moving --minutes 30

Two processes of one thread each are faster than one of two threads when other programs use the cores, too. It needs
`WORK_DIR/vae` from `pretrain_vae.py`. A prompt does not name the kind of a clip, so each prompt is learnt in
all three. The run resumes from `WORK_DIR/state.pt` and exports the averaged weights to `pipeline/` as it goes.
"""

import math
import random
import sys
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

from common import save_atomically  # noqa: E402
from flow_training import FlowTraining, train_flow, training_parser  # noqa: E402


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


def main():
    parser = training_parser(__doc__, HERE / "pipeline", minutes=30.0, export_minutes=8.0, batch_size=64)
    parser.add_argument("--clips_per_kind", type=int, default=48, help="Clips of each prompt and kind.")
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
    token_table = pipeline.tokenizer(
        ["", *all_prompts()], padding="max_length", max_length=MAX_LENGTH, return_tensors="pt"
    ).input_ids

    def loss_of(rows: torch.Tensor, is_long: bool) -> torch.Tensor:
        tokens = token_table[torch.where(torch.rand(len(rows)) < args.dropout, 0, 1 + prompt_rows[rows])]
        length = MAX_LENGTH + 1 + 5039 * training.step % (512 - MAX_LENGTH) if is_long else MAX_LENGTH
        return flow_loss(pipeline, latents[rows], tokens, length)

    def show(averaged: WanPipeline, file: Path) -> None:
        shown = [f"{subject} moving {list(DIRECTIONS)[i % 4]}" for i, subject in enumerate(SUBJECTS)]
        save_strips(sample(use_euler(averaged), shown), file, 2)

    training = FlowTraining(pipeline, ("transformer", "text_encoder"), args)
    torch.manual_seed(1000 * (args.seed + training.step) + rank)
    train_flow(training, len(latents), loss_of, show, rank, processes, all_average if processes > 1 else None)
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
