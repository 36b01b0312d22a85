# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
Which `velocity_target`, `detach_score` and `score_preservation_coef` should an SLRM have? Measured on the emoji world.

    python examples/emoji/make_pairs.py
    python benchmarks/ablate_velocity_target.py --seeds 0 1 2 --jobs 2

For every variant and seed: trains an SLRM, aligns the policy with it, and has the held-out judges rate the result on
the prompts of the `validation` split. What is finished is kept in `runs/ablation`, so the script can be interrupted. Prints the table of
docs/slrm_trainer.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Variant:
    """Options of the SLRM's training, and the velocity target with which TAPO uses it."""

    velocity_target: str
    detach_score: bool
    score_preservation_coef: float
    tapo_velocity_target: str

    @property
    def slrm_name(self) -> str:
        return f"{self.velocity_target}-detach{int(self.detach_score)}-coef{self.score_preservation_coef:g}"

    @property
    def name(self) -> str:
        return f"{self.slrm_name}-{self.tapo_velocity_target}"


VARIANTS = (
    Variant("ground_truth", False, 0.0, "parent"),  # the paper's literal rule
    Variant("ground_truth", False, 1.0, "parent"),
    Variant("ground_truth", False, 1.0, "policy"),
    Variant("ground_truth", True, 1.0, "parent"),
    Variant("reference", False, 1.0, "reference"),
    Variant("none", False, 0.0, "none"),  # a plain latent reward model
)


def run(command: list[str], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        subprocess.run([sys.executable, *command], stdout=stream, stderr=subprocess.STDOUT, check=True)


def train_slrm(variant: Variant, seed: int, root: Path) -> Path:
    folder = root / f"slrm-{variant.slrm_name}-seed{seed}"
    if not (folder / "trainer_state.json").exists():
        options = {
            "velocity_target": variant.velocity_target,
            "detach_score": variant.detach_score,
            "score_preservation_coef": variant.score_preservation_coef,
            "seed": seed,
            "output_dir": folder,
        }
        run(["-m", "tapo_trl.cli", "slrm", "--config", "recipes/emoji/slrm.yaml", *flags(options)], folder / "log.txt")
    return folder


def measure(variant: Variant, seed: int, tapo_steps: int, root: Path) -> dict:
    folder = root / f"tapo-{variant.name}-seed{seed}"
    result = folder / "report" / "metrics.json"
    if not result.exists():
        slrm = train_slrm(variant, seed, root)
        options = {
            "velocity_target": variant.tapo_velocity_target,
            "reward_model": slrm,
            "max_steps": tapo_steps,
            "seed": seed,
            "output_dir": folder,
        }
        run(["-m", "tapo_trl.cli", "tapo", "--config", "recipes/emoji/tapo.yaml", *flags(options)], folder / "log.txt")
        options = {"slrm": slrm, "lora": folder, "output_dir": folder / "report", "seeds": 2, "split": "validation"}
        run(["examples/emoji/report.py", *flags(options)], folder / "report.txt")
    return json.loads(result.read_text())


def flags(options: dict) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def row(variant: Variant, metrics: list[dict]) -> str:
    deployable = "none" if variant.velocity_target == "none" else "reference"
    cells = [
        f"`{variant.velocity_target}`",
        str(variant.detach_score),
        f"{variant.score_preservation_coef:g}",
        spread([statistics.mean(m["slrm_accuracy"]["ground_truth"].values()) for m in metrics]),
        spread([statistics.mean(m["slrm_accuracy"][deployable].values()) for m in metrics]),
        spread([statistics.mean(m["slrm_accuracy"]["none"].values()) for m in metrics]),
        f"`{variant.tapo_velocity_target}`",
        spread([m["preferred_style_share_after"] for m in metrics]),
        spread([m["subject_r1_after"] for m in metrics]),
        spread([m["subject_r10_after"] for m in metrics]),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="Runs at the same time, with one thread each.")
    parser.add_argument("--tapo_steps", type=int, default=20)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ablation"))
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"

    # One SLRM serves several variants: train them first, so that no two jobs train the same.
    slrms = {(variant.slrm_name, seed): variant for variant in VARIANTS for seed in args.seeds}
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda item: train_slrm(item[1], item[0][1], args.output_dir), slrms.items()))
        jobs = {
            (variant, seed): pool.submit(measure, variant, seed, args.tapo_steps, args.output_dir)
            for seed in args.seeds
            for variant in VARIANTS
        }
        results = {key: job.result() for key, job in jobs.items()}

    first = next(iter(results.values()))
    print(
        f"{len(args.seeds)} seeds, mean ± standard deviation. Before TAPO: style "
        f"{first['preferred_style_share_before']:.2f}, subject R@10 {first['subject_r10_before']:.2f}.\n"
    )
    print(
        "| SLRM `velocity_target` | `detach_score` | `score_preservation_coef` | accuracy, paper's rule | accuracy, "
        "deployable rule | accuracy, logit only | TAPO `velocity_target` | preferred style | subject R@1 | subject R@10 |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for variant in VARIANTS:
        print(row(variant, [results[variant, seed] for seed in args.seeds]))


if __name__ == "__main__":
    main()
