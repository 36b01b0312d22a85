# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What TAPO logs of its rollouts."""

import torch

from ..rollouts import TrajectoryPairs
from ..rollouts.pairing import LOSE, WIN


def rollout_metrics(pairs: TrajectoryPairs) -> dict[str, torch.Tensor]:
    """
    Metrics of the rewards of a rollout.

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
