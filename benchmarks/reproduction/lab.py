# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The trainings that experiments are made of, on one footing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .runs import BASE_COMMAND, PROMPTS_COMMAND, REWARD_COMMAND, SAMPLES_PER_PROMPT, Run, RunQueue
from .statistics import Estimate, estimate
from .world import World


@dataclass(frozen=True)
class Method:
    """
    A way to align a policy.

    Args:
        command (`str`): of `tapo-trl`.
        options (`Mapping[str, Any]`): what makes it this method.
        reward (`str`, *optional*): name of a reward in [`REWARDS`], for those that learn from one.
        hard_prompts (`bool`, *optional*, defaults to `False`):
            Whether it learns from the half of the prompts alone for which the base has the least reward.
    """

    command: str
    options: Mapping[str, Any] = field(default_factory=dict)
    reward: str | None = None
    hard_prompts: bool = False


REWARDS: dict[str, tuple[str, dict[str, Any]]] = {  # recipe and options
    "SLRM": ("slrm", {}),
    "SLRM with the paper's loss (no score preservation)": ("slrm", {"score_preservation_coef": 0.0}),
    "SLRM without score enhancement": ("slrm", {"velocity_target": "none", "score_preservation_coef": 0.0}),
    "SLRM trained with the inference-time target": ("slrm", {"velocity_target": "reference"}),
    "SLRM, 20 steps": ("slrm", {"max_steps": 20}),
    "LRM": ("slrm_lrm", {}),
    "DiNa-LRM": ("slrm_dina", {}),
    "SPM": ("slrm_spm", {}),
    "SLRM without task tokens": ("slrm", {"num_task_tokens": 0}),
    "SLRM without task tokens, trained with the inference-time target": (
        "slrm",
        {"num_task_tokens": 0, "velocity_target": "reference"},
    ),
    "SLRM, additive enhancement": ("slrm", {"enhancement": "additive"}),
    "SLRM, additive enhancement, trained with the inference-time target": (
        "slrm",
        {"enhancement": "additive", "velocity_target": "reference"},
    ),
    "SLRM trained at t = 0 only": ("slrm", {"timestep_sampling": "clean"}),
}

CURVE_STEPS, CURVE_EVERY = 160, 40
"""Steps of the trainings whose accuracy is followed, and how often it is measured."""

MAX_RATES = 6
"""Learning rates that are tried for a method at most."""

TAPO = Method("tapo", {"pairing": "tapo"}, "SLRM")

METHODS: dict[str, Method] = {
    "Diffusion-DPO": Method("dpo", {"variant": "diffusion_dpo"}),
    "Inversion-DPO": Method("dpo", {"variant": "inversion_dpo"}),
    "DenseReward": Method("dpo", {"variant": "dense_reward"}),
    "Online Diffusion-DPO": Method("online_dpo", {"num_generations": 4, "num_noise_levels": 4}, "SLRM"),
    "Flow-GRPO on 2 of 10 steps": Method(
        "grpo", {"num_inference_steps": 10, "num_sde_steps": 2, "num_generations": 8}, "SLRM"
    ),
    "SPO": Method("tapo", {"pairing": "spo", "num_sde_steps": 16, "beta": 10.0, "ratio_clip": 0.1}, "SLRM"),
    "SPO with its own reward, SPM": Method(
        "tapo", {"pairing": "spo", "num_sde_steps": 16, "beta": 10.0, "ratio_clip": 0.1}, "SPM"
    ),
    "LPO": Method("tapo", {"pairing": "lpo", "num_sde_steps": 19, "beta": 500.0, "ratio_clip": 0.1}, "SLRM"),
    "LPO with its own reward, LRM": Method(
        "tapo", {"pairing": "lpo", "num_sde_steps": 19, "beta": 500.0, "ratio_clip": 0.1}, "LRM"
    ),
    "TAPO": TAPO,
}


