# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""A stored rollout, its mini-batches and their metrics, the sampler that makes it, and what is trained on several times."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm.auto import tqdm

from ..policies import FlowPolicy, PromptEmbeddings
from ..profiling import StageTimer
from ..rewards.scoring import CleanSamples, WeightedReward
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
            Weight of each example in the loss, 0 for one that does not count.
        rewards (`torch.Tensor`):
            Rewards of all that was scored.
        reward_parts (`dict[str, torch.Tensor]`):
            The same for each reward by name.
        raw_rewards (`torch.Tensor`, *optional*):
            Weighted sum of `reward_parts`, from which `rewards` differ with `standardize_rewards`. `rewards` by default.
        ref_velocities (`dict[tuple[int, int], torch.Tensor]`, *optional*):
            Velocities of the reference, by the first and the last example of a chunk, see [`~Rollout.transitions`].
        examples (`torch.LongTensor`, *optional*):
            Examples to train on, number l N + i for row i of noise level l. All by default.
    """

    prompt_embeds: PromptEmbeddings
    weights: torch.Tensor
    rewards: torch.Tensor
    reward_parts: dict[str, torch.Tensor] = field(default_factory=dict)
    raw_rewards: torch.Tensor | None = None
    ref_velocities: dict[tuple[int, int], torch.Tensor] | None = None
    examples: torch.Tensor | None = None

    # Fields whose first dimension is the n noise levels; the last one are latents
    of_levels: ClassVar[tuple[str, ...]]
    former_names: ClassVar[tuple[str, ...]] = ()  # of the class in the checkpoints of earlier versions

    @property
    def num_examples(self) -> int:
        """n x N, or the number of `examples`."""
        return self.weights.numel() if self.examples is None else len(self.examples)

    @property
    def logged_rewards(self) -> torch.Tensor:
        """The rewards before `standardize_rewards`, which makes their mean 0."""
        return self.rewards if self.raw_rewards is None else self.raw_rewards

    def transitions(
        self,
        chunk_size: int,
        prompts: list[str] | None = None,
        num_real: int | None = None,
        keep_reference: bool = False,
    ) -> Iterator["Transitions"]:
        """
        All examples, noise level by noise level, in chunks of at most `chunk_size`. Each is made when it is asked for, where
        the rollout is stored.

        Args:
            chunk_size (`int`): examples in a chunk.
            prompts (`list[str]`, *optional*): the B prompts, of which each chunk gets its own.
            num_real (`int`, *optional*): how many of the prompts are not padding. All by default.
            keep_reference (`bool`, *optional*, defaults to `False`):
                Whether chunks leave the velocities of the reference with the rollout, and find those that were left by
                the same chunk of an earlier pass. As the latents are the same and so is the batch they are in, they are
                what the reference would compute again, bit for bit.
        """
        examples = torch.arange(self.num_examples) if self.examples is None else self.examples
        for chunk in examples.split(chunk_size):
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
        levels = {name: getattr(self, name) for name in ("weights", *self.of_levels)}
        return replace(self, **{name: values[only] for name, values in levels.items() if values is not None})

    def _keep(self, key: tuple[int, int], ref_velocity: torch.Tensor) -> None:
        self.ref_velocities = (self.ref_velocities or {}) | {key: ref_velocity.to(self.storage)}

    @property
    def storage(self) -> torch.device:
        """Where latents are kept until they are trained on."""
        return getattr(self, self.of_levels[-1]).device

    @abstractmethod
    def _examples(self, level: torch.Tensor, row: torch.Tensor) -> "Transitions":
        """Examples of the noise levels and rows, `torch.LongTensor` of shape `(num_examples,)`."""

    def describe_reward(self, prompts: list[str], index: tuple[int, ...]) -> str:
        """What `rewards[index]` is, in words. `prompts` are the B prompts."""
        prompt, sample = index
        return f"{self._name_reward(index)} of sample {sample} for the prompt {prompts[prompt]!r}"

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
        values = {name: getattr(self, name) for name in ("prompt_embeds", "weights", "ref_velocity", *self.on_device)}
        return replace(self, **{name: value.to(device) for name, value in values.items() if value is not None})

    @property
    def counts(self) -> torch.Tensor:
        """Which examples count, `torch.BoolTensor` of shape `(num_examples,)` on the CPU."""
        counts = self.weights.cpu() > 0
        return counts if self.is_real is None else counts & self.is_real

    def outline(self) -> "Transitions":
        """The same without what takes memory: enough for [`~Transitions.describe_loss`]."""
        heavy = {"prompt_embeds", "ref_velocity", "keep_ref_velocity", *self.on_device} - {"sigmas"}
        return replace(self, **dict.fromkeys(heavy))

    def describe_loss(self, index: tuple[int, ...]) -> str:
        """What the loss of an example is, in words, with its prompt."""
        return f"the loss for the prompt {self.prompts[index[0]]!r} at step {self.step_indices[index].item()}"


@dataclass(frozen=True)
class RolloutInputs:
    """
    What a rollout is made of.

    Args:
        model (`torch.nn.Module`): the policy's network.
        prompts (`list[str]`): B prompts.
        prompt_embeds ([`PromptEmbeddings`]): their embeddings, on the device of the rollout.
        negative_prompt_embeds ([`PromptEmbeddings`], *optional*): a single embedding, for guidance.
        generators (`list[torch.Generator]`): one per prompt, on the CPU: its noise depends on nothing else.
        columns (`dict[str, list]`): further columns of the dataset, for pixel rewards.
    """

    model: torch.nn.Module
    prompts: list[str]
    prompt_embeds: PromptEmbeddings
    negative_prompt_embeds: PromptEmbeddings | None
    generators: list[torch.Generator]
    columns: dict[str, list[Any]]

    def randn(self, *shape: int) -> torch.Tensor:
        """Standard normal noise `(B, *shape)`, row b from generator b, on the device of the rollout."""
        return randn(self.generators, shape, self.prompt_embeds.device)


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
            Guidance scale, see [`~FlowPolicy.velocity`].
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

    @torch.no_grad()
    def sample(
        self,
        model: torch.nn.Module,
        prompts: list[str],
        prompt_embeds: PromptEmbeddings,
        negative_prompt_embeds: PromptEmbeddings | None,
        generators: list[torch.Generator],
        columns: dict[str, list[Any]] | None = None,
    ) -> Rollout:
        """Make the rollout of a batch of prompts. The arguments are those of [`RolloutInputs`]."""
        return self.run(
            RolloutInputs(model, prompts, prompt_embeds, negative_prompt_embeds, generators, columns or {})
        )

    @abstractmethod
    def run(self, inputs: RolloutInputs) -> Rollout:
        """Make the rollout of a batch of prompts, without gradients."""

    def steps(self) -> Iterable[int]:
        """The sampling steps, with a progress bar."""
        return tqdm(
            range(self.scheduler.num_inference_steps),
            desc="Rollout",
            delay=10,
            leave=False,
            disable=not self.show_progress,
        )

    def velocity(self, inputs: RolloutInputs, latents: torch.Tensor, index: int, guided: bool = True) -> torch.Tensor:
        """Velocity of several trajectories per prompt, `(trajectories, B, *latent_shape)`, in one forward."""
        scale = self.guidance_scale if guided else self.policy.unguided(self.guidance_scale)
        prompts = (inputs.prompt_embeds.repeat(len(latents)), inputs.negative_prompt_embeds)
        with self.timer.stage("policy", latents=latents.shape[:2].numel()):
            sigma = self.scheduler.sigma(index)
            velocity = self.policy.velocity(inputs.model, latents.flatten(0, 1), sigma, *prompts, scale)
        return velocity.view_as(latents)

    def score(self, inputs: RolloutInputs, latents: torch.Tensor, noise: torch.Tensor) -> dict[str, Any]:
        """
        Rewards of final samples.

        Args:
            inputs ([`RolloutInputs`]): B prompts.
            latents (`torch.Tensor` of shape `(num_generations, B, *latent_shape)`): clean latents.
            noise (`torch.Tensor`, shaped as `latents`): the noise that they come from.

        Returns:
            `dict`: `rewards`, `raw_rewards` and `reward_parts` of a [`Rollout`], of shape `(B, num_generations)` each.
        """
        times, batch_size = latents.shape[:2]
        samples = CleanSamples(
            latents=latents.flatten(0, 1),
            initial_noise=noise.flatten(0, 1),
            prompts=inputs.prompts * times,
            prompt_embeds=inputs.prompt_embeds.repeat(times),
            columns={name: values * times for name, values in inputs.columns.items()},
        )
        with self.timer.stage("reward", latents=len(samples)):
            rewards = self.reward(samples)
        parts = {name: part.view(times, batch_size).T for name, part in self.reward.last_scores.items()}
        sums = {"rewards": rewards, "raw_rewards": self.reward.last_sum}
        return {name: values.view(times, batch_size).T for name, values in sums.items()} | {"reward_parts": parts}


def randn(generators: list[torch.Generator], shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Standard normal noise, row b from generator b, drawn on the CPU so that it is the same on every device."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)


def metrics_of_steps(
    step_indices: torch.Tensor | None,
    metrics: dict[str, torch.Tensor],
    by_step: dict[str, torch.Tensor],
    counts: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """
    Metrics of examples, of all together and of each step.

    Args:
        step_indices (`torch.LongTensor` of shape `(num_examples,)`, *optional*): step of each example, on the CPU.
        metrics (`dict[str, torch.Tensor]`): of shape `(num_examples,)` each.
        by_step (`dict[str, torch.Tensor]`): the same, of those that are logged for each step.
        counts (`torch.BoolTensor` of shape `(num_examples,)`): which examples count, on the CPU.

    Returns:
        `dict[str, torch.Tensor]`: `metrics`, and `step_XX/{name}` of `by_step`.
    """
    steps = {}
    for index in step_indices.unique().tolist() if by_step else ():
        chosen = ((step_indices == index) & counts).nonzero().flatten()
        steps |= {f"step_{index:02d}/{name}": values[chosen.to(values.device)] for name, values in by_step.items()}
    if counts.all():
        return metrics | steps
    counted = counts.nonzero().flatten()
    return {name: values[counted.to(values.device)] for name, values in metrics.items()} | steps


class RolloutBuffer:
    """
    The rollouts of an optimizer step, one per batch, which `num_iterations` steps in a row are trained on.

    Args:
        num_iterations (`int`): optimizer steps per rollout.

    Attributes:
        rollouts (`list[tuple[list[int], Rollout]]`): rows of the dataset, and what grew from them.
    """

    def __init__(self, num_iterations: int):
        self.num_iterations = num_iterations
        self.rollouts: list[tuple[list[int], Rollout]] = []
        self._step, self._next = -1, 0

    def begin(self, step: int, load: Callable[[], list[tuple[list[int], Rollout]]]) -> bool:
        """
        Go on to an optimizer step, if it is a new one: drop what is used up, or `load` what an interrupted run left.

        Returns:
            `bool`: whether it is a new one.
        """
        if step == self._step:
            return False
        self._step, self._next = step, 0
        if step % self.num_iterations == 0:
            self.rollouts = []
        elif not self.rollouts:
            self.rollouts = load()
        return True

    @property
    def is_used_up(self) -> bool:
        """Whether the next batch needs a new rollout."""
        return self._next == len(self.rollouts)

    def take(self, rows: list[int]) -> Rollout:
        """The rollout of the next batch, which has these rows of the dataset."""
        stored_rows, rollout = self.rollouts[self._next]
        self._next += 1
        if stored_rows != rows:
            raise RuntimeError(f"The rollout of rows {stored_rows} is up for reuse, but the batch has rows {rows}.")
        return rollout

    def forget_reference(self) -> None:
        """Drop velocities of the reference, which has changed."""
        for _, rollout in self.rollouts:
            rollout.ref_velocities = None


def save_rollouts(folder: str | Path, process: int, rollouts: list[tuple[list[int], Rollout]]) -> None:
    """
    Write the rollouts of a process into a checkpoint that lies between two updates from them.

    Args:
        folder (`str` or `Path`): the checkpoint.
        process (`int`): index of the process.
        rollouts (`list[tuple[list[int], Rollout]]`): rows of the dataset, and what grew from them.
    """
    torch.save(rollouts, _file(folder, process))


def load_rollouts(
    folder: str | Path, process: int, device: torch.device, rollout_class: type[Rollout]
) -> list[tuple[list[int], Rollout]]:
    """
    Read what [`save_rollouts`] wrote. Tensors that were on the CPU stay there.

    Args:
        folder (`str` or `Path`): the checkpoint.
        process (`int`): index of the process.
        device (`torch.device`): where the others go.
        rollout_class (`type`): the class of the rollouts. No other is loaded.

    Raises:
        ValueError: if the checkpoint has none.
    """
    file = _file(folder, process)
    if not file.is_file():
        raise ValueError(
            f"The run cannot go on from {folder} exactly: it lies between two updates from the same rollouts, but "
            f"`{file.name}` is missing. Was `num_iterations` or the number of processes another one? Go on from a "
            "checkpoint whose step is a multiple of `num_iterations`."
        )

    def place(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        target = location if location == "cpu" else str(device)
        return torch.serialization.default_restore_location(storage, target)

    former = [(rollout_class, name) for name in rollout_class.former_names]
    former.append((PromptEmbeddings, "tapo_trl.policies.base.PromptEmbeddings"))
    with torch.serialization.safe_globals([rollout_class, PromptEmbeddings, *former]):
        return torch.load(file, map_location=place, weights_only=True)


def _file(folder: str | Path, process: int) -> Path:
    return Path(folder) / f"rollouts_{process}.pt"
