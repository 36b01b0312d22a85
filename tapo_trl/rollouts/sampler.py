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

"""What all rollouts are made of: noise, velocities, and steps."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from ..policies import FlowPolicy, PromptEmbeddings
from ..profiling import StageTimer
from ..rewards.candidates import CleanSamples
from ..rewards.scoring import WeightedReward
from ..schedulers import FlowMatchSDEScheduler
from .rollout import Rollout


@dataclass(kw_only=True)
class RolloutSampler(ABC):
    """
    Draws samples of prompts and scores them.

    Args:
        policy ([`FlowPolicy`]):
            Model family.
        scheduler ([`FlowMatchSDEScheduler`]):
            Scheduler with its grid of T steps set, on the device of the rollout.
        reward ([`WeightedReward`]):
            Scores candidates, or final samples.
        latent_shape (`tuple[int, ...]`):
            Shape of one latent.
        guidance_scale (`float`, *optional*, defaults to `1.0`):
            Scale of classifier-free guidance, none if at most 1.
        store_on (`torch.device` or `str`, *optional*):
            Where the transitions are kept, such as `"cpu"` for videos. Defaults to the device of the rollout.
        show_progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar over the sampling steps of rollouts that take longer than 10 seconds.
        timer ([`~profiling.StageTimer`], *optional*):
            Measures where the time goes, if enabled.
    """

    policy: FlowPolicy
    scheduler: FlowMatchSDEScheduler
    reward: WeightedReward
    latent_shape: tuple[int, ...]
    guidance_scale: float = 1.0
    store_on: torch.device | str | None = None
    show_progress: bool = False
    timer: StageTimer = field(default_factory=StageTimer)

    @abstractmethod
    def sample(
        self,
        model: torch.nn.Module,
        prompts: list[str],
        prompt_embeds: PromptEmbeddings,
        negative_prompt_embeds: PromptEmbeddings | None,
        generators: list[torch.Generator],
        columns: dict[str, list[Any]] | None = None,
    ) -> Rollout:
        """
        Make the rollout of a batch of prompts.

        Args:
            model (`torch.nn.Module`): the policy's network.
            prompts (`list[str]`): B prompts.
            prompt_embeds ([`PromptEmbeddings`]): their embeddings, on the device of the rollout.
            negative_prompt_embeds ([`PromptEmbeddings`], *optional*): a single embedding, for guidance.
            generators (`list[torch.Generator]`): one per prompt, on the CPU: its noise depends on nothing else.
            columns (`dict[str, list]`, *optional*): further columns of the dataset, for pixel rewards.
        """

    def steps(self) -> Iterable[int]:
        """The sampling steps, with a progress bar."""
        return tqdm(
            range(self.scheduler.num_inference_steps),
            desc="Rollout",
            delay=10,
            leave=False,
            disable=not self.show_progress,
        )

    def velocity(
        self,
        model: torch.nn.Module,
        latents: torch.Tensor,
        index: int,
        embeds: PromptEmbeddings,
        negative_embeds: PromptEmbeddings | None,
    ) -> torch.Tensor:
        """Velocity of several trajectories per prompt, `(trajectories, B, *latent_shape)`, in one forward."""
        with self.timer.stage("policy", latents=latents.shape[:2].numel()):
            velocity = self.policy.velocity(
                model,
                latents.flatten(0, 1),
                self.scheduler.sigma(index),
                embeds.repeat(len(latents)),
                negative_embeds,
                self.guidance_scale,
            )
        return velocity.view_as(latents)

    def score(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        prompts: list[str],
        embeds: PromptEmbeddings,
        columns: dict[str, list[Any]],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Rewards of final samples.

        Args:
            latents (`torch.Tensor` of shape `(num_generations, B, *latent_shape)`): clean latents.
            noise (`torch.Tensor`, shaped as `latents`): the noise that they come from.
            prompts (`list[str]`): B prompts.
            embeds ([`PromptEmbeddings`]): their embeddings.
            columns (`dict[str, list]`): further columns of the dataset.

        Returns:
            `tuple`: rewards of shape `(B, num_generations)`, and the same of each reward by name.
        """
        times, batch_size = latents.shape[:2]
        samples = CleanSamples(
            latents=latents.flatten(0, 1),
            initial_noise=noise.flatten(0, 1),
            prompts=prompts * times,
            prompt_embeds=embeds.repeat(times),
            columns={name: values * times for name, values in columns.items()},
        )
        with self.timer.stage("reward", latents=len(samples)):
            rewards = self.reward(samples)
        parts = {name: part.view(times, batch_size).T for name, part in self.reward.last_scores.items()}
        return rewards.view(times, batch_size).T, parts


def randn(generators: list[torch.Generator], shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Standard normal noise, row b from generator b, drawn on the CPU so that it is the same on every device."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
