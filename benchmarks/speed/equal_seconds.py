# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
What cheaper updates of TAPO are worth at the same processor seconds.

    python -m benchmarks.speed.equal_seconds mixture      # `pairs_per_update`; needs `python -m benchmarks.mixture.study pretrain`
    python -m benchmarks.speed.equal_seconds emoji        # and `train_cfg`; see the README for the reward models
    python -m benchmarks.speed.equal_seconds report

Every training is a line of `runs.jsonl`, and is not made again. Seconds are those of the process, without measuring.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig

from tapo_trl import SLRMModel, TAPOConfig, TAPOTrainer
from tapo_trl.callbacks import PolicyCallback
from tapo_trl.policies import FlowPolicy, load_policy


HERE = Path(__file__).parent
RUNS = HERE / "runs.jsonl"
SEEDS = (0, 1, 2)
NUM_POINTS = 8


@dataclass(frozen=True)
class Run:
    """
    A training.

    Args:
        world (`str`): `"mixture"` or `"emoji"`.
        options (`dict`): what differs from the usual update.
        rate (`float`): the learning rate, as a multiple of the usual one.
        seed (`int`): of the training, and of the reward model if there is one.
        seconds (`float`): of the processor.
    """

    world: str
    options: dict[str, Any] = field(hash=False)
    rate: float
    seed: int
    seconds: float

    @property
    def key(self) -> str:
        return json.dumps(asdict(self))


class CurveInSeconds(PolicyCallback):
    """
    Measures the policy at the start and after every share of the seconds, without counting what that costs, and ends the
    training.

    Args:
        seconds (`float`): of the training.
        num_points (`int`): points after the first one.
        judge (`Callable`): `trainer -> {name: value}`.
    """

    def __init__(self, seconds: float, num_points: int, judge: Callable[[TAPOTrainer], dict[str, float]]):
        super().__init__()
        self.due = [seconds * point / num_points for point in range(num_points + 1)]
        self.judge, self.points, self.spent = judge, [], 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()
        self.measure(state.global_step, 0.0)

    def on_step_end(self, args, state, control, **kwargs):
        seconds = time.process_time() - self.start - self.spent
        if seconds >= self.due[len(self.points)]:
            self.measure(state.global_step, seconds)
        control.should_training_stop = len(self.points) == len(self.due)

    @torch.no_grad()
    def measure(self, step: int, seconds: float) -> None:
        begin = time.process_time()
        values = {"step": step, "seconds": seconds} | self.judge(self.trainer)
        self.points.append({name: round(value, 4) for name, value in values.items()})
        self.spent += time.process_time() - begin


# The worlds


