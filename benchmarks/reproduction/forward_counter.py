# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Counts what a training spends."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tapo_trl.profiling import on_forward
from tapo_trl.rewards.scoring import EstimateReward, LatentReward
from tapo_trl.trainer.base import DiffusionTrainer
from tapo_trl.trainer.rollout_trainer import RolloutTrainer


BACKWARD_COST = 2  # in forwards


@dataclass
class ForwardCounter:
    """
    Counts the rows that go through networks. With guidance a latent is two rows.

    Args:
        sampling (`int`): rows of the policy's and the reference's forwards without a gradient.
        training (`int`): rows of the policy's forwards with one.
        reward (`int`): rows of reward models.
    """

    sampling: int = 0
    training: int = 0
    reward: int = 0

    @property
    def policy_forwards(self) -> int:
        """Rows through the policy's network, in forwards: a backward counts as two of them."""
        return self.sampling + (1 + BACKWARD_COST) * self.training

    def watch(self, trainer: DiffusionTrainer) -> None:
        """
        Count the forwards of a trainer's policy, of its reference where that is a copy, and of its reward models.

        Args:
            trainer ([`TAPOTrainer`] or another one of a policy): a trainer that has not begun.
        """
        on_forward(trainer.policy.transformer, self._add_policy)
        if trainer.ref_model is not None:
            on_forward(trainer.ref_model, self._add_policy)
        for reward in trainer.reward.rewards if isinstance(trainer, RolloutTrainer) else []:
            if isinstance(reward, LatentReward):
                on_forward(reward.model.transformer, self._add_reward)
            elif isinstance(reward, EstimateReward):
                embeddings = reward.model.clip.vision_model.embeddings
                embeddings.register_forward_hook(lambda module, args, output: self._add_reward(len(output)))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is counted."""
        counts = dict(vars(self))
        yield
        vars(self).update(counts)

    def _add_policy(self, rows: int) -> None:
        if torch.is_grad_enabled():
            self.training += rows
        else:
            self.sampling += rows

    def _add_reward(self, rows: int) -> None:
        self.reward += rows
