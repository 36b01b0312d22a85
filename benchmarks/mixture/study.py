# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
Trainings on the mixture: learning curves of every method, with beta and learning rate searched by the same number of trials.

    python -m benchmarks.mixture.study pretrain
    python -m benchmarks.mixture.study search TAPO "SPO's pairs"      # or all methods, without names
    python -m benchmarks.mixture.study seeds --seeds 10
    python -m benchmarks.mixture.report

Every training is a line of `runs.jsonl`: its method, options, seed, and its curve. A line that is there is not made again.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig

from tapo_trl import SLRMConfig, SLRMModel, SLRMTrainer
from tapo_trl.callbacks import PolicyCallback
from tapo_trl.policies import PromptEmbeddings

from ..reproduction.forward_counter import ForwardCounter
from .methods import METHODS, RATES, REWARDS, SECOND_ROUND
from .world import PROMPTS, Mixture, MixturePolicy, load, pretrain


HERE = Path(__file__).parent
RUNS = HERE / "runs.jsonl"
CHANNELS = 2
NUM_STEPS = 10  # of sampling
PROMPTS_PER_UPDATE = 8
NUM_LABELS = 2000
"""Of preference pairs."""
BUDGET = 40_000
"""Rows through the policy's network, a backward as two."""
NUM_TRIALS = 16
"""Trainings that beta (or epsilon) and learning rate of a method are searched with, at most."""
NUM_FINALISTS = 3
SEARCH_SEEDS = (0, 1, 2)
"""Of the trials, only the best are made with more than the first."""
SHOWN = ("step", "seconds", "reward", "style", "accuracy", "excess", "slrm", "distance")
NUM_POINTS = 6
"""Points of a learning curve."""


@dataclass(frozen=True)
class Run:
    """A training. `beta` is the value of what the method searches, see [`Method`]."""

    method: str
    beta: float
    learning_rate: float
    seed: int
    budget: int = field(default_factory=lambda: BUDGET)

    @property
    def key(self) -> str:
        return json.dumps([self.method, self.beta, self.learning_rate, self.seed, self.budget])


def sample(policy: MixturePolicy, network, embeds: PromptEmbeddings, seed: int) -> torch.Tensor:
    """Samples of the ODE from noise that depends on the seed and the place alone."""
    return policy.sample(
        network,
        embeds,
        latent_shape=policy.latent_shape(None, None),
        num_inference_steps=NUM_STEPS,
        guidance_scale=1.0,
        generators=[torch.Generator().manual_seed(1_000_000 * (seed + 1) + row) for row in range(len(embeds))],
    )


