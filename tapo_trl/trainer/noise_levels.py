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

"""At which noise levels a model is trained."""

from typing import Literal

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from ..schedulers import FlowMatchSDEScheduler


TIMESTEP_SAMPLINGS = ("uniform", "logit_normal")


def draw_uniform_or_logit_normal(
    timestep_sampling: Literal["uniform", "logit_normal"], generator: torch.Generator
) -> torch.Tensor:
    """A number in (0, 1), of shape `(1,)`. The logit-normal law is the standard one, as in the training of SD3."""
    if timestep_sampling == "uniform":
        return torch.rand(1, generator=generator)
    return compute_density_for_timestep_sampling(
        "logit_normal", batch_size=1, logit_mean=0.0, logit_std=1.0, generator=generator
    )


def training_sigmas(scheduler: FlowMatchSDEScheduler) -> torch.Tensor:
    """
    The 1000 noise levels on which diffusers' training scripts draw a step, from 1 downwards: those of a new scheduler,
    with the shift of the pipeline and before `set_timesteps`.
    """
    return FlowMatchSDEScheduler.from_config(scheduler.config).sigmas
