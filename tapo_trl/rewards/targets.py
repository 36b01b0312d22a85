# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

r"""The velocity that SLRM's own velocity is compared to, Eq. 7, when the clean latent is unknown.

In training the target is \( x_1 - x_0 \). A candidate \( x' \) of a rollout has no \( x_0 \): something has to stand in.
"""

from typing import Literal, get_args

import torch

from .candidates import Candidates


VelocityTarget = Literal["parent", "policy", "reference", "initial_noise", "none"]
VELOCITY_TARGETS: tuple[str, ...] = get_args(VelocityTarget)
# What to use with an SLRM by the `velocity_target` of its training: the same where it can be had while sampling, else free.
ROLLOUT_TARGETS: dict[str, VelocityTarget] = {"ground_truth": "parent", "reference": "reference", "none": "none"}
MIN_SIGMA = 0.01  # below it x' hardly has noise to denoise, and the targets divide by sigma'


def velocity_target(candidates: Candidates, kind: VelocityTarget) -> torch.Tensor | None:
    r"""
    Target of the denoising score enhancement for the candidates x' at sigma'.

    Args:
        candidates ([`Candidates`]):
            Candidates of one step.
        kind (`str`):
            - `"parent"`: \( (x' - \hat{x}_0) / \sigma' \) with the parent's estimate of the clean latent. Free.
            - `"policy"`: the current policy's velocity at x', with its guidance. One more forward, which the next step
              reuses.
            - `"reference"`: the reference policy's velocity at x', without guidance, as in the SLRM's training. One more
              forward.
            - `"initial_noise"`: \( (x_T - x') / (1 - \sigma') \), the trajectory's first noise as x_1. Free.
            - `"none"`: no enhancement, the score is the logit alone.

    Returns:
        `torch.Tensor` shaped as the latents, or `None` where there is no target: for `"none"`, and at
        sigma' < 0.01, where it is undefined.
    """
    if kind not in VELOCITY_TARGETS:
        raise ValueError(f"`velocity_target` must be one of {VELOCITY_TARGETS}, got {kind!r}.")
    if kind == "none" or candidates.sigma < MIN_SIGMA:
        return None
    if kind == "parent":
        return (candidates.latents - candidates.clean_estimate) / candidates.sigma
    if kind == "policy":
        return candidates.velocity
    if kind == "reference":
        return candidates.reference_velocity
    return (candidates.initial_noise - candidates.latents) / (1 - candidates.sigma)
