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

from ..rollouts import Pairing, TrajectoryPairs
from ..rollouts.pairing import LOSE, WIN


def rollout_metrics(pairs: TrajectoryPairs, pairing: Pairing) -> dict[str, torch.Tensor]:
    """
    Metrics of the rewards of a rollout.

    Args:
        pairs ([`TrajectoryPairs`]): the rollout.
        pairing ([`Pairing`]): the rule that made its pairs.

    Returns:
        `dict[str, torch.Tensor]` of shape `(B,)`: `reward` and `reward_std`, over candidates of one draw; `reward_gap`,
            between the two sides of a pair; `pairs_kept`, the share of pairs above the threshold, if there is one; and
            mean and deviation of each reward, if there are several.
    """
    num_prompts = pairs.rewards.shape[2]

    def of_prompts(values: torch.Tensor) -> torch.Tensor:
        """`(n, N)`, N being a multiple of B, to `(B,)`."""
        return values.reshape(-1, num_prompts).mean(0)

    metrics = {
        "reward": pairs.rewards.mean(dim=(0, 1, 3)),
        "reward_std": pairs.rewards.std(dim=-1).mean(dim=(0, 1)),
        "reward_gap": of_prompts(pairs.pair_rewards[:, WIN] - pairs.pair_rewards[:, LOSE]),
    }
    if pairing.threshold is not None:
        metrics["pairs_kept"] = of_prompts(pairs.weights)
    if len(pairs.reward_parts) > 1:
        for name, scores in pairs.reward_parts.items():
            metrics[f"rewards/{name}/mean"] = scores.mean(dim=(0, 1, 3))
            metrics[f"rewards/{name}/std"] = scores.std(dim=-1).mean(dim=(0, 1))
    return metrics


def transition_metrics(
    step_indices: torch.Tensor, losses: torch.Tensor, metrics: dict[str, torch.Tensor], counts: torch.Tensor
) -> dict[str, torch.Tensor]:
    """
    Metrics of transition pairs, of all together and of each stochastic step.

    Args:
        step_indices (`torch.LongTensor` of shape `(num_pairs,)`): step of each pair, on the CPU.
        losses (`torch.Tensor` of shape `(num_pairs,)`): their losses.
        metrics (`dict[str, torch.Tensor]`): those of [`~losses.tapo_loss`], of shape `(num_pairs,)` each.
        counts (`torch.BoolTensor` of shape `(num_pairs,)`): which pairs count, on the CPU.

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
        chosen = ((step_indices == index) & counts).nonzero().flatten().to(losses.device)
        by_step |= {f"step_{index:02d}/{name}": values[chosen] for name, values in rows.items()}
    if counts.all():
        return metrics | by_step
    counted = counts.nonzero().flatten().to(losses.device)
    return {name: values[counted] for name, values in metrics.items()} | by_step


def describe_reward(pairs: TrajectoryPairs, prompts: list[str], index: tuple[int, ...]) -> str:
    """
    What `pairs.rewards[index]` is, in words.

    Args:
        pairs ([`TrajectoryPairs`]): the rollout.
        prompts (`list[str]`): its prompts.
        index (`tuple[int, ...]`): stochastic step, trajectory, prompt and candidate.
    """
    step, _, prompt, _ = index
    names = [name for name, scores in pairs.reward_parts.items() if not scores[index].isfinite()]
    reward = f"the reward `{names[0]}`" if names else "the reward"
    return f"{reward} of a candidate for the prompt {prompts[prompt]!r} at step {pairs.step_indices[step].item()}"


def describe_loss(step_indices: torch.Tensor, prompts: list[str], index: tuple[int, ...]) -> str:
    """
    What the loss of a transition pair is, in words.

    Args:
        step_indices (`torch.LongTensor` of shape `(num_pairs,)`): step of each pair.
        prompts (`list[str]`): prompt of each pair.
        index (`tuple[int, ...]`): the pair.
    """
    return f"the loss for the prompt {prompts[index[0]]!r} at step {step_indices[index].item()}"
