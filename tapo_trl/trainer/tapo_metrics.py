# Copyright 2026 The tapo_trl authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What TAPO logs of its rollouts and of its transitions."""

import torch

from ..rollouts import TrajectoryPairs
from ..rollouts.trajectory import LOSE, WIN


def rollout_metrics(pairs: TrajectoryPairs) -> dict[str, torch.Tensor]:
    """
    Metrics of the rewards of a rollout.

    Args:
        pairs ([`TrajectoryPairs`]): the rollout.

    Returns:
        `dict[str, torch.Tensor]`: `reward` and `reward_std`, over candidates of one draw; `reward_gap`, between the best
            winning and the worst losing candidate; and mean and deviation of each reward, if there are several.
    """
    rewards = pairs.rewards
    metrics = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(dim=-1).mean(),
        "reward_gap": (rewards[:, WIN].amax(-1) - rewards[:, LOSE].amin(-1)).mean(),
    }
    if len(pairs.reward_parts) > 1:
        for name, scores in pairs.reward_parts.items():
            metrics[f"rewards/{name}/mean"] = scores.mean()
            metrics[f"rewards/{name}/std"] = scores.std(dim=-1).mean()
    return metrics


def transition_metrics(
    step_indices: torch.Tensor, losses: torch.Tensor, metrics: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """
    Metrics of transition pairs, of all together and of each stochastic step.

    Args:
        step_indices (`torch.LongTensor` of shape `(num_pairs,)`): step of each pair, on the CPU.
        losses (`torch.Tensor` of shape `(num_pairs,)`): their losses.
        metrics (`dict[str, torch.Tensor]`): those of [`~losses.tapo_loss`], of shape `(num_pairs,)` each.

    Returns:
        `dict[str, torch.Tensor]`: `metrics`, and `step_XX/loss`, `step_XX/accuracy` and `step_XX/margin`.
    """
    rows = {
        "loss": losses.detach(),
        "accuracy": metrics["rewards/accuracies"],
        "margin": metrics["rewards/margins"],
    }
    by_step = {}
    for index in step_indices.unique().tolist():
        chosen = (step_indices == index).nonzero().flatten().to(losses.device)
        by_step |= {f"step_{index:02d}/{name}": values[chosen] for name, values in rows.items()}
    return metrics | by_step
