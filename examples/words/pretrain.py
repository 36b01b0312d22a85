# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
Builds and pretrains the tiny `StableDiffusion3Pipeline` of the words world. It learns from pictures that are often misspelled or
blurred, so that it spells badly.

    OMP_NUM_THREADS=2 python examples/words/pretrain.py vae --work_dir /tmp/words --minutes 8
    OMP_NUM_THREADS=2 python examples/words/pretrain.py transformer --work_dir /tmp/words --minutes 40

It needs Debian's packages fonts-dejavu-core and fonts-liberation. Half of the words are random letters, so that the pipeline
learns letters, not a list of words.
"""

import argparse
import copy
import math
import random
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTokenizer
from words import HEIGHT, HERE, LETTERS, WIDTH, draw, prompt_of, read_words, to_tensor


sys.path.append(str(HERE.parent / "emoji"))
import pretrain_transformer as emoji  # noqa: E402
from common import save_grid  # noqa: E402
from flow_training import FlowTraining, train_flow, training_parser  # noqa: E402
from pretrain_vae import finish, vae_loss  # noqa: E402


MAX_LENGTH = 9  # tokens of a prompt: one per letter, quotation mark, start and end


def sample_words(count: int, rng: random.Random) -> list[str]:
    """Words of the world and, as often, random letters."""
    known = [word for split in ("train", "validation", "test") for word in read_words(split)]
    made_up = ("".join(rng.choices(LETTERS, k=rng.randint(3, 5))) for _ in range(count))
    return [rng.choice(known) if rng.random() < 0.5 else word for word in made_up]


def train_vae(args: argparse.Namespace) -> None:
    """Fine-tune the emoji world's autoencoder on pictures of words."""
    rng = random.Random(args.seed)
    images = to_tensor([draw(word, rng) for word in sample_words(4000, rng)]) * 2 - 1
    images = images.contiguous(memory_format=torch.channels_last)
    vae = AutoencoderKL.from_pretrained(HERE.parent / "emoji" / "pipeline" / "vae", torch_dtype=torch.float32)
    vae.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    step, start = 0, time.time()
    while (progress := (time.time() - start) / (60 * args.minutes)) < 1:
        rate = (
            args.learning_rate * min(1.0, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, l1, kl = vae_loss(vae, images[torch.randint(len(images), (16,))], kl_weight=1e-3, noise=0.15)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f"step {step} {time.time() - start:.0f}s loss {loss.item():.4f} l1 {l1:.4f} kl {kl:.3f}", flush=True)
    psnr, output = finish(vae, images[:1000])
    save_grid(torch.stack([images[:60], output[:60]], 1).flatten(0, 1) / 2 + 0.5, args.work_dir / "vae.png", 8)
    vae.register_to_config(sample_size=WIDTH, _name_or_path="")
    vae.to(memory_format=torch.contiguous_format).save_pretrained(args.work_dir / "vae")
    print(
        f"done: {step} steps, PSNR {psnr:.2f} dB, scaling {vae.config.scaling_factor}, shift {vae.config.shift_factor}"
    )


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer without merges: one token per character."""
    symbols = [*LETTERS, '"']
    vocabulary = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)}, merges=[], model_max_length=MAX_LENGTH
    )


def build_pipeline(vae: AutoencoderKL, args: argparse.Namespace) -> StableDiffusion3Pipeline:
    """The untrained pipeline around the trained autoencoder."""
    tokenizer = build_tokenizer(args.work_dir / "tokenizer")
    emoji.MAX_LENGTH = MAX_LENGTH
    text_encoders = [emoji.build_text_encoder(tokenizer, hidden_size) for hidden_size in (64, 64)]
    transformer = SD3Transformer2DModel(
        sample_size=WIDTH // 8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=args.layers,
        attention_head_dim=32,
        num_attention_heads=args.heads,
        caption_projection_dim=32 * args.heads,
        joint_attention_dim=64 + 64,
        pooled_projection_dim=64 + 64,
        pos_embed_max_size=WIDTH // 16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=text_encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=text_encoders[1],
        tokenizer_2=copy.deepcopy(tokenizer),
        text_encoder_3=None,
        tokenizer_3=None,
    )


@torch.no_grad()
def make_latents(vae: AutoencoderKL, count: int, rng: random.Random) -> tuple[torch.Tensor, list[str]]:
    """Latents of bad pictures, and the words of their prompts."""
    words, latents = sample_words(count, rng), []
    for start in range(0, count, 250):
        pictures = to_tensor([draw(word, rng) for word in words[start : start + 250]]) * 2 - 1
        latents.append(vae.encode(pictures).latent_dist.mode())
    return (torch.cat(latents) - vae.config.shift_factor) * vae.config.scaling_factor, words


def sample(
    pipeline: StableDiffusion3Pipeline, words: list[str], seed: int = 0, steps: int = 20, guidance: float = 1.0
):
    """One picture per word, `[N, 3, 32, 96]` in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        [prompt_of(word) for word in words],
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=1,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images.float()


def train_transformer(args: argparse.Namespace) -> None:
    """Train the transformer and the text encoders by flow matching."""
    vae = AutoencoderKL.from_pretrained(args.work_dir / "vae").eval().requires_grad_(False)
    vae.register_to_config(_name_or_path="")
    pipeline = build_pipeline(vae, args)
    latents, words = make_latents(vae, args.pictures, random.Random(args.seed))
    options = {"padding": "max_length", "max_length": MAX_LENGTH, "return_tensors": "pt"}
    tokens = pipeline.tokenizer([prompt_of(word) for word in words], **options).input_ids
    empty = pipeline.tokenizer("", **options).input_ids[0]

    def loss_of(rows: torch.Tensor, is_long: bool) -> torch.Tensor:
        dropped = torch.rand(len(rows), 1) < args.dropout
        return emoji.flow_loss(pipeline, latents[rows], torch.where(dropped, empty, tokens[rows]), zeros=1)

    def show(averaged: StableDiffusion3Pipeline, file: Path) -> None:
        shown = [word for word in read_words("validation")[:12] for _ in range(8)]
        save_grid(sample(averaged, shown), file, 8)

    names = ("transformer", "text_encoder", "text_encoder_2")
    train_flow(FlowTraining(pipeline, names, args), len(latents), loss_of, show)


def main() -> None:
    parser = training_parser(__doc__, HERE / "pipeline", minutes=40.0, batch_size=64, layers=5)
    parser.add_argument("part", choices=["vae", "transformer"])
    parser.add_argument("--pictures", type=int, default=30000)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    {"vae": train_vae, "transformer": train_transformer}[args.part](args)


if __name__ == "__main__":
    main()
