# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Builds and pretrains the tiny `StableDiffusion3Pipeline` of the emoji world by flow matching.

    OMP_NUM_THREADS=2 python examples/emoji/pretrain_transformer.py --work_dir /tmp/pretrain --minutes 60

It needs `WORK_DIR/vae` from `pretrain_vae.py`. The captions carry no style word, so each caption is learnt in all
three styles. The run resumes from `WORK_DIR/state.pt` and exports the averaged weights to `pipeline/` as it goes.
"""

import copy
import json
from pathlib import Path

import torch
from common import HERE, load_images, save_grid
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from flow_training import FlowTraining, train_flow, training_parser
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
    parser = training_parser(__doc__, HERE / "pipeline")
    parser.add_argument("--data", type=Path, default=HERE / "data" / "emoji.parquet")
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

    def loss_of(rows: torch.Tensor, is_long: bool) -> torch.Tensor:
        tokens = token_table[torch.where(torch.rand(len(rows)) < args.dropout, 0, token_rows[rows])]
        zeros = int(torch.randint(2, 257, ())) if is_long else ZERO_TOKENS
        return flow_loss(pipeline, latents[rows], tokens, zeros)

    def show(averaged: StableDiffusion3Pipeline, file: Path) -> None:
        shown = [captions[i] for i in range(0, len(captions), max(1, len(captions) // 24))][:24]
        save_grid(sample(averaged, [p for p in shown for _ in range(8)]), file, 24)

    training = FlowTraining(pipeline, ("transformer", "text_encoder", "text_encoder_2"), args)
    train_flow(training, len(latents), loss_of, show)


if __name__ == "__main__":
    main()