def preference_pairs(
    mixture: Mixture,
    policy: MixturePolicy,
    num_pairs: int,
    seed: int,
    true_labels: bool = False,
    network: torch.nn.Module | None = None,
) -> Dataset:
    """
    Pairs of samples of a prompt, one in four with a sample of another prompt, and labels.

    Args:
        mixture ([`Mixture`]): the world.
        policy ([`MixturePolicy`]): its policy.
        num_pairs (`int`): how many.
        seed (`int`): of prompts, noise and labels.
        true_labels (`bool`, *optional*, defaults to `False`): whether the true reward decides. Otherwise labels are drawn by Bradley-Terry.
        network (`torch.nn.Module`, *optional*): makes the samples. The base by default.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(PROMPTS), (num_pairs,), generator=generator)
    others = torch.where(torch.rand(num_pairs, generator=generator) < 0.25, labels.roll(1), labels)
    embeds = policy.encode_prompts(PROMPTS, max_sequence_length=1)[torch.cat([labels, others])]
    first, second = sample(policy, network or policy.transformer, embeds, seed + 100).chunk(2)
    margins = mixture.judge(first, labels)["reward"] - mixture.judge(second, labels)["reward"]
    wins = margins > 0 if true_labels else torch.rand(num_pairs, generator=generator) < (4 * margins).sigmoid()
    wins = wins.view(-1, 1, 1, 1)
    return Dataset.from_dict(
        {
            "prompt": [PROMPTS[label] for label in labels.tolist()],
            "chosen": torch.where(wins, first, second).numpy(),
            "rejected": torch.where(wins, second, first).numpy(),
        }
    )


COMMON = {
    "max_sequence_length": 1,
    "height": 8,
    "width": 8,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "activation_checkpointing": False,
}


def train_reward(
    policy: MixturePolicy, pairs: Dataset, folder: Path, seed: int, num_steps: int = 150, **options
) -> None:
    """An SLRM, with its default options where there are no others."""
    args = SLRMConfig(
        output_dir=str(folder),
        cache_dir=str(folder / "cache"),
        per_device_train_batch_size=64,
        max_steps=num_steps,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        eval_strategy="no",
        logging_steps=50,
        seed=seed,
        **COMMON,
        **options,
    )
    trainer = SLRMTrainer(policy, args, train_dataset=pairs)
    trainer.train()
    trainer.save_model()
    shutil.rmtree(folder / "cache")


def true_reward(mixture: Mixture) -> Callable[[torch.Tensor, list[str]], torch.Tensor]:
    """The true reward as a function of samples and prompts."""

    def reward(samples: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return mixture.judge(samples, torch.tensor([PROMPTS.index(prompt) for prompt in prompts]))["reward"]

    return reward


def score_of_estimates(slrm: SLRMModel, policy: MixturePolicy) -> Callable[[torch.Tensor, list[str]], torch.Tensor]:
    """The reward model as a function of clean samples and prompts. Online trainers call it with one-step estimates."""
    embeds = policy.encode_prompts(PROMPTS, max_sequence_length=1)

    def reward(samples: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        of_samples = embeds[torch.tensor([PROMPTS.index(prompt) for prompt in prompts])]
        return slrm.score(samples, 0.0, **of_samples.tensors)

    return reward


class Curve(PolicyCallback):
    """Records how good the policy is at the start and after every share of the budget, without counting its own cost."""

    def __init__(
        self,
        mixture: Mixture,
        policy: MixturePolicy,
        reward: SLRMModel,
        counter: ForwardCounter,
        budget: int,
        split: int,
    ):
        super().__init__()
        self.mixture, self.reward, self.counter, self.split = mixture, reward, counter, split
        self.labels = torch.arange(256) % len(PROMPTS)
        self.embeds = policy.encode_prompts(PROMPTS, max_sequence_length=1)[self.labels]
        self.due = [budget * point / NUM_POINTS for point in range(NUM_POINTS + 1)]
        self.points: list[dict[str, float]] = []
        self.spent = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()
        self.measure(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self.counter.policy_forwards >= self.due[len(self.points)]:
            self.measure(state.global_step)
        control.should_training_stop = len(self.points) > NUM_POINTS

    def measure(self, step: int) -> None:
        begin = time.process_time()
        with self.counter.paused(), torch.no_grad():
            self.points.append(self.point(step, begin - self.start - self.spent))
        self.spent += time.process_time() - begin

    def point(self, step: int, seconds: float) -> dict[str, float]:
        forwards, trainer, policy = self.counter.policy_forwards, self.trainer, self.trainer.policy
        labels, embeds = self.labels, self.embeds
        model = trainer.accelerator.unwrap_model(trainer.model)
        samples = sample(policy, model, embeds, seed=self.split)
        judged = self.mixture.judge(samples, labels)
        point = {"step": step, "forwards": forwards, "seconds": seconds}
        point |= {name: values.mean().item() for name, values in judged.items()}
        point["slrm"] = self.reward.score(samples, 0.0, **embeds.tensors).mean().item()
        point["diversity"] = (
            torch.stack([samples[labels == label].var(0).mean() for label in range(len(PROMPTS))]).mean().item()
        )
        point["distance"] = self.distance(policy, model, samples, embeds)
        return {name: round(value, 5) for name, value in point.items()}

    def distance(self, policy, model, samples, embeds) -> float:
        """Mean square of the change of the velocity at noised samples of the policy itself."""
        generator = torch.Generator().manual_seed(7)
        sigma = torch.rand(len(samples), generator=generator)
        level = sigma.view(-1, 1, 1, 1)
        noisy = (1 - level) * samples + level * torch.randn(samples.shape, generator=generator)
        velocity = policy.velocity(model, noisy, sigma, embeds)
        with model.disable_adapter():
            return (velocity - policy.velocity(model, noisy, sigma, embeds)).square().mean().item()


class _NewPairs(PolicyCallback):
    """Makes preference pairs of the policy's samples when its training ends."""

    def __init__(self, mixture: Mixture, seed: int):
        super().__init__()
        self.mixture, self.seed = mixture, seed

    def on_train_end(self, args, state, control, **kwargs):
        network = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with torch.no_grad():
            self.pairs = preference_pairs(
                self.mixture, self.trainer.policy, NUM_LABELS // 2, self.seed, network=network
            )


