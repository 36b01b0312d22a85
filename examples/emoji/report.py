# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
What TAPO did to the emoji model, measured by judges that training never saw, on prompts that training never saw.

    python examples/emoji/report.py --base examples/emoji/pipeline --slrm runs/emoji/slrm --lora runs/emoji/tapo

The same for Diffusion-DPO, which needs no reward model:

    python examples/emoji/report.py --method Diffusion-DPO --slrm none --lora runs/emoji/dpo --split validation

Prints a table and writes into `report/`: `metrics.json`, `before_after.png` (the same prompts and seeds), `curves.png`
and `index.html`, which shows all of them.
"""

import argparse
import html
import json
import time
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from common import STYLES, load_images  # noqa: E402
from datasets import load_dataset  # noqa: E402
from diffusers import StableDiffusion3Pipeline  # noqa: E402
from judges import load_judges, recall_at  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

from tapo_trl import SLRMModel, load_policy
from tapo_trl.metrics import evaluate_preference_accuracy
from tapo_trl.policies import FlowPolicy


HERE = Path(__file__).resolve().parent
SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
RULES = {
    "ground_truth": "ground-truth target (sees the clean latent)",
    "reference": "inference-time target (base's velocity)",
    "none": "inference-time target (logit only)",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="examples/emoji/pipeline")
    parser.add_argument("--slrm", default="runs/emoji/slrm", help="`none` if the policy was trained without one.")
    parser.add_argument("--lora", default="runs/emoji/tapo")
    parser.add_argument("--method", default="TAPO", help="What trained `--lora`, for the captions.")
    parser.add_argument("--output_dir", default="report", type=Path)
    parser.add_argument("--preferred_style", default="fluent")
    parser.add_argument(
        "--split", default="test", choices=["validation", "test"], help="Choose settings on `validation` only."
    )
    parser.add_argument("--seeds", type=int, default=4, help="Images per held-out prompt.")
    parser.add_argument("--num_inference_steps", type=int, default=12)
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--max_sequence_length", type=int, default=1)
    return parser.parse_args()


def generate(pipeline: StableDiffusion3Pipeline, prompts: list[str], args: argparse.Namespace) -> torch.Tensor:
    """`args.seeds` images per prompt by plain diffusers: `[len(prompts) * seeds, 3, 64, 64]` in [0, 1]."""
    batches = []
    for seed in range(args.seeds):
        batches.append(
            pipeline(
                prompts,
                height=64,
                width=64,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                max_sequence_length=args.max_sequence_length,
                generator=[torch.Generator().manual_seed(1000 * seed + row) for row in range(len(prompts))],
                output_type="pt",
            ).images
        )
    return torch.cat(batches)


def detail(images: torch.Tensor) -> float:
    """Mean size of the Laplacian of the brightness of images `[N, 3, H, W]`: it falls when edges and fine lines are blurred."""
    brightness = images.mean(dim=1)
    neighbours = sum(brightness.roll(shift, dim) for shift in (-1, 1) for dim in (1, 2))
    return (4 * brightness - neighbours)[:, 1:-1, 1:-1].abs().mean().item()


@torch.no_grad()
def detail_of_artist(policy: FlowPolicy, prompts: list[str], style: str) -> float:
    """Detail of the artist's own pictures of `prompts`, as far as the model's autoencoder can draw it."""
    images, captions, styles = load_images(HERE / "data" / "emoji.parquet")
    wanted = [row for row, caption in enumerate(captions) if caption in prompts and styles[row] == STYLES.index(style)]
    return detail(policy.decode(policy.encode(images[wanted])).clamp(0, 1))


def judge(images: torch.Tensor, prompts: list[str], args: argparse.Namespace) -> dict[str, float]:
    style_judge, subject_judge = load_judges(HERE / "judges")
    styles = style_judge.style_probabilities(images).argmax(-1)
    ranks = subject_judge.ranks(images, prompts)
    shares = {name: (styles == index).float().mean().item() for index, name in enumerate(style_judge.styles)}
    return {
        "style_shares": shares,
        "subject_r1": recall_at(ranks, 1),
        "subject_r10": recall_at(ranks, 10),
        "subject_probability": subject_judge.probabilities(images, prompts).mean().item(),
        "detail": detail(images),
    }


def read_logs(folder: str) -> list[dict]:
    return json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]


def draw_grid(before: torch.Tensor, after: torch.Tensor, prompts: list[str], method: str, path: Path) -> None:
    """One row per prompt: its images before, then after, of the same seeds."""
    scale, label, gap = 2, 150, 24
    columns, size = before.shape[1], 64 * scale
    width = label + 2 * columns * size + gap
    grid = Image.new("RGB", (width, 24 + len(prompts) * size), "white")
    canvas = ImageDraw.Draw(grid)
    canvas.text((label, 6), f"before {method}", fill="black")
    canvas.text((label + columns * size + gap, 6), f"after {method} (same prompts and seeds)", fill="black")
    for row, prompt in enumerate(prompts):
        canvas.text((6, 24 + row * size + size // 2 - 6), prompt, fill="black")
        for side, images in enumerate((before, after)):
            for column in range(columns):
                pixels = (images[row, column] * 255).round().byte().permute(1, 2, 0).numpy()
                tile = Image.fromarray(pixels).resize((size, size), Image.BICUBIC)
                grid.paste(tile, (label + side * (columns * size + gap) + column * size, 24 + row * size))
    grid.save(path)


def draw_curves(slrm_logs: list[dict], policy_logs: list[dict], accuracy: dict, method: str, path: Path) -> None:
    titles = {"reward": "latent reward of the candidates", "rewards/accuracies": "share of pairs ranked rightly"}
    titles = {name: title for name, title in titles.items() if any(name in log for log in policy_logs)}
    number = len(titles) + (2 if accuracy else 0)
    figure, axes = plt.subplots(1, number, figsize=(4.5 * number, 3.8), squeeze=False)
    axes = iter(axes[0])

    def plot(axis, logs, name, title):
        points = [(log["step"], log[name]) for log in logs if name in log]
        axis.plot(*zip(*points, strict=True), label=name)
        axis.set(title=title, xlabel="step")
        axis.legend()

    if accuracy:
        plot(next(axes), slrm_logs, "accuracy", "SLRM: training accuracy")
        axis = next(axes)
        for rule, values in accuracy.items():
            axis.plot(list(values), list(values.values()), marker="o", label=RULES[rule])
        axis.axhline(0.5, color="grey", linestyle=":")
        axis.set(title="SLRM: accuracy on held-out pairs", xlabel="sigma (noise level)")
        axis.legend()
    for name, title in titles.items():
        plot(next(axes), policy_logs, name, f"{method}: {title}")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def write_page(metrics: dict, table: str, method: str, path: Path) -> None:
    if metrics["slrm_accuracy"]:
        story = f"The reward model learned from pairs of real images to prefer one of them, and {method} aligned the model with it."
    else:
        story = f"In pairs of real images one style is preferred, and {method} aligned the model with them."
    path.write_text(
        "<!doctype html><meta charset='utf-8'><title>tapo_trl: the emoji world</title>"
        "<style>body{font-family:sans-serif;max-width:1250px;margin:2em auto}img{max-width:100%}</style>"
        f"<h1>{method} on the emoji world</h1>"
        f"<p>A tiny Stable Diffusion 3.5 draws each caption in three styles. {story} Everything below is measured on captions "
        "that no training saw but the pretraining, by judges that were trained on real images only.</p>"
        f"<pre>{html.escape(table)}</pre>"
        f"<h2>Before and after</h2><img src='before_after.png' alt='samples before and after {method}'>"
        "<h2>Curves</h2><img src='curves.png' alt='training curves'>"
        f"<h2>metrics.json</h2><pre>{html.escape(json.dumps(metrics, indent=2))}</pre>",
        encoding="utf-8",
    )


def format_table(metrics: dict, preferred_style: str) -> str:
    lines = [
        f"{'on held-out prompts':44}{'before':>8}{'after':>8}",
        f"{f'share of the preferred style ({preferred_style})':44}"
        f"{metrics['preferred_style_share_before']:8.2f}{metrics['preferred_style_share_after']:8.2f}",
        f"{'right subject among the 10 best captions':44}"
        f"{metrics['subject_r10_before']:8.2f}{metrics['subject_r10_after']:8.2f}",
        f"{'right subject is the best caption':44}"
        f"{metrics['subject_r1_before']:8.2f}{metrics['subject_r1_after']:8.2f}",
        f"{'probability of the right caption':44}"
        f"{metrics['subject_probability_before']:8.2f}{metrics['subject_probability_after']:8.2f}",
        f"{'detail, 1.00 is the artist of that style':44}"
        f"{metrics['detail_before']:8.2f}{metrics['detail_after']:8.2f}",
    ]
    if metrics["slrm_accuracy"]:
        lines += ["", f"{'SLRM accuracy on held-out pairs at sigma':44}" + "".join(f"{sigma:8}" for sigma in SIGMAS)]
    for rule, values in metrics["slrm_accuracy"].items():
        lines.append(f"{RULES[rule]:44}" + "".join(f"{value:8.2f}" for value in values.values()))
    lines += ["", "seconds: " + ", ".join(f"{stage} {value:.0f}" for stage, value in metrics["seconds"].items())]
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    has_slrm = args.slrm != "none"
    files = [Path(args.slrm) / "config.json"] if has_slrm else []
    for file in (*files, Path(args.lora) / "pytorch_lora_weights.safetensors"):
        if not file.is_file():
            raise SystemExit(f"{file} is missing: train first, `make demo` runs everything in order.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    policy, accuracy, slrm_logs = load_policy(args.base), {}, []
    if has_slrm:
        pairs = load_dataset("parquet", data_files=str(HERE / "pairs" / f"{args.split}.parquet"), split="train")
        slrm, slrm_logs = SLRMModel.from_pretrained(args.slrm).eval(), read_logs(args.slrm)
        accuracy = evaluate_preference_accuracy(
            slrm, policy, pairs, SIGMAS, tuple(RULES), resolution=64, batch_size=64
        )

    prompts = (HERE / "prompts" / f"{args.split}.txt").read_text(encoding="utf-8").splitlines()
    policy.pipeline.set_progress_bar_config(disable=True)
    artist = detail_of_artist(policy, prompts, args.preferred_style)
    before = generate(policy.pipeline, prompts, args)
    policy.pipeline.load_lora_weights(args.lora)
    after = generate(policy.pipeline, prompts, args)
    results = {
        name: judge(images, prompts * args.seeds, args) for name, images in (("before", before), ("after", after))
    }

    policy_logs = read_logs(args.lora)
    metrics = {
        f"{name}_{when}": value
        for when, result in results.items()
        for name, value in {
            "preferred_style_share": result["style_shares"][args.preferred_style],
            "subject_r10": result["subject_r10"],
            "subject_r1": result["subject_r1"],
            "subject_probability": result["subject_probability"],
            "detail": result["detail"] / artist,
            "style_shares": result["style_shares"],
        }.items()
    }
    metrics["slrm_accuracy"] = {
        rule: {str(s): value for s, value in values.items()} for rule, values in accuracy.items()
    }
    trainings = {"slrm": slrm_logs, args.method.lower(): policy_logs}
    metrics["seconds"] = {name: logs[-1]["train_runtime"] for name, logs in trainings.items() if logs}
    metrics["seconds"]["report"] = time.perf_counter() - start

    shape = (args.seeds, len(prompts), *before.shape[1:])
    shown = slice(0, 12)
    draw_grid(
        before.view(shape).transpose(0, 1)[shown],
        after.view(shape).transpose(0, 1)[shown],
        prompts[shown],
        args.method,
        args.output_dir / "before_after.png",
    )
    draw_curves(slrm_logs, policy_logs, accuracy, args.method, args.output_dir / "curves.png")
    (args.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    table = format_table(metrics, args.preferred_style)
    write_page(metrics, table, args.method, args.output_dir / "index.html")
    print(table)
    print(f"\nPictures and curves: {args.output_dir / 'index.html'}")


if __name__ == "__main__":
    main()
