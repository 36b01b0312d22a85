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

"""Losses as pure functions of tensors. Each returns one loss per example and the quantities worth logging."""

from typing import Literal

import torch
import torch.nn.functional as F


def slrm_loss(
    chosen_log_scores: torch.Tensor,
    rejected_log_scores: torch.Tensor,
    eta: float = 1.0,
    margin: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    r"""
    Bradley-Terry loss of SLRM on the enhanced scores, Eq. 9 in the log domain:
    \\( -\log \sigma(\eta (\log \hat{S}_w - \log \hat{S}_l) - m) \\).

    Args:
        chosen_log_scores (`torch.Tensor` of shape `(batch_size,)`): log S_hat of the preferred latents, float32.
        rejected_log_scores (`torch.Tensor` of shape `(batch_size,)`): log S_hat of the others, float32.
        eta (`float`, *optional*, defaults to `1.0`): exponent of the scores.
        margin (`torch.Tensor` of shape `(batch_size,)`, *optional*): m, by how much the preferred must win.
        label_smoothing (`float`, *optional*, defaults to `0.0`): probability that a label is flipped.

    Returns:
        `tuple`: losses of shape `(batch_size,)` and metrics `accuracy` (a tie counts one half) and `margin`.
    """
    margins = eta * (chosen_log_scores - rejected_log_scores)
    logits = margins if margin is None else margins - margin
    losses = -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
    metrics = {"accuracy": _win_rate(margins), "margin": margins.detach()}
    return losses, metrics


def tapo_loss(
    chosen_log_ratios: torch.Tensor,
    rejected_log_ratios: torch.Tensor,
    beta: float,
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
    label_smoothing: float = 0.0,
    ratio_clip: float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    r"""
    Step-wise DPO loss of TAPO, Eq. 13:
    \\( -\log \sigma(\beta \log \frac{p_\theta(x'^w)}{p_{ref}(x'^w)} - \beta \log \frac{p_\theta(x'^l)}{p_{ref}(x'^l)}) \\).

    Args:
        chosen_log_ratios (`torch.Tensor` of shape `(batch_size,)`):
            log-ratio of the policy to the reference for the step of the winning branch, float32.
        rejected_log_ratios (`torch.Tensor` of shape `(batch_size,)`):
            the same for the losing branch.
        beta (`float`): strength of the regularisation towards the reference.
        loss_type (`str`, *optional*, defaults to `"sigmoid"`): `"sigmoid"` (Eq. 13), `"hinge"` or `"ipo"`.
        label_smoothing (`float`, *optional*, defaults to `0.0`): probability that a label is flipped (`"sigmoid"`).
        ratio_clip (`float`, *optional*): keeps each ratio p_theta / p_ref in `[1 - ratio_clip, 1 + ratio_clip]`.

    Returns:
        `tuple`: losses of shape `(batch_size,)` and metrics `rewards/chosen`, `rewards/rejected`,
        `rewards/accuracies` (a tie counts one half) and `rewards/margins`, each of shape `(batch_size,)`.
    """
    chosen_rewards, rejected_rewards = beta * chosen_log_ratios, beta * rejected_log_ratios
    if ratio_clip is not None:
        low, high = torch.tensor([1 - ratio_clip, 1 + ratio_clip]).log().tolist()
        chosen_log_ratios = chosen_log_ratios.clamp(low, high)
        rejected_log_ratios = rejected_log_ratios.clamp(low, high)
    log_ratio_margins = chosen_log_ratios - rejected_log_ratios

    if loss_type == "sigmoid":
        logits = beta * log_ratio_margins
        losses = -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
    elif loss_type == "hinge":
        losses = F.relu(1 - beta * log_ratio_margins)
    elif loss_type == "ipo":
        losses = (log_ratio_margins - 1 / (2 * beta)) ** 2
    else:
        raise ValueError(f"`loss_type` must be 'sigmoid', 'hinge' or 'ipo', got {loss_type!r}.")

    margins = chosen_rewards - rejected_rewards
    metrics = {
        "rewards/chosen": chosen_rewards.detach(),
        "rewards/rejected": rejected_rewards.detach(),
        "rewards/accuracies": _win_rate(margins),
        "rewards/margins": margins.detach(),
    }
    return losses, metrics


def _win_rate(margins: torch.Tensor) -> torch.Tensor:
    """1 where the chosen wins, 0 where it loses, 1/2 for a tie."""
    return (margins.detach().sign() + 1) / 2
