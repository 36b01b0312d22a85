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

"""What every trainer with rollouts stores of one, and hands to its loss in chunks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch

from ..policies import PromptEmbeddings


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

    of_levels: ClassVar[
        tuple[str, ...]
    ]  # fields that have the n noise levels as their first dimension, beside `weights`

    @property
    def num_examples(self) -> int:
        """n x N."""
        return self.weights.numel()

    def transitions(self, chunk_size: int, keep_reference: bool = False) -> Iterator["Transitions"]:
        """
        All n x N examples, noise level by noise level, in chunks of at most `chunk_size`. Each is made when it is asked
        for, where the rollout is stored.

        Args:
            chunk_size (`int`): examples in a chunk.
            keep_reference (`bool`, *optional*, defaults to `False`):
                Whether chunks leave the velocities of the reference with the rollout, and find those that were left by
                the same chunk of an earlier pass. As the latents are the same and so is the batch they are in, they are
                what the reference would compute again, bit for bit.
        """
        for chunk in torch.arange(self.num_examples).split(chunk_size):
            level, row = chunk // self.weights.shape[1], chunk % self.weights.shape[1]
            transitions = replace(self._examples(level, row), share=len(chunk) / self.num_examples)
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
        ref_velocity (`torch.Tensor`, *optional*): velocity of the reference at the latents of the examples, if it is known.
        keep_ref_velocity (`Callable`, *optional*): takes that velocity for a later pass over the rollout.
    """

    prompt_embeds: PromptEmbeddings
    weights: torch.Tensor
    step_indices: torch.Tensor | None = None
    share: float = 1.0
    ref_velocity: torch.Tensor | None = None
    keep_ref_velocity: Callable[[torch.Tensor], None] | None = None

    on_device: ClassVar[tuple[str, ...]]  # fields that the device of the training gets

    def to(self, device: torch.device | str) -> "Transitions":
        """The same on another device, but for what is only looked up on the CPU."""
        moved = {name: getattr(self, name).to(device) for name in ("prompt_embeds", "weights", *self.on_device)}
        if self.ref_velocity is not None:
            moved["ref_velocity"] = self.ref_velocity.to(device)
        return replace(self, **moved)

    @abstractmethod
    def describe_loss(self, prompts: list[str], index: tuple[int, ...]) -> str:
        """What the loss of an example is, in words. `prompts` are those of the examples."""
