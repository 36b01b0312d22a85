# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""A random part of a rollout to train on."""

from dataclasses import replace
from typing import TypeVar

import torch

from .base import Rollout


AnyRollout = TypeVar("AnyRollout", bound=Rollout)


def draw_examples(rollout: AnyRollout, number: int, generators: list[torch.Generator]) -> AnyRollout:
    r"""
    Choose some of the m examples of each prompt to train on, such that the expected loss and its gradient are those of all.

    Of the c examples that count, \\( k' = \min(k, c) \\) are drawn uniformly without replacement; those of weight 0 are taken
    only to make up the number k. A drawn example stands for \\( c / k' \\). The loss is a mean over the examples that are
    there, so weights are multiplied by \\( \frac{k}{m} \frac{c}{k'} \\), which is 1 if all count.

    Args:
        rollout ([`~rollouts.base.Rollout`]): of B prompts. It stays as it is.
        number (`int`): k, examples per prompt.
        generators (`list[torch.Generator]`): one per prompt, on the CPU: its choice depends on nothing else.

    Returns:
        [`~rollouts.base.Rollout`]: the same with `examples`, k B in the order of the rollout.

    Raises:
        ValueError: if k is not in [1, m].
    """
    num_prompts, weights = len(generators), rollout.weights.cpu().flatten()
    numbers = torch.arange(len(weights)).view(-1, num_prompts).T  # (B, m): example i is of prompt i % B
    total = numbers.shape[1]
    if not 1 <= number <= total:
        raise ValueError(f"A prompt has {total} examples, of which {number} cannot be drawn.")
    is_last = (weights[numbers] == 0) * total
    order = torch.stack([torch.randperm(total, generator=generator) for generator in generators]) + is_last
    chosen = numbers.gather(1, order.argsort(1)[:, :number])
    count = (weights[numbers] > 0).sum(1)
    scale = (number * count) / (total * count.clamp(1, number))
    weights = (weights.view(-1, num_prompts) * scale).view_as(rollout.weights)
    return replace(rollout, weights=weights, examples=chosen.flatten().sort().values)
