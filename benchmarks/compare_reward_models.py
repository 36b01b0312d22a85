# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
How well does each kind of reward model order noisy images, and what does it cost? Measured on the emoji world.

    python examples/emoji/make_pairs.py
    python benchmarks/compare_reward_models.py

All are trained on the same pairs with the same steps and batch; each has the best of the same learning rates, by its mean
accuracy under a rule that can be used while sampling, on the pairs of the `validation` split. What is finished is kept in
`runs/rewards`, so the script can be interrupted. Prints the table of docs/rewards.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import TrainerCallback

from tapo_trl import SLRMTrainer, load_policy, load_reward_model
from tapo_trl.metrics import evaluate_preference_accuracy
from tapo_trl.scripts.slrm import make_parser
from tapo_trl.scripts.utils import load_preference_splits


SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
BASE = "examples/emoji/pipeline"
VARIANTS = {  # recipe and options
    "slrm-reference": ("slrm", {"velocity_target": "reference"}),
    "lrm": ("slrm_lrm", {}),
    "dina": ("slrm_dina", {}),
    "spm": ("slrm_spm", {}),
    "lrm-not-enhanced": ("slrm_lrm", {"lrm_guidance_scale": 1.0}),
    "slrm-ground_truth": ("slrm", {"velocity_target": "ground_truth"}),
    "slrm-none": ("slrm", {"velocity_target": "none", "score_preservation_coef": 0.0}),
    "dina-bradley_terry": ("slrm_dina", {"loss_type": "bradley_terry"}),
    "spm-frozen": ("slrm_spm", {"freeze_backbone": True}),
    # train_clip.py --splits train validation test --output_dir runs/emoji/clip_all
    "spm-all_captions": ("slrm_spm", {"spm_clip_model": "runs/emoji/clip_all"}),
}


def train(variant: str, learning_rate: float, seed: int, folder: Path) -> None:
    options = train_options(variant, learning_rate=learning_rate, seed=seed, output_dir=folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w") as log:
        command = [sys.executable, "-m", "tapo_trl.cli", "slrm", *options]
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)


class Stopwatch(TrainerCallback):
    """Seconds of processor time of each step, which other work on the machine hardly changes."""

    def __init__(self):
        self.seconds, self.start = [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.start)


@torch.no_grad()
def fastest(function: Callable[[], torch.Tensor], rounds: int = 10) -> float:
    """Seconds of processor time of the fastest call."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return min(seconds)


def train_options(variant: str, **options) -> list[str]:
    recipe, own = VARIANTS[variant]
    flags = [part for name, value in (own | options).items() for part in (f"--{name}", str(value))]
    return ["--config", f"recipes/emoji/{recipe}.yaml", *flags]


def measure_cost(variant: str, root: Path, policy) -> dict:
    """
    Seconds of one thread: of a training step, of a score and of a velocity of the base model; the fastest of some rounds. The
    score of a model that reads images counts the decoding; the velocity that some scores need is not counted.
    """
    result = root / f"{variant}-cost.json"
    if not result.exists():
        with tempfile.TemporaryDirectory() as folder:
            options = train_options(variant, max_steps=6, output_dir=folder, disable_tqdm=True)
            script_args, training_args, _ = make_parser().parse_args_and_config(options)
            pairs, _ = load_preference_splits(script_args)
            stopwatch = Stopwatch()
            trainer = SLRMTrainer(policy, training_args, train_dataset=pairs, callbacks=[stopwatch])
            trainer.train()
        model, prompts = trainer.model.eval(), ["cat"] * 16
        embeds = policy.encode_prompts(prompts, training_args.max_sequence_length)
        latents = torch.randn(16, *policy.latent_shape(64, 64))

        def score() -> torch.Tensor:
            if model.scores_x0_prediction:
                return model.score(policy.decode(latents), 0.5, prompts)
            return model.score(latents, 0.5, embeds.prompt_embeds, embeds.pooled_prompt_embeds)

        cost = {
            "step": min(stopwatch.seconds),
            "score": fastest(score) / 16,
            "velocity": fastest(lambda: policy.velocity(policy.transformer, latents, 0.5, embeds)) / 16,
        }
        result.write_text(json.dumps(cost))
    return json.loads(result.read_text())


def measure(variant: str, learning_rate: float, seed: int, root: Path, policy, pairs) -> dict:
    """Trains, unless that was done, and measures on `pairs`."""
    folder = root / f"{variant}-lr{learning_rate:g}-seed{seed}"
    result = folder / "validation.json"
    if not result.exists():
        train(variant, learning_rate, seed, folder)
        model = load_reward_model(folder)
        rules = ("ground_truth", "reference", "none") if model.uses_velocity_target else ("none",)
        accuracy = evaluate_preference_accuracy(
            model, policy, pairs, SIGMAS, rules, resolution=64, batch_size=64, cache_dir="runs/emoji/cache"
        )
        parameters = sum(parameter.numel() for parameter in model.parameters())
        metrics = {"accuracy": accuracy, "rule": deployable_rule(model), "parameters": parameters}
        result.write_text(json.dumps(metrics, indent=2))
    return json.loads(result.read_text())


def deployable_rule(model: torch.nn.Module) -> str:
    """How a rollout can score: with the base model's velocity where the model compares one, else by the logit alone."""
    return "reference" if model.uses_velocity_target and model.config.velocity_target != "none" else "none"


def mean_accuracy(metrics: dict, rule: str | None = None) -> float:
    return statistics.mean(metrics["accuracy"][rule or metrics["rule"]].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants", nargs="+", default=["slrm-reference", "lrm", "dina", "spm"], choices=list(VARIANTS)
    )
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/rewards"))
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

    policy = load_policy(BASE)
    pairs = load_dataset("parquet", data_files="examples/emoji/pairs/validation.parquet", split="train")
    levels = " | ".join(f"sigma {sigma}" for sigma in SIGMAS)
    print(f"{len(pairs)} pairs of the `validation` split.\n")
    print(
        f"| reward model | parameters | learning rate (mean of each) | {levels} | mean | s per step | ms per score |"
    )
    print("|---" * (7 + len(SIGMAS)) + "|")
    for variant in args.variants:
        by_rate = {
            rate: measure(variant, rate, args.seed, args.output_dir, policy, pairs) for rate in args.learning_rates
        }
        best = max(by_rate, key=lambda rate: mean_accuracy(by_rate[rate]))
        metrics, cost = by_rate[best], measure_cost(variant, args.output_dir, policy)
        tried = ", ".join(f"{rate:g}: {mean_accuracy(values):.3f}" for rate, values in by_rate.items())
        cells = [
            variant,
            f"{metrics['parameters'] / 1e6:.2f} M",
            f"{best:g} ({tried})",
            *(f"{metrics['accuracy'][metrics['rule']][str(sigma)]:.3f}" for sigma in SIGMAS),
            f"{mean_accuracy(metrics):.3f}",
            f"{cost['step']:.2f}",
            f"{1000 * cost['score']:.1f}",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