def reward_folder(name: str, work: Path, seed: int) -> Path:
    """The folder of a reward model. It is trained if it is not there."""
    folder = work / f"{name}-{seed}"
    if not folder.exists():
        mixture, policy = load(work / "base")
        if name == SECOND_ROUND:
            made = _NewPairs(mixture, seed + 50)
            train(replace(best("TAPO"), seed=seed), work, split=0, callbacks=[made])
            first = preference_pairs(mixture, policy, NUM_LABELS // 2, seed)
            pairs = concatenate_datasets([first, made.pairs])
        else:
            pairs = preference_pairs(mixture, policy, NUM_LABELS, seed)
        train_reward(policy, pairs, folder, seed, **REWARDS.get(name, {}))
    return folder


def train(run: Run, work: Path, split: int, callbacks: Sequence[PolicyCallback] = ()) -> list[dict[str, float]]:
    """
    A training, and its learning curve.

    Args:
        run ([`Run`]): what to train.
        work (`Path`): folder with the base and the reward models.
        split (`int`): whose noise is judged: 0 for `validation`, by which options are chosen, 1 for `test`.
        callbacks (`Sequence`, *optional*): what else looks on, without changing the policy. Their `counter` is set, to be paused.
    """
    mixture, policy = load(work / "base")
    method = METHODS[run.method]
    reward = SLRMModel.from_pretrained(str(reward_folder(method.reward, work, run.seed)))
    counter = ForwardCounter()
    for callback in callbacks:
        callback.counter = counter
    curve = Curve(mixture, policy, reward, counter, run.budget, split)
    with tempfile.TemporaryDirectory() as folder:
        options = COMMON | {
            "output_dir": folder,
            "cache_dir": f"{folder}/cache",
            method.searched: run.beta,
            "learning_rate": run.learning_rate,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 5,
            "max_steps": 100_000,
            "num_inference_steps": NUM_STEPS,
            "logging_steps": 50,
            "seed": run.seed,
        }
        options |= method.options
        kwargs = {"callbacks": [curve, *callbacks], "peft_config": LoraConfig(r=16, lora_alpha=16)}
        if method.is_online:
            options |= {
                "guidance_scale": 1.0,
                "per_device_train_batch_size": PROMPTS_PER_UPDATE,
                "transition_batch_size": 128,
            }
            prompts = Dataset.from_dict({"prompt": PROMPTS})
            signal = reward
            if method.learns_from == "estimates":
                signal = score_of_estimates(reward, policy)
            elif method.learns_from == "truth":
                signal = true_reward(mixture)
            trainer = method.trainer(policy, signal, method.config(**options), prompts, **kwargs)
        else:
            pairs = preference_pairs(mixture, policy, NUM_LABELS, run.seed, true_labels=method.learns_from == "truth")
            options |= {"per_device_train_batch_size": 64, "eval_strategy": "no"}
            trainer = method.trainer(policy, method.config(**options), pairs, **kwargs)
        counter.watch(trainer)
        trainer.train()
    if len(curve.points) <= NUM_POINTS:  # a signal has ended it
        raise SystemExit(f"{run.key} was stopped at {counter.policy_forwards} rows and is not recorded.")
    return curve.points


def read_runs() -> dict[str, dict[str, Any]]:
    """All trainings that were made, by their key."""
    lines = RUNS.read_text(encoding="utf-8").splitlines() if RUNS.exists() else []
    return {row["key"]: row for row in map(json.loads, lines)}


def make(runs: list[Run], work: Path, split: int) -> None:
    """Make the trainings that are missing, one after the other."""
    for run in runs:
        key = f"{run.key} {('validation', 'test')[split]}"
        if key in read_runs():
            continue
        try:
            curve, error = train(run, work, split), None
        except RuntimeError as failure:  # a run that leaves the numbers is a result, too
            curve, error = [], str(failure)
        row = {"key": key, "method": run.method, "beta": run.beta, "learning_rate": run.learning_rate}
        row |= {"seed": run.seed, "budget": run.budget, "error": error, "curve": curve}
        with RUNS.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row, separators=(",", ":")) + "\n")
        shown = {name: curve[-1][name] for name in SHOWN} if curve else error
        print(run.method, run.beta, run.learning_rate, run.seed, shown, flush=True)


