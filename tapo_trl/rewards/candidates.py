# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What a reward may look at when it ranks the candidates of a stochastic step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..policies import PromptEmbeddings


@dataclass
class Candidates:
    """
    Candidates x' of one stochastic step, flattened to one batch.

    Args:
        latents (`torch.Tensor` of shape `(num_candidates, *latent_shape)`):
            x', noisy latents, float32.
        sigma (`torch.Tensor` of shape `()`):
            sigma', the noise level of `latents`.
        clean_estimate (`torch.Tensor`, shaped as `latents`):
            \\( \\hat{x}_0 = x - \\sigma v(x) \\) of each candidate's parent x.
        initial_noise (`torch.Tensor`, shaped as `latents`):
            x_T of each candidate's trajectory.
        prompts (`list[str]`):
            Prompt of each candidate.
        prompt_embeds ([`PromptEmbeddings`]):
            Their embeddings.
        columns (`dict[str, list]`):
            The dataset's further columns, one value per candidate.
        predict_velocity (`Callable`):
            Returns v(x') of the current policy, with its guidance. Called at most once.
        predict_reference_velocity (`Callable`):
            Returns v(x') of the reference policy, without guidance. Called at most once.
    """

    latents: torch.Tensor
    sigma: torch.Tensor
    clean_estimate: torch.Tensor
    initial_noise: torch.Tensor
    prompts: list[str]
    prompt_embeds: PromptEmbeddings
    columns: dict[str, list[Any]]
    predict_velocity: Callable[[], torch.Tensor]
    predict_reference_velocity: Callable[[], torch.Tensor]

    def __len__(self) -> int:
        return len(self.latents)

    @cached_property
    def velocity(self) -> torch.Tensor:
        return self.predict_velocity()

    @cached_property
    def reference_velocity(self) -> torch.Tensor:
        return self.predict_reference_velocity()

    @property
    def has_velocity(self) -> bool:
        """Whether `velocity` was needed, and so costs nothing any more."""
        return "velocity" in self.__dict__

    @property
    def denoised(self) -> torch.Tensor:
        """One-step estimate of each candidate's own clean latent, \\( x' - \\sigma' v(x') \\)."""
        return self.latents - self.sigma * self.velocity


class CleanSamples(Candidates):
    """
    Final samples, as candidates at noise level 0: they are their own clean estimates, and no velocity is predicted. Arguments
    are those of [`Candidates`].
    """

    def __init__(
        self,
        latents: torch.Tensor,
        initial_noise: torch.Tensor,
        prompts: list[str],
        prompt_embeds: PromptEmbeddings,
        columns: dict[str, list[Any]],
    ):
        sigma = torch.zeros((), device=latents.device)
        of_prompts = (prompts, prompt_embeds, columns)
        super().__init__(latents, sigma, latents, initial_noise, *of_prompts, _no_velocity, _no_velocity)

    @property
    def denoised(self) -> torch.Tensor:
        return self.latents


def _no_velocity() -> torch.Tensor:
    raise RuntimeError("A clean sample has no noise whose velocity could be predicted.")
