# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
Where the processor time of a training step goes, by method, with the options of the recipes of the emoji world:

    python examples/emoji/make_pairs.py
    python -m benchmarks.speed.steps                       # all; or the names of some, then the picture of all that are there

Writes `steps.json` and `docs/assets/step_time.png`. Seconds are those of the process, on one thread, so that other programs on the
machine change them little.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import TrainerCallback

from tapo_trl import (
    DiffusionDPOTrainer,
    DiffusionNFTTrainer,
    FlowGRPOTrainer,
    OnlineDiffusionDPOTrainer,
    ReFLTrainer,
    SLRMModel,
    TAPOTrainer,
)
from tapo_trl.policies import load_policy
from tapo_trl.profiling import ROLLOUT_STAGES, StageTimer


HERE = Path(__file__).parent
RESULTS = HERE / "steps.json"
PICTURE = Path("docs/assets/step_time.png")
PROMPTS = 4  # of a step; pairs for Diffusion-DPO
PARTS = {"sampling": "#3b6fb6", "scoring": "#e0a030", "update": "#b04050"}


@dataclass
class ProcessTimer(StageTimer):
    """A timer of stages in seconds of the process."""

    def _now(self) -> float:
        return time.process_time()


class StepTimes(TrainerCallback):
    """Seconds of the parts of every step."""

    def __init__(self):
        self.timer = ProcessTimer(enabled=True)
        self.steps: list[dict[str, float]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.timer.stages.clear()
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        total, stages = time.process_time() - self.start, self.timer.stages
        scoring = stages["reward"].seconds if "reward" in stages else 0.0
        sampling = sum(stages[name].seconds for name in ROLLOUT_STAGES if name in stages) - scoring
        self.steps.append({"sampling": sampling, "scoring": scoring, "update": total - sampling - scoring})


TAPO = (TAPOTrainer, "tapo_tuned")
SETTINGS: dict[str, tuple[type, str, dict[str, Any]]] = {
    "TAPO": (*TAPO, {}),
    "SPO's pairs": (*TAPO, {"pairing": "spo", "pair_threshold": [0.0]}),
    "online DPO": (OnlineDiffusionDPOTrainer, "online_dpo", {}),
    "Flow-GRPO": (FlowGRPOTrainer, "grpo", {}),
    "DiffusionNFT": (DiffusionNFTTrainer, "nft", {}),
    "ReFL": (ReFLTrainer, "refl", {}),
    "Diffusion-DPO": (DiffusionDPOTrainer, "dpo", {}),
    "TAPO, n = 2": (*TAPO, {"num_sde_steps": 2}),
    "TAPO, n = 4": (*TAPO, {"num_sde_steps": 4}),
    "TAPO, n = 16": (*TAPO, {"num_sde_steps": 16}),
    "TAPO, P = 2": (*TAPO, {"num_candidates": 2}),
    "TAPO, P = 8": (*TAPO, {"num_candidates": 8}),
    "TAPO, 2 pairs per update": (*TAPO, {"pairs_per_update": 2}),
    "TAPO, train_cfg: false": (*TAPO, {"train_cfg": False}),
    "TAPO, both": (*TAPO, {"pairs_per_update": 2, "train_cfg": False}),
}


def measure(name: str, repeats: int) -> dict[str, float]:
    """
    Seconds of a step per prompt, by part.

    Args:
        name (`str`): one of [`SETTINGS`].
        repeats (`int`): steps after a first one, whose median counts.
    """
    trainer_class, recipe, options = SETTINGS[name]
    config = trainer_class.config_class
    known = {field.name for field in fields(config)}
    recipe = yaml.safe_load(Path(f"recipes/emoji/{recipe}.yaml").read_text(encoding="utf-8"))
    options = {key: value for key, value in recipe.items() if key in known} | options
    policy, times = load_policy("examples/emoji/pipeline"), StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        options |= {"output_dir": folder, "cache_dir": f"{folder}/cache", "max_steps": repeats + 1, "warmup_steps": 0}
        options |= {"per_device_train_batch_size": PROMPTS, "disable_tqdm": True}
        kwargs = {"callbacks": [times], "peft_config": LoraConfig(r=16, lora_alpha=16)}
        if trainer_class is DiffusionDPOTrainer:
            pairs = load_dataset("parquet", data_files="examples/emoji/pairs/train.parquet", split="train[:32]")
            trainer = trainer_class(policy, config(**options), pairs, **kwargs)
        else:
            options.pop("dataset_name")
            prompts = Path("examples/emoji/prompts/train.txt").read_text(encoding="utf-8").splitlines()
            reward = SLRMModel.from_policy(policy, max_sequence_length=1, resolution=64)
            dataset = Dataset.from_dict({"prompt": prompts[: PROMPTS * (repeats + 1)]})
            trainer = trainer_class(policy, reward, config(**options), dataset, **kwargs)
            trainer.timer = trainer.sampler.timer = times.timer
        trainer.train()
    return {part: statistics.median(step[part] for step in times.steps[1:]) / PROMPTS for part in PARTS}


def plot(results: dict[str, dict[str, float]], file: Path) -> None:
    """One stacked bar for each setting, with its seconds written on it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.36 * len(results) + 1.1), layout="constrained")
    axes = figure.subplots()
    names, totals = list(results), [sum(parts.values()) for parts in results.values()]
    left = [0.0] * len(names)
    for part, color in PARTS.items():
        values = [results[name][part] for name in names]
        axes.barh(names, values, left=left, color=color, label=part)
        for row, value in enumerate(values):
            if value > 0.05 * max(totals):
                axes.text(
                    left[row] + value / 2, row, f"{value:.2f}", ha="center", va="center", color="white", fontsize=8
                )
        left = [before + value for before, value in zip(left, values, strict=True)]
    for row, total in enumerate(totals):
        axes.text(total + 0.01 * max(totals), row, f"{total:.2f} s", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(totals))
    axes.set_xlabel("processor seconds of a step per prompt (Diffusion-DPO: per pair)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(file, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(SETTINGS), metavar="name", help=f"One of {list(SETTINGS)}.")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in args.names:
        results[name] = {part: round(value, 4) for part, value in measure(name, args.repeats).items()}
        print(name, results[name], flush=True)
        results = {name: results[name] for name in SETTINGS if name in results}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(results, PICTURE)


if __name__ == "__main__":
    main()
