# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""A stored rollout, its mini-batches, and the sampler that makes it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from tqdm.auto import tqdm

from ..policies import FlowPolicy, PromptEmbeddings
from ..profiling import StageTimer
from ..rewards.candidates import CleanSamples
from ..rewards.scoring import WeightedReward
from ..schedulers import FlowMatchSDEScheduler


@dataclass(kw_only=True)
class Rollout(ABC):
    """
    What grew from a batch of B prompts: examples of a loss, N at each of n noise levels. Row i of the N belongs to the
    prompt i % B.

    Args:
        prompt_embeds ([`PromptEmbeddings`]):
            Embeddings of the N prompts.
        weights (`torch.Tensor` of shape `(n, N)`):
            Weight of each example in the loss.
        rewards (`torch.Tensor`):
            Rewards of all that was scored.
        reward_parts (`dict[str, torch.Tensor]`):
            The same as `rewards` for each reward by name.
        ref_velocities (`dict[tuple[int, int], torch.Tensor]`, *optional*):
            Velocities of the reference, by the first and the last example of a chunk, see [`~Rollout.transitions`].
    """

    prompt_embeds: PromptEmbeddings
    weights: torch.Tensor
    rewards: torch.Tensor
    reward_parts: dict[str, torch.Tensor] = field(default_factory=dict)
    ref_velocities: dict[tuple[int, int], torch.Tensor] | None = None

    of_levels: ClassVar[tuple[str, ...]]  # fields whose first dimension is the n noise levels, beside `weights`
    former_names: ClassVar[tuple[str, ...]] = ()  # of the class in the checkpoints of earlier versions

    @property
    def num_examples(self) -> int:
        """n x N."""
        return self.weights.numel()

    def transitions(
        self,
        chunk_size: int,
        prompts: list[str] | None = None,
        num_real: int | None = None,
        keep_reference: bool = False,
    ) -> Iterator["Transitions"]:
        """
        All n x N examples, noise level by noise level, in chunks of at most `chunk_size`. Each is made when it is asked
        for, where the rollout is stored.

        Args:
            chunk_size (`int`): examples in a chunk.
            prompts (`list[str]`, *optional*): the B prompts, of which each chunk gets its own.
            num_real (`int`, *optional*): how many of the prompts are not padding. All by default.
            keep_reference (`bool`, *optional*, defaults to `False`):
                Whether chunks leave the velocities of the reference with the rollout, and find those that were left by
                the same chunk of an earlier pass. As the latents are the same and so is the batch they are in, they are
                what the reference would compute again, bit for bit.
        """
        for chunk in torch.arange(self.num_examples).split(chunk_size):
            level, row = chunk // self.weights.shape[1], chunk % self.weights.shape[1]
            transitions = replace(self._examples(level, row), share=len(chunk) / self.num_examples)
            if prompts is not None:
                transitions.prompts = [prompts[index] for index in row % len(prompts)]
                if num_real is not None:
                    transitions.is_real = row % len(prompts) < num_real
            if keep_reference:
                key = (chunk[0].item(), chunk[-1].item())
                transitions.ref_velocity = (self.ref_velocities or {}).get(key)
                transitions.keep_ref_velocity = partial(self._keep, key)
            yield transitions

    def of_step(self, step: int) -> "Rollout":
        """The examples of noise level number `step` alone."""
        only = slice(step, step + 1)
        return replace(self, **{name: getattr(self, name)[only] for name in ("weights", *self.of_levels)})

    def _keep(self, key: tuple[int, int], ref_velocity: torch.Tensor) -> None:
        self.ref_velocities = (self.ref_velocities or {}) | {key: ref_velocity.to(self.storage)}

    @property
    @abstractmethod
    def storage(self) -> torch.device:
        """Where latents are kept until they are trained on."""

    @abstractmethod
    def _examples(self, level: torch.Tensor, row: torch.Tensor) -> "Transitions":
        """Examples of the noise levels and rows, `torch.LongTensor` of shape `(num_examples,)`."""

    @abstractmethod
    def describe_reward(self, prompts: list[str], index: tuple[int, ...]) -> str:
        """What `rewards[index]` is, in words. `prompts` are the B prompts."""

    def _name_reward(self, index: tuple[int, ...]) -> str:
        """The reward that is not finite at `index`, by its name if there are several."""
        names = [name for name, scores in self.reward_parts.items() if not scores[index].isfinite()]
        return f"the reward `{names[0]}`" if names else "the reward"


@dataclass(kw_only=True)
class Transitions(ABC):
    """
    Examples of a loss.

    Args:
        prompt_embeds ([`PromptEmbeddings`]): one prompt per example.
        weights (`torch.Tensor` of shape `(num_examples,)`): weight of each in the loss.
        step_indices (`torch.LongTensor` of shape `(num_examples,)`, *optional*): sampling step of each, on the CPU, where
            the loss is one of sampling steps.
        share (`float`, *optional*, defaults to `1.0`): share of the rollout's examples that are in this chunk.
        prompts (`list[str]`, *optional*): the prompt of each, for messages.
        is_real (`torch.BoolTensor` of shape `(num_examples,)`, *optional*): which are not padding, on the CPU. All by default.
        ref_velocity (`torch.Tensor`, *optional*): velocity of the reference at the latents of the examples, if it is known.
        keep_ref_velocity (`Callable`, *optional*): takes that velocity for a later pass over the rollout.
    """

    prompt_embeds: PromptEmbeddings
    weights: torch.Tensor
    step_indices: torch.Tensor | None = None
    share: float = 1.0
    prompts: list[str] | None = None
    is_real: torch.Tensor | None = None
    ref_velocity: torch.Tensor | None = None
    keep_ref_velocity: Callable[[torch.Tensor], None] | None = None

    on_device: ClassVar[tuple[str, ...]]  # fields that the device of the training gets

    def to(self, device: torch.device | str) -> "Transitions":
        """The same on another device, but for what is only looked up on the CPU."""
        moved = {name: getattr(self, name).to(device) for name in ("prompt_embeds", "weights", *self.on_device)}
        if self.ref_velocity is not None:
            moved["ref_velocity"] = self.ref_velocity.to(device)
        return replace(self, **moved)

    @property
    def counts(self) -> torch.Tensor:
        """Which examples count, `torch.BoolTensor` of shape `(num_examples,)` on the CPU."""
        counts = self.weights.cpu() > 0
        return counts if self.is_real is None else counts & self.is_real

    @abstractmethod
    def describe_loss(self, index: tuple[int, ...]) -> str:
        """What the loss of an example is, in words, with its prompt."""


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
