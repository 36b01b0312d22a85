# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
What TAPO did to the moving-emoji model, measured by judges that training never saw, on prompts that training never saw.

    python examples/moving_emoji/report.py --slrm runs/moving_emoji/slrm --lora runs/moving_emoji/tapo

Prints a table and writes into `report/moving_emoji/`: `metrics.json`, `before_after.png` (the same prompts and seeds,
frames side by side), a few of these clips as GIF files, `curves.png` and `index.html`, which shows all of them. Choose
settings on `--split validation`; `test` is for the number to report.
"""

import argparse
import html
import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import torch
from clip_judges import direction_hits, load_judges, recall_at, roughness
from clips import FPS, FRAMES, HERE, KINDS, SIZE
from datasets import load_dataset
from PIL import Image, ImageDraw
from sampling import sample, use_euler

from tapo_trl import SLRMModel, load_policy
from tapo_trl.metrics import evaluate_preference_accuracy


def load_emoji_report():
    """The report of the emoji world, which has the same name as this script."""
    spec = importlib.util.spec_from_file_location("emoji_report", HERE.parent / "emoji" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(HERE / "pipeline"))
    parser.add_argument("--slrm", default="runs/moving_emoji/slrm")
    parser.add_argument("--lora", default="runs/moving_emoji/tapo")
    parser.add_argument("--pairs", default="runs/moving_emoji/pairs", type=Path, help="Folder of `make_pairs.py`.")
    parser.add_argument("--output_dir", default="report/moving_emoji", type=Path)
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--seeds", type=int, default=4, help="Clips per held-out prompt.")
    parser.add_argument("--num_inference_steps", type=int, default=12)
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--lora_scale", type=float, default=0.7, help="Strength of the trained weights.")
    return parser.parse_args()


def generate(pipeline, prompts: list[str], args: argparse.Namespace) -> torch.Tensor:
    """`args.seeds` clips per prompt by plain diffusers: `[seeds * len(prompts), 3, 9, 48, 48]` in [-1, 1]."""
    return torch.cat(
        [sample(pipeline, prompts, seed, args.num_inference_steps, args.guidance_scale) for seed in range(args.seeds)]
    )


def judge(clips: torch.Tensor, prompts: list[str]) -> dict[str, float]:
    """The shares of the kinds, how well subject and direction fit the prompts, and how smooth the motion is."""
    quality_judge, subject_judge = load_judges()
    kinds = quality_judge.probabilities(clips).argmax(-1)
    ranks = subject_judge.ranks(clips, prompts)
    return {
        "clean_share": (kinds == 0).float().mean().item(),
        "shares": {name: (kinds == index).float().mean().item() for index, name in enumerate(KINDS)},
        "subject_r1": recall_at(ranks, 1),
        "subject_r1_of_clean": recall_at(ranks[kinds == 0], 1),
        "subject_probability": subject_judge.probabilities(clips, prompts).mean().item(),
        "direction_accuracy": direction_hits(clips, prompts).float().mean().item(),
        "roughness": roughness(clips).mean().item(),
    }


def to_frames(clip: torch.Tensor, scale: int) -> list[Image.Image]:
    """The frames of a clip `[3, F, H, W]` in [-1, 1], enlarged `scale` times."""
    pixels = ((clip + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).numpy()
    return [Image.fromarray(np.ascontiguousarray(p)).resize((48 * scale, 48 * scale), Image.BICUBIC) for p in pixels]


def draw_strips(before: torch.Tensor, after: torch.Tensor, prompts: list[str], path: Path) -> None:
    """One row per prompt: the frames of its clip before, then after, of the same seed."""
    label, gap, size, frames = 190, 24, 48, before.shape[2]
    width = label + 2 * frames * size + gap
    sheet = Image.new("RGB", (width, 24 + len(prompts) * (size + 2)), "white")
    canvas = ImageDraw.Draw(sheet)
    canvas.text((label, 6), "before TAPO", fill="black")
    canvas.text((label + frames * size + gap, 6), "after TAPO (same prompts and seeds)", fill="black")
    for row, prompt in enumerate(prompts):
        top = 24 + row * (size + 2)
        canvas.text((6, top + size // 2 - 6), prompt, fill="black")
        for side, clips in enumerate((before, after)):
            for column, frame in enumerate(to_frames(clips[row], 1)):
                sheet.paste(frame, (label + side * (frames * size + gap) + column * size, top))
    sheet.save(path)


def save_gif(before: torch.Tensor, after: torch.Tensor, path: Path) -> None:
    """One clip before and after, side by side and in motion."""
    frames = []
    for left, right in zip(to_frames(before, 3), to_frames(after, 3), strict=True):
        frame = Image.new("RGB", (left.width + right.width + 12, left.height), "white")
        frame.paste(left, (0, 0))
        frame.paste(right, (left.width + 12, 0))
        frames.append(frame)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // FPS, loop=0)


def format_table(metrics: dict, sigmas: tuple[float, ...], rules: dict[str, str]) -> str:
    lines = [f"{'on held-out prompts':44}{'before':>8}{'after':>8}"]
    for name, key in (
        ("share of clean clips", "clean_share"),
        ("right subject is the best of 24", "subject_r1"),
        ("the same, of clean clips alone", "subject_r1_of_clean"),
        ("probability of the right subject", "subject_probability"),
        ("right direction", "direction_accuracy"),
        ("roughness of the motion (pixels per frame)", "roughness"),
    ):
        lines.append(f"{name:44}{metrics[f'{key}_before']:8.2f}{metrics[f'{key}_after']:8.2f}")
    lines += ["", f"{'SLRM accuracy on held-out pairs at sigma':44}" + "".join(f"{sigma:8}" for sigma in sigmas)]
    for rule, values in metrics["slrm_accuracy"].items():
        lines.append(f"{rules[rule]:44}" + "".join(f"{value:8.2f}" for value in values.values()))
    lines += ["", "seconds: " + ", ".join(f"{stage} {value:.0f}" for stage, value in metrics["seconds"].items())]
    return "\n".join(lines)


def write_page(metrics: dict, table: str, gifs: list[tuple[str, str]], path: Path) -> None:
    figures = "".join(
        f"<figure><img src='{name}' alt='before and after'><figcaption>{html.escape(prompt)}</figcaption></figure>"
        for prompt, name in gifs
    )
    path.write_text(
        "<!doctype html><meta charset='utf-8'><title>tapo_trl: the moving-emoji world</title>"
        "<style>body{font-family:sans-serif;max-width:1250px;margin:2em auto}img{max-width:100%}"
        "figure{display:inline-block;margin:.5em}</style>"
        "<h1>TAPO on the moving-emoji world</h1>"
        "<p>A tiny Wan2.1 draws each prompt cleanly, jerkily or distorted. The reward model learned from pairs of real "
        "clips to prefer the clean ones, and TAPO aligned the model with it. Everything below is measured on prompts "
        "that neither of the two trainings saw (the pretraining did), by judges that were trained on real clips only."
        "</p>"
        f"<pre>{html.escape(table)}</pre>"
        f"<h2>Before (left) and after (right)</h2>{figures}"
        "<h2>Frame by frame</h2><img src='before_after.png' alt='frames before and after TAPO'>"
        "<h2>Curves</h2><img src='curves.png' alt='training curves'>"
        f"<h2>metrics.json</h2><pre>{html.escape(json.dumps(metrics, indent=2))}</pre>",
        encoding="utf-8",
    )


def main() -> None:
    args = parse_args()
    for file in (Path(args.slrm) / "config.json", Path(args.lora) / "pytorch_lora_weights.safetensors"):
        if not file.is_file():
            raise SystemExit(f"{file} is missing: train first, `make demo-video` runs everything in order.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    emoji_report, start = load_emoji_report(), time.perf_counter()

    policy = load_policy(args.base)
    pairs = load_dataset("parquet", data_files=str(args.pairs / f"{args.split}.parquet"), split="train")
    slrm = SLRMModel.from_pretrained(args.slrm).eval()
    accuracy = evaluate_preference_accuracy(
        slrm,
        policy,
        pairs,
        emoji_report.SIGMAS,
        tuple(emoji_report.RULES),
        height=SIZE,
        width=SIZE,
        num_frames=FRAMES,
        fps=FPS,
        batch_size=48,
    )

    prompts = (HERE / "prompts" / f"{args.split}.txt").read_text(encoding="utf-8").splitlines()
    pipeline = use_euler(policy.pipeline)
    before = generate(pipeline, prompts, args)
    pipeline.load_lora_weights(args.lora, adapter_name="tapo")
    pipeline.set_adapters("tapo", args.lora_scale)
    after = generate(pipeline, prompts, args)

    slrm_logs, tapo_logs = emoji_report.read_logs(args.slrm), emoji_report.read_logs(args.lora)
    metrics = {
        f"{name}_{when}": value
        for when, clips in (("before", before), ("after", after))
        for name, value in judge(clips, prompts * args.seeds).items()
    }
    metrics["split"] = args.split
    metrics["slrm_accuracy"] = {
        rule: {str(sigma): value for sigma, value in values.items()} for rule, values in accuracy.items()
    }
    metrics["seconds"] = {
        "slrm": slrm_logs[-1]["train_runtime"],
        "tapo": tapo_logs[-1]["train_runtime"],
        "report": time.perf_counter() - start,
    }

    draw_strips(before[: len(prompts)], after[: len(prompts)], prompts, args.output_dir / "before_after.png")
    gifs = [(prompt, f"clip{row}.gif") for row, prompt in enumerate(prompts[:8])]
    for row, (_, name) in enumerate(gifs):
        save_gif(before[row], after[row], args.output_dir / name)
    emoji_report.draw_curves(slrm_logs, tapo_logs, accuracy, "TAPO", args.output_dir / "curves.png")
    (args.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    table = format_table(metrics, emoji_report.SIGMAS, emoji_report.RULES)
    write_page(metrics, table, gifs, args.output_dir / "index.html")
    print(table)
    print(f"\nPictures and curves: {args.output_dir / 'index.html'}")


if __name__ == "__main__":
    main()