def train(
    policy: FlowPolicy, reward: Any, prompts: list[str], curve: CurveInSeconds, rank: int, options: dict[str, Any]
) -> list[dict[str, float]]:
    """A training with TAPO until the curve ends it."""
    common = {"max_sequence_length": 1, "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    common |= {"disable_tqdm": True, "activation_checkpointing": False, "lr_scheduler_type": "constant_with_warmup"}
    common |= {"max_steps": 100_000, "logging_steps": 50, "step_weighting": "velocity", "num_candidates": 4}
    with tempfile.TemporaryDirectory() as folder:
        args = TAPOConfig(folder, cache_dir=f"{folder}/cache", **common | options)
        dataset, lora = Dataset.from_dict({"prompt": prompts}), LoraConfig(r=rank, lora_alpha=rank)
        TAPOTrainer(policy, reward, args, dataset, callbacks=[curve], peft_config=lora).train()
    if len(curve.points) < len(curve.due):
        raise SystemExit("The training was stopped: nothing of it is kept.")
    return curve.points


def train_on_mixture(run: Run, work: Path) -> list[dict[str, float]]:
    """With the true reward, and beta and learning rate of the search of `benchmarks/mixture`."""
    from ..mixture.study import sample, true_reward
    from ..mixture.world import PROMPTS, load

    mixture, policy = load(work / "base")
    labels = torch.arange(256) % len(PROMPTS)
    embeds = policy.encode_prompts(PROMPTS, max_sequence_length=1)[labels]

    def judge(trainer: TAPOTrainer) -> dict[str, float]:
        samples = sample(policy, trainer.accelerator.unwrap_model(trainer.model), embeds, seed=1)
        judged = mixture.judge(samples, labels)
        return {name: judged[name].mean().item() for name in ("reward", "style", "excess")}

    curve = CurveInSeconds(run.seconds, NUM_POINTS, judge)
    options = {
        "height": 8,
        "width": 8,
        "num_inference_steps": 10,
        "num_sde_steps": 4,
        "t_init": 0,
        "guidance_scale": 1.0,
    }
    options |= {"beta": 10.0, "learning_rate": 1e-3 * run.rate, "warmup_steps": 5, "seed": run.seed}
    options |= {"per_device_train_batch_size": 8, "transition_batch_size": 128}
    return train(policy, true_reward(mixture), PROMPTS, curve, 16, options | run.options)


def train_on_emoji(run: Run, work: Path) -> list[dict[str, float]]:
    """With an SLRM and the options of `recipes/emoji/tapo_tuned.yaml`."""
    from tapo_trl.reproduction.world import load_world

    world = load_world("emoji")
    policy = load_policy("examples/emoji/pipeline")
    reward = SLRMModel.from_pretrained(str(work / f"slrm-{run.seed}"))
    held_out = Path(world.prompts["test"]).read_text(encoding="utf-8").splitlines()
    prompts = Path("examples/emoji/prompts/train.txt").read_text(encoding="utf-8").splitlines()
    embeds = policy.encode_prompts([*held_out, ""], 1)

    def judge(trainer: TAPOTrainer) -> dict[str, float]:
        images = []
        for rows in torch.arange(len(held_out)).split(48):
            latents = policy.sample(
                trainer.accelerator.unwrap_model(trainer.model),
                embeds[rows],
                embeds[len(held_out) :],
                latent_shape=trainer.latent_shape,
                num_inference_steps=20,
                guidance_scale=1.5,
                generators=[torch.Generator().manual_seed(row) for row in rows.tolist()],
            )
            images.append(policy.decode(latents))
        return {name: values.mean().item() for name, values in world.judge(torch.cat(images), held_out).items()}

    curve = CurveInSeconds(run.seconds, 1, judge)
    options = {"height": 64, "width": 64, "num_inference_steps": 20, "num_sde_steps": 8, "guidance_scale": 1.5}
    options |= {"beta": 200.0, "learning_rate": 4e-3 * run.rate, "warmup_steps": 3, "seed": run.seed}
    options |= {"per_device_train_batch_size": 6, "transition_batch_size": 48, "velocity_target": "parent"}
    return train(policy, reward, prompts, curve, 16, options | run.options)


ALL = {}
WORLDS = {
    "mixture": (
        train_on_mixture,
        [
            Run("mixture", options, rate, seed, 8.0)
            for seed, rate, options in product(
                SEEDS, (1.0, 2.0), ({"pairs_per_update": 1}, {"pairs_per_update": 2}, ALL)
            )
        ],
    ),
    "emoji": (
        train_on_emoji,
        [Run("emoji", options, 1.0, seed, 60.0) for seed, options in product(SEEDS, (ALL, {"train_cfg": False}))],
    ),
}


def read_runs() -> dict[str, dict[str, Any]]:
    """All trainings that were made, by their key."""
    lines = RUNS.read_text(encoding="utf-8").splitlines() if RUNS.exists() else []
    return {json.dumps(row["run"]): row for row in map(json.loads, lines)}


def make(world: str, work: Path, seeds: list[int]) -> None:
    """Make the trainings that are missing, one after the other."""
    program, runs = WORLDS[world]
    for run in runs:
        if run.seed not in seeds or run.key in read_runs():
            continue
        row = {"run": asdict(run), "curve": program(run, work)}
        with RUNS.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        print(run, row["curve"][-1], flush=True)


def groups(world: str) -> Iterator[tuple[str, float, list[list[dict[str, float]]]]]:
    """The curves of all seeds, by options and learning rate."""
    rows = [row for row in read_runs().values() if row["run"]["world"] == world]
    for key in dict.fromkeys((json.dumps(row["run"]["options"]), row["run"]["rate"]) for row in rows):
        same = [row for row in rows if (json.dumps(row["run"]["options"]), row["run"]["rate"]) == key]
        options = ", ".join(f"{name}: {value}" for name, value in json.loads(key[0]).items())
        yield options or "all pairs", key[1], [row["curve"] for row in same]


def report(world: str) -> str:
    """Mean and standard deviation over seeds at every point, in Markdown."""
    name = {"mixture": "reward", "emoji": "both"}[world]
    found = list(groups(world))
    if not found:
        return ""
    seconds = [round(point["seconds"]) for point in found[0][2][0]]
    lines = [f"| {world}: {name} | rate | steps | " + " | ".join(f"{second} s" for second in seconds) + " |"]
    lines.append("|---" * (3 + len(seconds)) + "|")
    for options, rate, curves in found:
        points = [[curve[index][name] for curve in curves] for index in range(len(seconds))]
        cells = [f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if values[1:] else "") for values in points]
        steps = mean(curve[-1]["step"] for curve in curves)
        lines.append(f"| {options} | x{rate:g} | {steps:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=[*WORLDS, "report"])
    parser.add_argument("--work_dir", help="Folder with the base and the reward models.", type=Path)
    parser.add_argument("--seeds", help="Those of the trainings to make.", type=int, nargs="+", default=list(SEEDS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "report":
        print("\n\n".join(filter(None, map(report, WORLDS))))
    else:
        make(args.command, args.work_dir or Path("runs") / args.command, args.seeds)


if __name__ == "__main__":
    main()
