# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Advantages of groups of samples, over all processes."""

import torch
from accelerate import Accelerator

from ..losses import group_advantages


SCALE_REWARDS = ("group", "batch", "none")


def advantages_of_process(rewards: torch.Tensor, scale_rewards: str, accelerator: Accelerator) -> torch.Tensor:
    """
    Advantages of the samples of this process, see [`~losses.group_advantages`]. With `scale_rewards="batch"`, the standard
    deviation is that of the samples of a micro-step on all processes.

    Args:
        rewards (`torch.Tensor` of shape `(num_prompts, num_generations)`): rewards of this process.
        scale_rewards (`str`): `"group"`, `"batch"` or `"none"`.
        accelerator ([`~accelerate.Accelerator`]): the processes.

    Returns:
        `torch.Tensor` of shape `(num_prompts, num_generations)`.
    """
    number, first = len(rewards), 0
    if scale_rewards == "batch":
        rewards, first = accelerator.gather(rewards), accelerator.process_index * number
    return group_advantages(rewards, scale_rewards)[first : first + number]
