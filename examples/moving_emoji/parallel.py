# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Training with several processes of one thread each, started by `torchrun`: they only share their gradients."""

import os

import torch
import torch.distributed as dist


def start_processes() -> tuple[int, int]:
    """The number of this process and how many there are, 0 and 1 without `torchrun`."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        dist.init_process_group("gloo")
    return rank, processes


def all_average(parameters: list[torch.nn.Parameter], value: float) -> float:
    """Averages the gradients of all processes in place, and returns the average of `value`."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([torch.tensor([value]), *(parameter.grad.flatten() for parameter in parameters)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat[1:].split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad.copy_(part.view_as(parameter))
    return flat[0].item()
