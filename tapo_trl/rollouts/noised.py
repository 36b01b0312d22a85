# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Rollouts of DiffusionNFT: several rewarded samples per prompt, each noised to several levels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Rollout, RolloutInputs, RolloutSampler, Transitions


@dataclass(kw_only=True)
class RewardedSamples(Rollout):
    """
    K samples of each of B prompts, N = K x B, and the n noise levels at which each is trained on. Row k B + b is sample k of
    prompt b.

    Args:
        samples (`torch.Tensor` of shape `(N, *latent_shape)`):
            Clean latents, float32. Not always on the device of the rollout, see [`~rollouts.base.RolloutSampler`].
        sigmas (`torch.Tensor` of shape `(n, N)`):
            Noise levels, on the CPU.
        noise (`torch.Tensor` of shape `(n, N, *latent_shape)`):
            x_1.
        rewards (`torch.Tensor` of shape `(B, K)`):
            Rewards of the samples.
        advantages (`torch.Tensor` of shape `(B, K)`, *optional*):
            See [`~losses.group_advantages`].

    The others are those of [`~rollouts.base.Rollout`].
    """

    samples: torch.Tensor
    sigmas: torch.Tensor
    noise: torch.Tensor
    advantages: torch.Tensor | None = None

    of_levels: ClassVar[tuple[str, ...]] = ("sigmas", "noise")

    def _examples(self, level: torch.Tensor, row: torch.Tensor) -> "NoisedSamples":
        return NoisedSamples(
            prompt_embeds=self.prompt_embeds[row],
            weights=self.weights[level, row],
            samples=self.samples[row],
            sigmas=self.sigmas[level, row],
            noise=self.noise[level, row],
            advantages=self.advantages.T.flatten()[row],
        )


@dataclass(kw_only=True)
class NoisedSamples(Transitions):
    """
    Samples at a noise level.

    Args:
        samples (`torch.Tensor` of shape `(num_examples, *latent_shape)`): clean latents.
        sigmas (`torch.Tensor` of shape `(num_examples,)`): noise levels.
        noise (`torch.Tensor` of shape `(num_examples, *latent_shape)`): x_1.
        advantages (`torch.Tensor` of shape `(num_examples,)`): of the samples.

    The others are those of [`~rollouts.base.Transitions`].
    """

    samples: torch.Tensor
    sigmas: torch.Tensor
    noise: torch.Tensor
    advantages: torch.Tensor

    on_device: ClassVar[tuple[str, ...]] = ("samples", "sigmas", "noise", "advantages")

    @property
    def noisy_latents(self) -> torch.Tensor:
        """x_sigma, `(num_examples, *latent_shape)`."""
        sigma = self.sigmas.view(-1, *[1] * (self.noise.ndim - 1))
        return (1 - sigma) * self.samples + sigma * self.noise

    @property
    def velocities(self) -> torch.Tensor:
        """x_1 - x_0, `(num_examples, *latent_shape)`."""
        return self.noise - self.samples

    def describe_loss(self, index: tuple[int, ...]) -> str:
        return f"the loss for the prompt {self.prompts[index[0]]!r} at the noise level {self.sigmas[index].item():.3f}"


@dataclass(kw_only=True)
class NFTSampler(RolloutSampler):
    """
    Draws samples by the deterministic ODE, and the noise with which each is trained on.

    Args:
        num_generations (`int`):
            Samples per prompt K, at least 2.
        draw_sigmas (`Callable`):
            `generator -> noise levels` of one sample, a tensor of shape `(n,)` on the CPU.

    The others are those of [`~rollouts.base.RolloutSampler`].
    """

    num_generations: int
    draw_sigmas: Callable[[torch.Generator], torch.Tensor]

    def run(self, inputs: RolloutInputs) -> RewardedSamples:
        device = inputs.prompt_embeds.device
        noise = inputs.randn(self.num_generations, *self.latent_shape).transpose(0, 1)
        latents = noise  # (K, B, *latent_shape)
        for index in self.steps():
            latents = self.scheduler.ode_step(latents, self.velocity(inputs, latents, index), index)
        scores = self.score(inputs, latents, noise)

        draws = [[self.draw_sigmas(own) for own in inputs.generators] for _ in range(self.num_generations)]
        sigmas = torch.stack([sigmas for row in draws for sigmas in row], dim=1)  # (n, K B)
        noise = inputs.randn(len(sigmas), self.num_generations, *self.latent_shape)  # (B, n, K, *latent_shape)
        noise = noise.movedim(0, 2).flatten(1, 2)
        return RewardedSamples(
            prompt_embeds=inputs.prompt_embeds.repeat(self.num_generations),
            weights=torch.ones(sigmas.shape, device=device),
            **scores,
            samples=latents.flatten(0, 1).to(self.store_on or device),
            sigmas=sigmas,
            noise=noise.to(self.store_on or device),
        )
