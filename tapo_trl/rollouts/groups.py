# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Rollouts of Flow-GRPO: groups of stochastic trajectories, rewarded at their ends."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Rollout, RolloutInputs, RolloutSampler, Transitions


@dataclass(kw_only=True)
class TrajectoryGroups(Rollout):
    """
    The stochastic steps of K trajectories for each of B prompts, N = K x B at each of the n steps. Row k B + b is
    trajectory k of prompt b.

    Args:
        step_indices (`torch.LongTensor` of shape `(n,)`):
            Index of each stochastic step, on the CPU.
        latents (`torch.Tensor` of shape `(n, N, *latent_shape)`):
            x before each step, float32. Not always on the device of the rollout, see
            [`~rollouts.base.RolloutSampler`].
        next_latents (`torch.Tensor` of shape `(n, N, *latent_shape)`):
            x' after it. Without `train_cfg`, what the same noise makes of the mean below.
        means (`torch.Tensor` of shape `(n, N, *latent_shape)`):
            Mean of x' under the policy that sampled it. Without `train_cfg`, that of its prediction without guidance.
        rewards (`torch.Tensor` of shape `(B, K)`):
            Rewards of the final samples.
        advantages (`torch.Tensor` of shape `(B, K)`, *optional*):
            See [`~losses.group_advantages`].
        final_latents (`torch.Tensor` of shape `(K, B, *latent_shape)`):
            Clean latents at the end of each trajectory.

    The others are those of [`~rollouts.base.Rollout`].
    """

    step_indices: torch.Tensor
    latents: torch.Tensor
    next_latents: torch.Tensor
    means: torch.Tensor
    final_latents: torch.Tensor
    advantages: torch.Tensor | None = None

    of_levels: ClassVar[tuple[str, ...]] = ("step_indices", "latents", "next_latents", "means")

    def _examples(self, level: torch.Tensor, row: torch.Tensor) -> "GroupTransitions":
        return GroupTransitions(
            prompt_embeds=self.prompt_embeds[row],
            weights=self.weights[level, row],
            step_indices=self.step_indices[level],
            latents=self.latents[level, row],
            next_latents=self.next_latents[level, row],
            means=self.means[level, row],
            advantages=self.advantages.T.flatten()[row],
        )


@dataclass(kw_only=True)
class GroupTransitions(Transitions):
    """
    Stochastic steps x -> x' of trajectories.

    Args:
        latents (`torch.Tensor` of shape `(num_examples, *latent_shape)`): x.
        next_latents (`torch.Tensor` of shape `(num_examples, *latent_shape)`): x'.
        means (`torch.Tensor` of shape `(num_examples, *latent_shape)`): mean of x' under the policy that sampled it.
        advantages (`torch.Tensor` of shape `(num_examples,)`): of the trajectories.

    The others are those of [`~rollouts.base.Transitions`].
    """

    latents: torch.Tensor
    next_latents: torch.Tensor
    means: torch.Tensor
    advantages: torch.Tensor

    on_device: ClassVar[tuple[str, ...]] = ("latents", "next_latents", "means", "advantages")


@dataclass(kw_only=True)
class FlowGRPOSampler(RolloutSampler):
    """
    Draws trajectories that are stochastic at some steps and follow the ODE at the others.

    Args:
        step_indices (`list[int]`):
            Stochastic steps W_T, see [`sde_step_indices`].
        num_generations (`int`):
            Trajectories per prompt K, at least 2.
        train_cfg (`bool`, *optional*, defaults to `True`):
            Whether the steps are kept as they were sampled. Otherwise they are shifted by what guidance has added to their mean,
            which takes one more forward per step, without guidance.
        shared_noise (`bool`, *optional*, defaults to `False`):
            Whether the trajectories of a prompt start from the same noise, so that they are one up to the first stochastic step.

    The others are those of [`~rollouts.base.RolloutSampler`].
    """

    step_indices: list[int]
    num_generations: int
    train_cfg: bool = True
    shared_noise: bool = False

    def run(self, inputs: RolloutInputs) -> TrajectoryGroups:
        device = inputs.prompt_embeds.device
        one_each = (self.num_generations, *self.latent_shape)
        num_starts = 1 if self.shared_noise else self.num_generations
        noise = inputs.randn(num_starts, *self.latent_shape).transpose(0, 1)
        latents = noise  # (K, B, *latent_shape), or (1, B, *latent_shape) while the trajectories are one
        shape = (len(self.step_indices), self.num_generations * len(inputs.prompts), *self.latent_shape)
        parents, children, means = (torch.empty(shape, device=self.store_on or device) for _ in range(3))

        for index in self.steps():
            velocity = self.velocity(inputs, latents, index)
            if index not in self.step_indices:
                latents = self.scheduler.ode_step(latents, velocity, index)
                continue
            with self.timer.stage("stochastic steps"):
                mean, std = self.scheduler.sde_mean_std(latents, velocity, index)
                change = std * inputs.randn(*one_each).transpose(0, 1)
            trained = mean
            if not self.train_cfg:
                unguided = self.velocity(inputs, latents, index, guided=False)
                trained, _ = self.scheduler.sde_mean_std(latents, unguided, index)
            step = self.step_indices.index(index)
            parents[step], children[step], means[step] = (
                x.expand_as(change).flatten(0, 1) for x in (latents, trained + change, trained)
            )
            latents = mean + change

        scores = self.score(inputs, latents, noise.expand_as(latents))
        return TrajectoryGroups(
            prompt_embeds=inputs.prompt_embeds.repeat(self.num_generations),
            weights=torch.ones(shape[:2], device=device),
            **scores,
            step_indices=torch.tensor(self.step_indices),
            latents=parents,
            next_latents=children,
            means=means,
            final_latents=latents,
        )


def group_metrics(rollout: Rollout) -> dict[str, torch.Tensor]:
    """
    Metrics of the rewards of several samples per prompt.

    Args:
        rollout ([`~rollouts.base.Rollout`]): with `rewards` of shape `(B, num_generations)`.

    Returns:
        `dict[str, torch.Tensor]` of shape `(B,)`: `reward` and `reward_std` over the samples of a prompt;
            `frac_reward_zero_std`, 1 where all of them are rewarded alike; and mean and deviation of each reward, if there
            are several.
    """
    rewards = rollout.logged_rewards
    metrics = {
        "reward": rewards.mean(1),
        "reward_std": rewards.std(1),
        "frac_reward_zero_std": (rewards.amax(1) == rewards.amin(1)).float(),
    }
    if len(rollout.reward_parts) > 1:
        for name, scores in rollout.reward_parts.items():
            metrics[f"rewards/{name}/mean"] = scores.mean(1)
            metrics[f"rewards/{name}/std"] = scores.std(1)
    return metrics
