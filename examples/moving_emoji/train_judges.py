# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Trains the two judges on real clips with strong augmentation and measures them.

    OMP_NUM_THREADS=2 python examples/moving_emoji/train_judges.py --minutes 3     # minutes for each judge
    python examples/moving_emoji/train_judges.py --evaluate_only

The numbers go to `judges/results.json`: on real and augmented clips, on reconstructions of the autoencoder, and on
samples of the pipeline at several guidance scales.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from clip_judges import ClipSubjectJudge, QualityJudge, direction_hits, load_judges, recall_at, roughness
from clips import HERE, KINDS, SUBJECTS, all_prompts, draw_clip, load_subjects, parse_prompt, random_batch, to_tensor
from sampling import load_pipeline, sample
from torch.nn import functional


def augment(clips: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """Shift, scale, blur, recolour and add noise, differently for each clip `[B, 3, F, H, W]`, alike for its frames."""
    count, _, frames, height, width = clips.shape

    def spread(size: float) -> torch.Tensor:
        return strength * size * (2 * torch.rand(count) - 1)

    def column(size: float) -> torch.Tensor:
        return spread(size)[:, None, None, None, None]

    scale, none = 1 + spread(0.12), torch.zeros(count)
    rows = [torch.stack([scale, none, spread(0.1)], 1), torch.stack([none, scale, spread(0.1)], 1)]
    flat = 0.5 - clips.flatten(1, 2) / 2  # white is zero, with which `grid_sample` pads
    grid = functional.affine_grid(torch.stack(rows, 1), list(flat.shape), align_corners=False)
    flat = functional.grid_sample(flat, grid, align_corners=False)
    blurred = flat
    for _ in range(2):
        blurred = functional.avg_pool2d(functional.pad(blurred, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.7)
    clips = (flat + share * (blurred - flat)).view(count, 3, frames, height, width)
    grey = clips.mean(dim=1, keepdim=True)
    clips = (1 + column(0.12)) * (grey + (1 + column(0.2)) * (clips - grey))
    clips = clips + strength * 0.05 * torch.rand(count, 1, 1, 1, 1) * torch.randn_like(clips)
    low = functional.interpolate(torch.randn(count, 3, frames, 12, 12).flatten(1, 2), size=(height, width))
    clips = clips + strength * 0.05 * torch.rand(count, 1, 1, 1, 1) * low.view_as(clips)
    return 1 - 2 * clips.clamp(0, 1)


def train(judge, minutes: float, batch_size: int, rng: random.Random) -> None:
    """Cross-entropy over the kinds or, on one random frame per clip, over the subjects."""
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.05)
    start, step, judge = time.time(), 0, judge.train()
    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 100) * (0.01 + 0.5 * (1 + math.cos(math.pi * progress)))
        clips, prompts, labels = random_batch(batch_size, rng)
        if isinstance(judge, ClipSubjectJudge):
            frame = rng.randrange(clips.shape[2])
            clips, labels = clips[:, :, frame : frame + 1], judge.own_columns(prompts)[:, 0]
        with torch.autocast("cpu", torch.bfloat16):
            scores = judge(augment(clips)).float()
        loss = functional.cross_entropy(scores, labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 100 == 0:
            hits = (scores.argmax(1) == labels).float().mean().item()
            print(f"step {step} {time.time() - start:.0f}s loss {loss.item():.3f} accuracy {hits:.3f}", flush=True)
    judge.eval()


def score(clips: torch.Tensor, prompts: list[str], kinds: torch.Tensor | None, judges: tuple) -> dict:
    """The numbers of both judges and of the measures of motion on one set of clips."""
    starts = range(0, len(prompts), 64)
    kind = torch.cat([judges[0].probabilities(clips[i : i + 64]) for i in starts])
    ranks = torch.cat([judges[1].ranks(clips[i : i + 64], prompts[i : i + 64]) for i in starts])
    own = torch.cat([judges[1].probabilities(clips[i : i + 64], prompts[i : i + 64]) for i in starts])
    hits, rough, found = direction_hits(clips, prompts), roughness(clips), kind.argmax(1)
    shares = torch.bincount(found, minlength=len(KINDS)) / len(clips)
    result = {
        "shares": {name: round(share.item(), 3) for name, share in zip(KINDS, shares, strict=True)},
        "quality_confidence": round(kind.amax(1).mean().item(), 3),
        "subject_r1": round(recall_at(ranks, 1), 3),
        "subject_probability": round(own.mean().item(), 3),
        "direction_accuracy": round(hits.float().mean().item(), 3),
        "roughness": {
            name: round(rough[found == i].mean().item(), 3) for i, name in enumerate(KINDS) if (found == i).any()
        },
    }
    if kinds is not None:
        result["quality_accuracy"] = round((found == kinds).float().mean().item(), 3)
    return result


@torch.no_grad()
def evaluate(args: argparse.Namespace) -> dict:
    """Scores real, augmented, reconstructed and generated clips."""
    judges, subjects, rng = load_judges(args.output_dir), load_subjects(), random.Random(1)
    prompts = [prompt for prompt in all_prompts() for _ in KINDS]
    kinds = torch.arange(len(KINDS)).repeat(len(all_prompts()))
    clips = []
    for prompt, kind in zip(prompts, kinds.tolist(), strict=True):
        subject, direction = parse_prompt(prompt)
        clips.append(draw_clip(subjects[subject], direction, KINDS[kind], rng))
    clips = to_tensor(clips)
    results = {"real": score(clips, prompts, kinds, judges)}
    results["augmented"] = score(augment(clips), prompts, kinds, judges)
    if args.pipeline_dir.exists():
        pipeline = load_pipeline(args.pipeline_dir)
        latents = [pipeline.vae.encode(batch).latent_dist.mode() for batch in clips.split(1)]
        decoded = torch.cat([pipeline.vae.decode(batch).sample for batch in latents])
        results["reconstructed"] = score(decoded, prompts, kinds, judges)
        for guidance in args.guidance_scales:
            parts = [
                sample(pipeline, all_prompts(), seed, args.steps, guidance) for seed in range(args.samples_per_prompt)
            ]
            own = all_prompts() * args.samples_per_prompt
            results[f"sampled, guidance {guidance:g}"] = score(torch.cat(parts), own, None, judges)
    for name, result in results.items():
        print(name, json.dumps(result), flush=True)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE / "judges")
    parser.add_argument("--pipeline_dir", type=Path, default=HERE / "pipeline")
    parser.add_argument("--minutes", type=float, default=3.0, help="Minutes for each judge.")
    parser.add_argument("--evaluate_only", action="store_true")
    parser.add_argument("--samples_per_prompt", type=int, default=2)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance_scales", type=float, nargs="*", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    if not args.evaluate_only:
        quality_judge = QualityJudge()
        train(quality_judge, args.minutes, 64, random.Random(args.seed))
        quality_judge.save(args.output_dir / "quality")
        subject_judge = ClipSubjectJudge(list(SUBJECTS), channels=(16, 32, 64, 96), size=64)
        train(subject_judge, args.minutes, 128, random.Random(args.seed))
        subject_judge.save(args.output_dir / "subject")
    results = evaluate(args)
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
