# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

r"""Velocity targets: what SLRM's own velocity is compared to, Eq. 7.

In training the clean latent is known, and \( x_1 - x_0 \) is the ground-truth target. A candidate \( x' \) of a rollout has no
\( x_0 \): an inference-time target stands in.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch

from ..policies import FlowPolicy, PromptEmbeddings


if TYPE_CHECKING:
    from .scoring import Candidates


TrainingVelocityTarget = Literal["ground_truth", "reference", "none"]
VelocityTarget = Literal["parent", "policy", "reference", "initial_noise", "none"]
VELOCITY_TARGETS: tuple[str, ...] = get_args(VelocityTarget)
# The inference-time target for an SLRM by the target of its training: the same one where it exists, else a free one.
ROLLOUT_TARGETS: dict[str, VelocityTarget] = {"ground_truth": "parent", "reference": "reference", "none": "none"}
MIN_SIGMA = 0.01  # below it x' hardly has noise to denoise, and the targets divide by sigma'


def training_targets(
    kinds: Sequence[TrainingVelocityTarget],
    policy: FlowPolicy,
    reference: torch.nn.Module,
    noisy: torch.Tensor,
    velocity: torch.Tensor,
    sigma: torch.Tensor,
    prompt_embeds: PromptEmbeddings,
) -> dict[TrainingVelocityTarget, torch.Tensor | None]:
    """
    Velocity targets for latents whose clean latent is known.

    Args:
        kinds (`Sequence[str]`):
            - `"ground_truth"`: x1 - x0, the paper's. It reveals the clean latent, and does not exist in a rollout.
            - `"reference"`: the velocity of the frozen base model at x_sigma, without guidance.
            - `"none"`: no target.
        policy ([`FlowPolicy`]): model family.
        reference (`torch.nn.Module`): the frozen base model.
        noisy (`torch.Tensor` of shape `(batch_size, *latent_shape)`): x_sigma.
        velocity (`torch.Tensor`, shaped as `noisy`): x1 - x0.
        sigma (`torch.Tensor` of shape `(batch_size,)`): noise levels.
        prompt_embeds ([`PromptEmbeddings`]): one prompt per latent.

    Returns:
        `dict[str, torch.Tensor | None]`: the target of each kind.
    """
    targets: dict[TrainingVelocityTarget, torch.Tensor | None] = {}
    for kind in kinds:
        if kind not in get_args(TrainingVelocityTarget):
            raise ValueError(f"Unknown rule {kind!r}: choose among {list(get_args(TrainingVelocityTarget))}.")
        targets[kind] = velocity if kind == "ground_truth" else None
        if kind == "reference":
            with torch.no_grad():
                targets[kind] = policy.velocity(reference, noisy, sigma, prompt_embeds)
    return targets


def velocity_target(candidates: "Candidates", kind: VelocityTarget) -> torch.Tensor | None:
    r"""
    Inference-time target of the candidates x' at sigma'.

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
