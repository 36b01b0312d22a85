# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Trains a tiny CLIP, from which a step-aware preference model (`reward_model_type: spm`) starts.

    OMP_NUM_THREADS=1 python examples/emoji/train_clip.py

By default it sees real pictures of the `train` captions only, each with its caption and in all styles alike: nothing of which style is
preferred, and no caption or picture of the other splits. It shares no weights with the judges. The tokenizer is the
pipeline's.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from common import HERE, STYLES, load_images
from torch.nn import functional
from train_judges import augment
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig


MEAN, STD = 0.5, 0.5
LEARNING_RATE = 1e-3


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP of about a million parameters for pictures of 64 x 64."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=16,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64))


def similarities(clip: CLIPModel, images: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Scaled cosines of images [N, 3, 64, 64] in [0, 1] and captions [M, length]: [N, M]."""
    return clip(input_ids=input_ids, pixel_values=(images - MEAN) / STD).logits_per_image


def train(clip: CLIPModel, images: torch.Tensor, input_ids: torch.Tensor, minutes: float) -> None:
    """
    Contrastive training: each batch has every caption once, in a random style.

    Args:
        clip ([`~transformers.CLIPModel`]): the CLIP.
        images (`torch.Tensor` of shape `(num_captions, num_styles, 3, 64, 64)`): pictures in [0, 1].
        input_ids (`torch.Tensor` of shape `(num_captions, length)`): tokens of the captions.
        minutes (`float`): how long.
    """
    optimizer = torch.optim.AdamW(clip.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    rows, start, step = torch.arange(len(images)), time.time(), 0
    clip.train()
    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * progress))
        batch = augment(images[rows, torch.randint(images.shape[1], (len(images),))])
        logits = similarities(clip, batch, input_ids)
        loss = (functional.cross_entropy(logits, rows) + functional.cross_entropy(logits.T, rows)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 50 == 0:
            hits = (logits.argmax(1) == rows).float().mean().item()
            print(f"step {step} {time.time() - start:.0f}s loss {loss.item():.3f} R@1 {hits:.3f}", flush=True)
    clip.eval()


def load_split(path: Path, split: str) -> tuple[torch.Tensor, list[str]]:
    """Pictures [captions, styles, 3, 64, 64] and captions of a split."""
    images, prompts, styles = load_images(path, split)
    captions = sorted(set(prompts))
    ordered = torch.empty(len(captions), len(STYLES), *images.shape[1:])
    ordered[[captions.index(prompt) for prompt in prompts], styles] = images
    return ordered, captions


@torch.no_grad()
def recall(clip: CLIPModel, images: torch.Tensor, input_ids: torch.Tensor) -> float:
    """Share of the pictures whose own caption has the highest similarity of all captions of the split."""
    logits = similarities(clip, images.flatten(0, 1), input_ids)
    own = torch.arange(len(images)).repeat_interleave(images.shape[1])
    return (logits.argmax(1) == own).float().mean().item()


def save(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes weights in half precision, the tokenizer, and what the image processor does."""
    clip.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    size = clip.config.vision_config.image_size
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "resample": 3,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE / "data" / "emoji.parquet")
    parser.add_argument("--tokenizer", type=Path, default=HERE / "pipeline" / "tokenizer")
    parser.add_argument("--output_dir", type=Path, default=HERE / "clip")
    parser.add_argument("--splits", nargs="+", default=["train"], choices=["train", "validation", "test"])
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = CLIPTokenizer.from_pretrained(args.tokenizer)
    clip = make_clip(tokenizer)
    splits = {}
    for split in ("train", "validation", "test"):
        images, captions = load_split(args.data, split)
        tokens = tokenizer(captions, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
        splits[split] = images, tokens.input_ids
    seen = [splits[split] for split in args.splits]
    train(clip, *(torch.cat(parts) for parts in zip(*seen, strict=True)), args.minutes)
    save(clip, tokenizer, args.output_dir)
    clip.float()
    for split, (images, input_ids) in splits.items():
        hits = recall(clip, images, input_ids)
        print(f"{split}: R@1 {hits:.3f} among {len(images)} captions (chance {1 / len(images):.3f})")
    print(f"{sum(parameter.numel() for parameter in clip.parameters()):,} parameters")


if __name__ == "__main__":
    main()
