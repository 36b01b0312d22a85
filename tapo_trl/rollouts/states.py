# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Rollouts of ReFL: trajectories that stop before the steps that are trained through."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from .base import Rollout, RolloutInputs, RolloutSampler, Transitions


@dataclass(kw_only=True)
class LateStates(Rollout):
    """
    States of the trajectories of B prompts, N = B at one noise level. They are scored in the loss, so that `rewards` is empty.

    Args:
        step_indices (`torch.LongTensor` of shape `(1,)`): sampling step that comes next, on the CPU.
        latents (`torch.Tensor` of shape `(1, N, *latent_shape)`): x before it, float32.
        noise (`torch.Tensor` of shape `(1, N, *latent_shape)`): the noise that the trajectories come from.
        columns (`dict[str, list]`): further columns of the dataset.

    The others are those of [`~rollouts.base.Rollout`].
    """

    step_indices: torch.Tensor
    latents: torch.Tensor
    noise: torch.Tensor
    columns: dict[str, list[Any]] = field(default_factory=dict)

    of_levels: ClassVar[tuple[str, ...]] = ("step_indices", "latents", "noise")

    def _examples(self, level: torch.Tensor, row: torch.Tensor) -> "StateTransitions":
        return StateTransitions(
            prompt_embeds=self.prompt_embeds[row],
            weights=self.weights[level, row],
            step_indices=self.step_indices[level],
            latents=self.latents[level, row],
            noise=self.noise[level, row],
            columns={name: [values[index] for index in row] for name, values in self.columns.items()},
        )


@dataclass(kw_only=True)
class StateTransitions(Transitions):
    """
    States to go on from.

    Args:
        latents (`torch.Tensor` of shape `(num_examples, *latent_shape)`): x.
        noise (`torch.Tensor` of shape `(num_examples, *latent_shape)`): the noise that it comes from.
        columns (`dict[str, list]`): further columns of the dataset.

    The others are those of [`~rollouts.base.Transitions`].
    """

    latents: torch.Tensor
    noise: torch.Tensor
    columns: dict[str, list[Any]]

    on_device: ClassVar[tuple[str, ...]] = ("latents", "noise")

    def describe_loss(self, index: tuple[int, ...]) -> str:
        return f"the loss (minus the reward) for the prompt {self.prompts[index[0]]!r}"


@dataclass(kw_only=True)
class LateStateSampler(RolloutSampler):
    """
    Follows the ODE from the noise up to a sampling step. Arguments are those of [`~rollouts.base.RolloutSampler`].

    Attributes:
        stop_at (`int`): the sampling step before which trajectories stop.
    """

    stop_at: int

    def run(self, inputs: RolloutInputs) -> LateStates:
        device = inputs.prompt_embeds.device
        latents = noise = inputs.randn(*self.latent_shape)[None]  # (1, B, *latent_shape)
        for index in list(self.steps())[: self.stop_at]:
            latents = self.scheduler.ode_step(latents, self.velocity(inputs, latents, index), index)
        return LateStates(
            prompt_embeds=inputs.prompt_embeds,
            weights=torch.ones(1, len(inputs.prompts), device=device),
            rewards=torch.empty(0, device=device),
            step_indices=torch.tensor([self.stop_at]),
            latents=latents.to(self.store_on or device),
            noise=noise.to(self.store_on or device),
            columns=inputs.columns,
        )
