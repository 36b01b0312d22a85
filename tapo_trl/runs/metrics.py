# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Numbers that are logged, from what all processes recorded."""

import math

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


def means_of(recorded: dict[str, torch.Tensor], accelerator: Accelerator) -> dict[str, float]:
    """
    Means over all values of all processes.

    Args:
        recorded (`dict[str, torch.Tensor]`): values by name, float32 of shape `(num_values,)`. A process may lack names
            that others have, such as those of steps that it has not trained on.
        accelerator (`Accelerator`): connects the processes.

    Returns:
        `dict[str, float]`: without the names that have no values. `rewards/margins` are the logits of a loss of pairs, whose
        standard deviation is added as `logits/std`.
    """
    names, none = sorted(set(gather_object(list(recorded)))), torch.zeros(0, device=accelerator.device)
    values = [recorded.get(name, none) for name in names]
    sums = [torch.stack([v.sum(), v.square().sum(), torch.full_like(v.sum(), len(v))]) for v in values]
    sums = accelerator.reduce(torch.stack(sums), reduction="sum").tolist()
    totals = {name: of_name for name, of_name in zip(names, sums, strict=True) if of_name[-1]}
    means = {name: total / count for name, (total, _, count) in totals.items()}
    if "rewards/margins" in means:
        _, squares, count = totals["rewards/margins"]
        means["logits/std"] = math.sqrt(max(0.0, squares / count - means["rewards/margins"] ** 2))
    return means
