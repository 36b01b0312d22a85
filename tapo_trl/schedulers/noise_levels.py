# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""At which noise levels a model is trained."""

from typing import Literal

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from . import FlowMatchSDEScheduler


TIMESTEP_SAMPLINGS = ("uniform", "logit_normal")
REWARD_TIMESTEP_SAMPLINGS = (*TIMESTEP_SAMPLINGS, "clean")


def draw_uniform_or_logit_normal(
    timestep_sampling: Literal["uniform", "logit_normal", "clean"], generator: torch.Generator
) -> torch.Tensor:
    """
    A number in (0, 1), of shape `(1,)`, or 0 with `"clean"`. The logit-normal law is the standard one, as in the training of
    SD3.
    """
    if timestep_sampling == "clean":
        return torch.zeros(1)
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
