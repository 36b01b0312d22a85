# Copyright 2026 The TAPO-TRL Authors. All rights reserved.
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
