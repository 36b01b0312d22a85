# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The probability-flow ODE of a policy: deterministic sampling and its inversion."""

import torch
from diffusers.utils.torch_utils import randn_tensor

from .embeddings import PromptEmbeddings


class OdeMixin:
    """The ODE that a [`FlowPolicy`] samples with, by Euler steps in both directions."""

    @torch.no_grad()
    def sample(
        self,
        model: torch.nn.Module,
        prompt_embeds: PromptEmbeddings,
        negative_prompt_embeds: PromptEmbeddings | None = None,
        *,
        latent_shape: tuple[int, ...],
        num_inference_steps: int,
        guidance_scale: float,
        generators: list[torch.Generator],
    ) -> torch.Tensor:
        """
        Deterministic sampling, the same as the diffusers pipeline's with `output_type="latent"`.

        Args:
            latent_shape (`tuple[int, ...]`): shape of one latent.
            num_inference_steps (`int`): number of sampling steps.
            guidance_scale (`float`): see [`~FlowPolicy.velocity`].
            generators (`list[torch.Generator]`): one per prompt, for its initial noise.

        Returns:
            `torch.Tensor` of shape `(batch_size, *latent_shape)`, float32.
        """
        device = prompt_embeds.device
        scheduler = self.build_scheduler(num_inference_steps, latent_shape, device)
        latents = randn_tensor((len(prompt_embeds), *latent_shape), generator=generators, device=device)
        for index in range(num_inference_steps):
            velocity = self.velocity(
                model, latents, scheduler.sigma(index), prompt_embeds, negative_prompt_embeds, guidance_scale
            )
            latents = scheduler.ode_step(latents, velocity, index)
        return latents

    @torch.no_grad()
    def invert(
        self,
        model: torch.nn.Module,
        latents: torch.Tensor,
        prompt_embeds: PromptEmbeddings,
        *,
        num_inference_steps: int,
        first_index: int = 0,
    ) -> torch.Tensor:
        """
        The way back of [`~FlowPolicy.sample`], from clean latents to the noise that they would come from: Euler steps of
        the ODE without guidance, each with the velocity at its clean end.

        Args:
            model (`torch.nn.Module`): the family's transformer, wrapped or not.
            latents (`torch.Tensor` of shape `(batch_size, *latent_shape)`): clean latents, float32.
            prompt_embeds ([`PromptEmbeddings`]): one prompt per latent.
            num_inference_steps (`int`): number of sampling steps.
            first_index (`int`, *optional*, defaults to `0`): where to stop. 0 is pure noise.

        Returns:
            `torch.Tensor` of shape `(num_inference_steps - first_index, batch_size, *latent_shape)`: latents at the noise
            levels `sigmas[first_index]`, ..., `sigmas[num_inference_steps - 1]` of the scheduler, float32.
        """
        scheduler = self.build_scheduler(num_inference_steps, tuple(latents.shape[1:]), latents.device)
        trajectory = []
        for index in reversed(range(first_index, num_inference_steps)):
            sigma = scheduler.sigma(index + 1)
            velocity = self.velocity(model, latents, sigma, prompt_embeds)
            latents = latents + (scheduler.sigma(index) - sigma) * velocity
            trajectory.append(latents)
        return torch.stack(trajectory[::-1])
