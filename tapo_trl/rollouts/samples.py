# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Rollouts of online Diffusion-DPO: several samples per prompt, of which the best and the worst make a pair."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Rollout, RolloutInputs, RolloutSampler, Transitions


@dataclass(kw_only=True)
class SamplePairs(Rollout):
    """
    The best and the worst sample of each of B prompts, and at which n noise levels they are compared.

    Args:
        samples (`torch.Tensor` of shape `(2, B, *latent_shape)`):
            Clean latents of the best (0) and the worst (1) sample, float32. Not always on the device of the rollout, see
            [`~rollouts.base.RolloutSampler`].
        sigmas (`torch.Tensor` of shape `(n, B)`):
            Noise levels, on the CPU.
        noise (`torch.Tensor` of shape `(n, B, *latent_shape)`):
            x_1, which both sides share.
        weights (`torch.Tensor` of shape `(n, B)`):
            Weight of each pair in the loss, 0 for a tie.
        rewards (`torch.Tensor` of shape `(B, num_generations)`):
            Rewards of all samples.

    The others are those of [`~rollouts.base.Rollout`].
    """

    samples: torch.Tensor
    sigmas: torch.Tensor
    noise: torch.Tensor

    of_levels: ClassVar[tuple[str, ...]] = ("sigmas", "noise")

    def _examples(self, level: torch.Tensor, row: torch.Tensor) -> "NoisedPairs":
        return NoisedPairs(
            prompt_embeds=self.prompt_embeds[row],
            weights=self.weights[level, row],
            samples=self.samples[:, row],
            sigmas=self.sigmas[level, row],
            noise=self.noise[level, row],
        )


@dataclass(kw_only=True)
class NoisedPairs(Transitions):
    """
    Pairs of samples that are compared at a noise level.

    Args:
        samples (`torch.Tensor` of shape `(2, num_pairs, *latent_shape)`): clean latents of the best and the worst sample.
        sigmas (`torch.Tensor` of shape `(num_pairs,)`): noise levels.
        noise (`torch.Tensor` of shape `(num_pairs, *latent_shape)`): x_1 of both sides.

    The others are those of [`~rollouts.base.Transitions`].
    """

    samples: torch.Tensor
    sigmas: torch.Tensor
    noise: torch.Tensor

    on_device: ClassVar[tuple[str, ...]] = ("samples", "sigmas", "noise")

    @property
    def noisy_latents(self) -> torch.Tensor:
        """x_sigma of both sides, `(2, num_pairs, *latent_shape)`."""
        sigma = self.sigmas.view(-1, *[1] * (self.noise.ndim - 1))
        return (1 - sigma) * self.samples + sigma * self.noise

    @property
    def velocities(self) -> torch.Tensor:
        """x_1 - x_0 of both sides, `(2, num_pairs, *latent_shape)`."""
        return self.noise - self.samples

    def describe_loss(self, index: tuple[int, ...]) -> str:
        return f"the loss for the prompt {self.prompts[index[0]]!r} at the noise level {self.sigmas[index].item():.3f}"


@dataclass(kw_only=True)
class OnlineDPOSampler(RolloutSampler):
    """
    Draws samples by the deterministic ODE, and keeps the best and the worst of each prompt.

    Args:
        num_generations (`int`):
            Samples per prompt, at least 2.
        num_noise_levels (`int`):
            At how many noise levels a pair is compared.
        draw_sigma (`Callable`):
            `generator -> noise level`, a tensor of shape `(1,)` on the CPU.

    The others are those of [`~rollouts.base.RolloutSampler`].
    """

    num_generations: int
    num_noise_levels: int
    draw_sigma: Callable[[torch.Generator], torch.Tensor]

    def run(self, inputs: RolloutInputs) -> SamplePairs:
        device = inputs.prompt_embeds.device
        noise = inputs.randn(self.num_generations, *self.latent_shape).transpose(0, 1)
        latents = noise  # (num_generations, B, *latent_shape)
        for index in self.steps():
            latents = self.scheduler.ode_step(latents, self.velocity(inputs, latents, index), index)

        scores = self.score(inputs, latents, noise)
        rewards = scores["rewards"]
        with self.timer.stage("selection"):
            rows = torch.arange(len(inputs.prompts), device=device)
            pairs = torch.stack([latents[rewards.argmax(1), rows], latents[rewards.argmin(1), rows]])
        sigmas = [
            torch.cat([self.draw_sigma(generator) for _ in range(self.num_noise_levels)])
            for generator in inputs.generators
        ]
        sigmas = torch.stack(sigmas, dim=1)
        return SamplePairs(
            prompt_embeds=inputs.prompt_embeds,
            # 0 where all samples are rewarded alike
            weights=(rewards.amax(1) != rewards.amin(1)).to(sigmas.dtype).repeat(self.num_noise_levels, 1),
            **scores,
            samples=pairs.to(self.store_on or device),
            sigmas=sigmas,
            noise=inputs.randn(self.num_noise_levels, *self.latent_shape).transpose(0, 1).to(self.store_on or device),
        )
