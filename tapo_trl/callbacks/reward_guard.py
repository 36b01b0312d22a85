# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from typing import Literal

import torch
from accelerate.utils import broadcast
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..rewards import PretrainedReward
from ..rewards.scoring import call_reward_function, check_reward_function
from .base import PolicyCallback, check_at_least_one
from .reward_curve import HELD_OUT_REWARD, reward_curve


logger = logging.get_logger(__name__)


def detect_reward_hacking(log_history: list[dict], patience: int, min_drop: float) -> bool:
    """
    Decides from the logs of a run whether the policy has begun to exploit its training reward.

    Looks at the checks of [`RewardHackingGuardCallback`] (entries with `guard/held_out_reward`). A check is *bad* when the
    held-out reward lies at least `min_drop` below the best earlier check, while the training reward (the mean of the
    `reward` entries since the previous check) is higher than it was around that best check.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.
        patience (`int`): Number of consecutive bad checks, ending with the last one, that make the verdict.
        min_drop (`float`): Smallest fall of the held-out reward that counts, in its own units.

    Returns:
        `bool`: Whether the last `patience` checks were all bad.
    """
    checks = reward_curve(log_history)
    bad_in_a_row, best = 0, 0
    for index, check in enumerate(checks[1:], start=1):
        at_best = checks[best]
        fell = check.held_out <= at_best.held_out - min_drop
        known = check.training is not None and at_best.training is not None
        rose = known and check.training > at_best.training
        bad_in_a_row = bad_in_a_row + 1 if fell and rose else 0
        if check.held_out > at_best.held_out:
            best = index
    return bad_in_a_row >= patience


class RewardHackingGuardCallback(PolicyCallback):
    """
    Watches a held-out reward that the policy is not trained on, and acts when it falls while the training reward rises.

    Before the first step and every `every_n_steps` optimizer steps the policy draws `prompts` with fixed seeds and
    `reward_fn` scores the images; the mean is logged as `guard/held_out_reward`. See [`detect_reward_hacking`] for the
    verdict. Everything it needs is in the log history, so a resumed run goes on where it stopped.

    Args:
        reward_fn (`Callable[[torch.Tensor, list[str]], torch.Tensor | list[float]]`): Scores images `[B, 3, H, W]`
            (float32 in [0, 1], on the CPU) for their prompts; higher is better. A [`PretrainedReward`], see [`get_reward`],
            gets them on the accelerator.
        prompts (`list[str]`): Prompts to score, best taken from outside the training set.
        every_n_steps (`int`): Number of optimizer steps between two checks. Each check also writes a log entry, whatever
            `args.logging_steps` is, so that it stands beside the training reward of the same steps.
        patience (`int`, *optional*, defaults to `2`): Number of consecutive bad checks before the guard acts.
        min_drop (`float`, *optional*, defaults to `0.0`): Smallest fall below the best value that counts, in the units of
            `reward_fn`. Choose it above the noise of the mean over `prompts`.
        action (`"warn"` or `"stop"`, *optional*, defaults to `"warn"`): What to do.
        seed (`int`, *optional*, defaults to `0`): Seed of the first image; image `i` uses `seed + i`.
    """

    def __init__(
        self,
        reward_fn: Callable[[torch.Tensor, list[str]], torch.Tensor | list[float]],
        prompts: list[str],
        every_n_steps: int,
        patience: int = 2,
        min_drop: float = 0.0,
        action: Literal["warn", "stop"] = "warn",
        seed: int = 0,
    ):
        super().__init__(prompts)
        self._require_prompts()
        check_at_least_one(every_n_steps=every_n_steps, patience=patience)
        if min_drop < 0:
            raise ValueError(f"`min_drop` must not be negative, but it is {min_drop}.")
        if action not in ("warn", "stop"):
            raise ValueError(f'`action` must be "warn" or "stop", but it is {action!r}.')
        check_reward_function(reward_fn)
        if isinstance(reward_fn, PretrainedReward):
            reward_fn.check_prompts(self.prompts)
        self.reward_fn = reward_fn
        self.every_n_steps = every_n_steps
        self.patience = patience
        self.min_drop = min_drop
        self.action = action
        self.seed = seed

    def attach(self, trainer) -> None:
        if isinstance(self.reward_fn, PretrainedReward):
            self.reward_fn.check_reads(trainer.policy)
        super().attach(trainer)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step == 0:
            self.trainer.log({HELD_OUT_REWARD: self._held_out_reward().item()})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step % self.every_n_steps == 0:
            self.trainer._metrics["train"][HELD_OUT_REWARD].append(self._held_out_reward())
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if HELD_OUT_REWARD not in logs:
            return
        if not detect_reward_hacking(state.log_history, self.patience, self.min_drop):
            return
        if state.is_world_process_zero:
            logger.warning(
                f"Step {state.global_step}: the held-out reward has fallen to {logs[HELD_OUT_REWARD]:.4g} while the "
                f"training reward rose, for {self.patience} checks in a row: the policy is probably exploiting its reward. "
                + ("Training stops." if self.action == "stop" else 'Pass `action="stop"` to stop training here.')
            )
        if self.action == "stop":
            control.should_training_stop = True

    def _held_out_reward(self) -> torch.Tensor:
        images = self.trainer.generate(self.prompts, seed=self.seed)
        if isinstance(self.reward_fn, PretrainedReward):  # computes where its images are
            images = images.to(self.trainer.accelerator.device)
        scores = call_reward_function(self.reward_fn, images, self.prompts, noun="image")
        # Every process must come to the same verdict, also when `reward_fn` is not deterministic.
        mean = broadcast(scores.mean().to(self.trainer.accelerator.device))
        if not mean.isfinite():
            raise ValueError(f"`reward_fn` returned a mean of {mean} for the held-out prompts; scores must be finite.")
        return mean