def grid(name: str) -> list[Run]:
    """The trials that a method begins with, one seed."""
    method = METHODS[name]
    return [Run(name, beta, rate, seed=0) for beta, rate in product(method.values, method.rates)]


def tried(name: str) -> list[tuple[Run, dict[str, Any]]]:
    """All trials of a method that were made, judged on `validation`."""
    rows = [row for row in read_runs().values() if row["method"] == name and row["key"].endswith("validation")]
    return [(Run(name, row["beta"], row["learning_rate"], row["seed"], row["budget"]), row) for row in rows]


def end(row: dict[str, Any]) -> float:
    """True reward at the end of a training."""
    return row["curve"][-1]["reward"] if row["curve"] else float("-inf")


def ranking(name: str) -> list[Run]:
    """
    The trials of a method with its first seed. First come those that were made with the most seeds, by their mean true reward at the
    end.
    """
    ends: dict[tuple[float, float], dict[int, float]] = {}
    for run, row in tried(name):
        ends.setdefault((run.beta, run.learning_rate), {})[run.seed] = end(row)
    if not ends:
        raise SystemExit(f"{name} has not been searched: `python -m benchmarks.mixture.study search`.")
    ordered = sorted(ends, key=lambda options: (len(ends[options]), mean(ends[options].values())), reverse=True)
    return [Run(name, beta, rate, seed=0) for beta, rate in ordered]


def best(name: str) -> Run:
    """The options that the final trainings have."""
    return ranking(name)[0]


def next_trial(name: str) -> Run | None:
    """A trial beside the best one: the next learning rate of [`RATES`], or another beta by a factor of 4."""
    made, known = ranking(name)[0], {run.key for run, _ in tried(name)}
    place = RATES.index(made.learning_rate)
    beside = [replace(made, learning_rate=rate) for rate in (*RATES[place + 1 : place + 2], RATES[place - 1])]
    beside += [replace(made, beta=float(f"{made.beta * factor:.3g}")) for factor in (4, 1 / 4) if made.beta]
    return next((run for run in beside if run.key not in known), None)


def search(name: str, work: Path) -> None:
    """
    Make the grid, then trials beside the best, up to [`NUM_TRIALS`] or until all neighbours of the best are known; then the best of
    them with other seeds.
    """
    make(grid(name), work, split=0)
    while len(ranking(name)) < NUM_TRIALS and (run := next_trial(name)) is not None:
        make([run], work, split=0)
    make(
        [replace(run, seed=seed) for run in ranking(name)[:NUM_FINALISTS] for seed in SEARCH_SEEDS[1:]], work, split=0
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["pretrain", "search", "seeds"])
    parser.add_argument("methods", nargs="*", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=10, help="Seeds of reward models and of the final trainings.")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/mixture"), help="Base and reward models.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "pretrain":
        if not (args.work_dir / "base").exists():
            pretrain(CHANNELS, args.work_dir / "base")
        for seed in range(args.seeds):
            reward_folder("slrm", args.work_dir, seed)
    for name in args.methods if args.command == "search" else []:
        search(name, args.work_dir)
    for name in args.methods if args.command == "seeds" else []:
        make([replace(best(name), seed=seed) for seed in range(args.seeds)], args.work_dir, split=1)


if __name__ == "__main__":
    main()
