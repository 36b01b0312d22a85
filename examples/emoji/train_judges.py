# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Trains the two judges on real pictures with strong augmentation and reports their accuracy.

    python examples/emoji/build_dataset.py --all --output_dir /tmp/emoji_all
    python examples/emoji/train_judges.py --train_data /tmp/emoji_all/emoji.parquet
    python examples/emoji/train_judges.py --evaluate_only

The style judge learns from the full set, the subject judge from the committed captions. Their accuracy is given on
real and augmented pictures and on autoencoder reconstructions; shares and recall also on samples of the pipeline.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from common import HERE, STYLES, load_images
from judges import Judge, StyleJudge, SubjectJudge, load_judges, recall_at
from torch.nn import functional


def augment(images: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """Shift, scale, turn, blur, coarsen, recolour and add noise, differently for each image."""
    count = len(images)

    def spread(width: float) -> torch.Tensor:
        return strength * width * (2 * torch.rand(count) - 1)

    angle, scale = spread(0.15), 1 + spread(0.18)
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [torch.stack([cosine, -sine, spread(0.15)], 1), torch.stack([sine, cosine, spread(0.15)], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    images = 1 - functional.grid_sample(1 - images, grid, align_corners=False)  # pads with white

    blurred = images.clone()
    for kind, rows in zip(("none", "blur", "blur2", "coarse"), torch.randperm(count).chunk(4), strict=False):
        part = images[rows]
        if kind in ("blur", "blur2"):
            for _ in range(1 if kind == "blur" else 2):
                part = functional.avg_pool2d(functional.pad(part, (1, 1, 1, 1), mode="replicate"), 3, 1)
        elif kind == "coarse":
            part = functional.interpolate(part, scale_factor=0.5, mode="area")
            part = functional.interpolate(part, scale_factor=2, mode="bilinear")
        share = torch.rand(len(rows), 1, 1, 1)
        blurred[rows] = images[rows] + share * (part - images[rows])

    def column(width: float) -> torch.Tensor:
        return spread(width)[:, None, None, None]

    grey = blurred.mean(dim=1, keepdim=True)
    coloured = grey + (1 + column(0.3)) * (blurred - grey)
    coloured = 1 - (1 + column(0.15)) * (1 - coloured)  # keeps white white
    coloured = coloured + strength * 0.04 * torch.randn(count, 3, 1, 1) * (1 - coloured.min(dim=1, keepdim=True)[0])
    noisy = coloured + strength * 0.06 * torch.rand(count, 1, 1, 1) * torch.randn_like(coloured)
    low = functional.interpolate(torch.randn(count, 3, 16, 16), size=images.shape[-2:], mode="bilinear")
    return (noisy + strength * 0.08 * torch.rand(count, 1, 1, 1) * low).clamp(0, 1)


def train(judge: Judge, images: torch.Tensor, labels: torch.Tensor, minutes: float, batch_size: int = 128) -> None:
    """Cross-entropy over the labels, with a learning rate that falls to zero after `minutes`."""
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.05)
    start, step, judge = time.time(), 0, judge.train().to(memory_format=torch.channels_last)
    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 100) * (0.01 + 0.5 * (1 + math.cos(math.pi * progress)))
        rows = torch.randint(len(images), (batch_size,))
        batch = augment(images[rows]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            scores = judge(batch)
        loss = functional.cross_entropy(scores.float(), labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 100 == 0:
            hits = (scores.argmax(1) == labels[rows]).float().mean().item()
            print(f"step {step} {time.time() - start:.0f}s loss {loss.item():.3f} accuracy {hits:.3f}", flush=True)
    judge.eval()


def score(images: torch.Tensor, prompts: list[str], styles: torch.Tensor | None, judges: tuple) -> dict:
    """The numbers of both judges on one set of pictures."""
    probabilities = torch.cat([judges[0].style_probabilities(batch) for batch in images.split(128)])
    starts = range(0, len(prompts), 128)
    ranks = torch.cat([judges[1].ranks(images[i : i + 128], prompts[i : i + 128]) for i in starts])
    own = torch.cat([judges[1].probabilities(images[i : i + 128], prompts[i : i + 128]) for i in starts])
    result = {f"R@{k}": round(recall_at(ranks, k), 3) for k in (1, 10)}
    result["subject_probability"] = round(own.mean().item(), 3)
    if styles is not None:
        result["style_accuracy"] = round((probabilities.argmax(1) == styles).float().mean().item(), 3)
    shares = torch.bincount(probabilities.argmax(1), minlength=len(STYLES)) / len(images)
    result["style_shares"] = {style: round(share.item(), 3) for style, share in zip(STYLES, shares, strict=True)}
    result["style_confidence"] = round(probabilities.max(1)[0].mean().item(), 3)
    return result


@torch.no_grad()
def evaluate(args: argparse.Namespace, images: torch.Tensor, prompts: list[str], styles: torch.Tensor) -> dict:
    """Scores real, augmented, reconstructed and generated pictures."""
    judges = load_judges(args.output_dir)
    results = {"real": score(images, prompts, styles, judges)}
    results["augmented"] = score(augment(images), prompts, styles, judges)
    if args.pipeline_dir.exists():
        from pretrain_transformer import load_pipeline, sample

        pipeline = load_pipeline(args.pipeline_dir)
        latents = [pipeline.vae.encode(batch * 2 - 1).latent_dist.mode() for batch in images.split(64)]
        decoded = torch.cat([pipeline.vae.decode(batch).sample for batch in latents]) / 2 + 0.5
        results["reconstructed"] = score(decoded.clamp(0, 1), prompts, styles, judges)
        captions = sorted(set(prompts)) * args.samples_per_caption
        for guidance in args.guidance_scales:
            parts = [
                sample(pipeline, captions[i : i + 97], seed=i, guidance=guidance) for i in range(0, len(captions), 97)
            ]
            results[f"sampled, guidance {guidance:g}"] = score(torch.cat(parts), captions, None, judges)
    for name, result in results.items():
        print(name, json.dumps(result), flush=True)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE / "data" / "emoji.parquet")
    parser.add_argument("--train_data", type=Path, help="The full set (`build_dataset.py --all`).")
    parser.add_argument("--output_dir", type=Path, default=HERE / "judges")
    parser.add_argument("--pipeline_dir", type=Path, default=HERE / "pipeline")
    parser.add_argument("--judges", nargs="+", default=["style", "subject"], choices=["style", "subject"])
    parser.add_argument("--style_minutes", type=float, default=5.0)
    parser.add_argument("--subject_minutes", type=float, default=10.0)
    parser.add_argument("--evaluate_only", action="store_true")
    parser.add_argument("--samples_per_caption", type=int, default=4)
    parser.add_argument("--guidance_scales", type=float, nargs="*", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    images, prompts, styles = load_images(args.data)
    if not args.evaluate_only and "style" in args.judges:
        if args.train_data is None:
            parser.error("the style judge needs --train_data")
        all_images, _, all_styles = load_images(args.train_data)
        # The committed pictures, which the pipeline was trained on too, come more often than the others.
        pictures, labels = torch.cat([all_images, *[images] * 5]), torch.cat([all_styles, *[styles] * 5])
        style_judge = StyleJudge(list(STYLES), channels=(16, 32, 64, 96), size=32)
        train(style_judge, pictures, labels, args.style_minutes)
        style_judge.save(args.output_dir / "style")
    if not args.evaluate_only and "subject" in args.judges:
        captions = sorted(set(prompts))
        labels = torch.tensor([captions.index(prompt) for prompt in prompts])
        subject_judge = SubjectJudge(captions, channels=(24, 48, 96, 128), size=96)
        train(subject_judge, images, labels, args.subject_minutes)
        subject_judge.save(args.output_dir / "subject")
    results = evaluate(args, images, prompts, styles)
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
