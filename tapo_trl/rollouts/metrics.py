# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Metrics that online trainers log per rollout and per example."""

import torch

from .base import Rollout
from .pairing import LOSE, WIN
from .pairs import TrajectoryPairs


def group_metrics(rollout: Rollout) -> dict[str, torch.Tensor]:
    """
    Metrics of the rewards of several samples per prompt.

    Args:
        rollout ([`~rollouts.rollout.Rollout`]): with `rewards` of shape `(B, num_generations)`.

    Returns:
        `dict[str, torch.Tensor]` of shape `(B,)`: `reward` and `reward_std` over the samples of a prompt;
            `frac_reward_zero_std`, 1 where all of them are rewarded alike; and mean and deviation of each reward, if there
            are several.
    """
    rewards = rollout.rewards
    metrics = {
        "reward": rewards.mean(1),
        "reward_std": rewards.std(1),
        "frac_reward_zero_std": (rewards.amax(1) == rewards.amin(1)).float(),
    }
    if len(rollout.reward_parts) > 1:
        for name, scores in rollout.reward_parts.items():
            metrics[f"rewards/{name}/mean"] = scores.mean(1)
            metrics[f"rewards/{name}/std"] = scores.std(1)
    return metrics


def pair_metrics(pairs: TrajectoryPairs) -> dict[str, torch.Tensor]:
    """
    Metrics of the rewards of preference pairs.

    Args:
        pairs ([`TrajectoryPairs`]): the rollout.

    Returns:
        `dict[str, torch.Tensor]` of shape `(B,)`: `reward` and `reward_std`, over candidates of one draw; `reward_gap`,
            between the two sides of a pair; `pairs_kept`, the share of pairs that count; and mean and deviation of each
            reward, if there are several.
    """
    num_prompts = pairs.rewards.shape[2]

    def of_prompts(values: torch.Tensor) -> torch.Tensor:
        """`(n, N)`, N being a multiple of B, to `(B,)`."""
        return values.reshape(-1, num_prompts).mean(0)

    metrics = {
        "reward": pairs.rewards.mean(dim=(0, 1, 3)),
        "reward_std": pairs.rewards.std(dim=-1).mean(dim=(0, 1)),
        "reward_gap": of_prompts(pairs.pair_rewards[:, WIN] - pairs.pair_rewards[:, LOSE]),
        "pairs_kept": of_prompts(pairs.weights),
    }
    if len(pairs.reward_parts) > 1:
        for name, scores in pairs.reward_parts.items():
            metrics[f"rewards/{name}/mean"] = scores.mean(dim=(0, 1, 3))
            metrics[f"rewards/{name}/std"] = scores.std(dim=-1).mean(dim=(0, 1))
    return metrics


def metrics_of_steps(
    step_indices: torch.Tensor | None,
    metrics: dict[str, torch.Tensor],
    by_step: dict[str, torch.Tensor],
    counts: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """
    Metrics of examples, of all together and of each step.

    Args:
        step_indices (`torch.LongTensor` of shape `(num_examples,)`, *optional*): step of each example, on the CPU.
        metrics (`dict[str, torch.Tensor]`): of shape `(num_examples,)` each.
        by_step (`dict[str, torch.Tensor]`): the same, of those that are logged for each step.
        counts (`torch.BoolTensor` of shape `(num_examples,)`): which examples count, on the CPU.

    Returns:
        `dict[str, torch.Tensor]`: `metrics`, and `step_XX/{name}` of `by_step`.
    """
    steps = {}
    for index in step_indices.unique().tolist() if by_step else ():
        chosen = ((step_indices == index) & counts).nonzero().flatten()
        steps |= {f"step_{index:02d}/{name}": values[chosen.to(values.device)] for name, values in by_step.items()}
    if counts.all():
        return metrics | steps
    counted = counts.nonzero().flatten()
    return {name: values[counted.to(values.device)] for name, values in metrics.items()} | steps