@dataclass
class Lab:
    """
    Makes runs for experiments.

    Args:
        queue ([`RunQueue`]): where they are made.
        seeds (`Sequence[int]`): seeds of every reported number. A reward model has the seed of the policy it trains.
        samples_per_prompt (`int`, *optional*, defaults to `2`): samples of each held-out prompt that are judged.
    """

    queue: RunQueue
    seeds: Sequence[int]
    samples_per_prompt: int = SAMPLES_PER_PROMPT

    @property
    def world(self) -> World:
        return self.queue.world

    def reward(self, name: str, seed: int) -> Run:
        """The training of a reward model."""
        recipe, options = REWARDS[name]
        return Run(REWARD_COMMAND, _slug(name), self.world.recipes[recipe], options, seed)

    def reward_curve(self, name: str, seed: int) -> Run:
        """The same for longer, with checkpoints that are measured, too."""
        options = {
            "max_steps": CURVE_STEPS,
            "save_strategy": "steps",
            "save_steps": CURVE_EVERY,
            "save_only_model": True,
        }
        return self.reward(name, seed).with_options(f"{_slug(name)}-curve", **options)

    def base(self, reward: str | None, seed: int) -> Run:
        """The base model, rated by a reward model, too, if there is one."""
        options = {"reward_model": None if reward is None else self.reward(reward, seed)}
        return self._run(BASE_COMMAND, "base", "tapo", options, seed)

    def hard_prompts(self, reward: str, seed: int) -> Run:
        """The prompts for which the base has the least reward."""
        options = {"reward_model": self.reward(reward, seed)}
        return self._run(PROMPTS_COMMAND, "hard-prompts", "tapo", options, seed)

    def policy(self, name: str, method: Method, seed: int, **options) -> Run:
        """The training of a policy, with the world's size and further options."""
        world = self.world
        common = {
            "num_inference_steps": world.num_inference_steps,
            "guidance_scale": world.guidance_scale,
            "sample_every_steps": None,
            "max_steps": world.num_steps,
        }
        if method.reward is not None:
            common |= {
                "reward_model": self.reward(method.reward, seed),
                "eval_dataset_name": None,
                "per_device_train_batch_size": world.prompts_per_step,
                "transition_batch_size": None,
            }
        if method.hard_prompts:
            common["dataset_name"] = self.hard_prompts(method.reward, seed)
        if method.command == "tapo":
            common |= {"num_sde_steps": 8, "num_candidates": 4, "step_weighting": "none", "beta": 1000.0}
            common |= {"velocity_target": _rollout_target(method.reward)}
        merged = {**common, **method.options, **options}
        if method.command == "tapo":
            merged["transition_batch_size"] = world.prompts_per_step * merged["num_sde_steps"]
        return self._run(method.command, _slug(name), method.command, merged, seed)

    def _run(self, command: str, label: str, recipe: str, options: Mapping[str, Any], seed: int) -> Run:
        recipe = self.world.recipes[recipe]
        return Run(command, label, recipe, options, seed, samples_per_prompt=self.samples_per_prompt)

    def forwards_per_step(self, runs: Sequence[Run]) -> list[int]:
        """Policy forwards of one step of each training, counted."""
        return [result["forwards"]["policy"] for result in self.queue.make([run.probe for run in runs])]

    def budget(self) -> int:
        """Policy forwards of every method: those of TAPO with its default options."""
        return self.world.num_steps * self.forwards_per_step([self.policy("TAPO", TAPO, 0)])[0]

    def at_budget(self, methods: Mapping[str, Method]) -> dict[str, list[Run]]:
        """Runs of each method, one per seed, with as many steps as the budget pays for and its best learning rate."""
        return {name: best for name, (best, *_) in self.finalists(methods).items()}

    def finalists(self, methods: Mapping[str, Method]) -> dict[str, list[list[Run]]]:
        """
        Runs of each method, one per seed, with as many steps as the budget pays for, and the two learning rates that are best
        with the first seed; the one with the higher mean over all seeds comes first. The primary judge on `validation` decides.
        """
        finalists = {}
        for name, tried in self.search(methods).items():
            best_first = sorted(tried, key=lambda run: self.on_validation([run]), reverse=True)
            finalists[name] = [
                [self.with_seed(name, methods[name], run, seed) for seed in self.seeds] for run in best_first[:2]
            ]
        self.queue.make([run for pair in finalists.values() for of_seeds in pair for run in of_seeds])
        return {name: sorted(pair, key=self.on_validation, reverse=True) for name, pair in finalists.items()}

    def search(
        self, methods: Mapping[str, Method], budgets: int = 1, rates: Mapping[str, tuple[float, ...]] | None = None
    ) -> dict[str, list[Run]]:
        """
        Runs of each method with the first seed and the world's learning rates, and with further ones, by the same factor, until
        the best lies between two others or there are [`MAX_RATES`].

        Args:
            methods (`Mapping[str, Method]`): by name.
            budgets (`int`, *optional*, defaults to `1`): how many budgets a run may spend.
            rates (`Mapping[str, tuple[float, ...]]`, *optional*): learning rates to begin with, in place of the world's.
        """
        first = {name: self.policy(name, method, self.seeds[0]) for name, method in methods.items()}
        budget, costs = self.budget(), self.forwards_per_step(list(first.values()))
        steps = {name: budgets * max(1, round(budget / cost)) for name, cost in zip(first, costs, strict=True)}
        tried: dict[str, list[Run]] = {name: [] for name in methods}
        due = dict(rates or {name: self.world.learning_rates[run.command] for name, run in first.items()})
        while any(due.values()):
            for name, run in first.items():
                tried[name] += [run.with_options(max_steps=steps[name], learning_rate=rate) for rate in due[name]]
            self.queue.make([run for runs in tried.values() for run in runs])
            due = {name: self._rates_beyond(runs) for name, runs in tried.items()}
        return tried

    def _rates_beyond(self, tried: Sequence[Run]) -> tuple[float, ...]:
        """The learning rate beyond the end that is the best of them, if one is and there are not enough."""
        rates = sorted(run.options["learning_rate"] for run in tried)
        best = max(tried, key=lambda run: self.on_validation([run])).options["learning_rate"]
        if len(rates) == 1 or len(rates) >= MAX_RATES or rates[0] < best < rates[-1]:
            return ()
        factor = rates[1] / rates[0]
        return (best / factor,) if best == rates[0] else (best * factor,)

    def with_seed(self, name: str, method: Method, trial: Run, seed: int) -> Run:
        """A training with the steps and the learning rate of a trial, and with another seed of policy and reward model."""
        chosen = {option: trial.options[option] for option in ("max_steps", "learning_rate")}
        return self.policy(name, method, seed, **chosen)

    def on_validation(self, runs: Sequence[Run]) -> float:
        """What decides between runs: the mean of the primary judge on the prompts that are there for that."""
        return self.judged(runs, split="validation").mean

    def judged(self, runs: Sequence[Run], judge: str | None = None, split: str = "test") -> Estimate:
        """What a judge, by default the primary one, says of runs with several seeds."""
        results = self.queue.make(runs)
        return estimate([result["judges"][split][judge or self.world.primary] for result in results])

    def rewards(self, name: str) -> list[dict[str, Any]]:
        """Results of a reward model, one per seed."""
        return self.queue.make([self.reward(name, seed) for seed in self.seeds])


def _rollout_target(reward: str) -> str | None:
    """The target that costs nothing, for the rewards that compare velocities, else what fits them."""
    recipe, options = REWARDS[reward]
    return "parent" if recipe == "slrm" and options.get("velocity_target", "ground_truth") == "ground_truth" else None


def _slug(name: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split())
