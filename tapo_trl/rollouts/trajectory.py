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

from dataclasses import dataclass
from typing import ClassVar

import torch

from .rollout import Rollout, Transitions


@dataclass(kw_only=True)
class TrajectoryPairs(Rollout):
    """
    Preference pairs of a batch of prompts, N at each of the n stochastic steps.

    Args:
        prompt_embeds ([`PromptEmbeddings`]):
            Embeddings of the N prompts.
        step_indices (`torch.LongTensor` of shape `(n,)`):
            Index of each stochastic step, on the CPU.
        latents (`torch.Tensor` of shape `(n, 2, N, *latent_shape)` or `(n, 1, N, *latent_shape)`):
            x_t before each step, of the winning (0) and the losing (1) side, or one that both share, float32. Not always
            on the device of the rollout, see [`TAPOSampler`].
        next_latents (`torch.Tensor` of shape `(n, 2, N, *latent_shape)`):
            The candidates that make the pair, x_{t-1} of Eq. 13.
        pair_rewards (`torch.Tensor` of shape `(n, 2, N)`):
            Their rewards.
        weights (`torch.Tensor` of shape `(n, N)`):
            Weight of each pair in the loss, 0 for one that does not count.
        rewards (`torch.Tensor` of shape `(n, branches, B, P)`):
            Rewards of all candidates.
        final_latents (`torch.Tensor` of shape `(branches, B, *latent_shape)`):
            Clean latents at the end of each trajectory.
        reward_parts (`dict[str, torch.Tensor]`):
            The same as `rewards` for each reward by name.
        ref_velocities (`dict[tuple[int, int], torch.Tensor]`, *optional*):
            See [`~rollouts.rollout.Rollout`].
    """

    step_indices: torch.Tensor
    latents: torch.Tensor
    next_latents: torch.Tensor
    pair_rewards: torch.Tensor
    final_latents: torch.Tensor

    of_levels: ClassVar[tuple[str, ...]] = ("step_indices", "latents", "next_latents")

    @property
    def num_pairs(self) -> int:
        """Number of transition pairs, n x N."""
        return self.num_examples

    @property
    def storage(self) -> torch.device:
        return self.latents.device

    def _examples(self, level: torch.Tensor, row: torch.Tensor) -> "TransitionPairs":
        return TransitionPairs(
            prompt_embeds=self.prompt_embeds[row],
            step_indices=self.step_indices[level],
            latents=self.latents[level, :, row].transpose(0, 1),
            next_latents=self.next_latents[level, :, row].transpose(0, 1),
            weights=self.weights[level, row],
        )

    def describe_reward(self, prompts: list[str], index: tuple[int, ...]) -> str:
        step, _, prompt, _ = index
        return (
            f"{self._name_reward(index)} of a candidate for the prompt {prompts[prompt]!r} at step "
            f"{self.step_indices[step].item()}"
        )


@dataclass(kw_only=True)
class TransitionPairs(Transitions):
    """
    Pairs of transitions x_t -> x_{t-1}, the examples of Eq. 13. Each side keeps its own parent x_t, or both share one.

    Args:
        prompt_embeds ([`PromptEmbeddings`]): one prompt per pair.
        step_indices (`torch.LongTensor` of shape `(num_pairs,)`): step of each pair, on the CPU.
        latents (`torch.Tensor` of shape `(2, num_pairs, *latent_shape)` or `(1, num_pairs, *latent_shape)`): x_t of the
            winning and the losing side, or of both.
        next_latents (`torch.Tensor` of shape `(2, num_pairs, *latent_shape)`): x_{t-1}.
        weights (`torch.Tensor` of shape `(num_pairs,)`): weight of each pair in the loss.

    The others are those of [`~rollouts.rollout.Transitions`].
    """

    step_indices: torch.Tensor
    latents: torch.Tensor
    next_latents: torch.Tensor

    on_device: ClassVar[tuple[str, ...]] = ("latents", "next_latents")

    @property
    def num_parents(self) -> int:
        """2 if each side of a pair has its own parent, 1 if they share it."""
        return self.latents.shape[0]

    def of_both_sides(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the parents, `(num_parents num_pairs, ...)`, as those of [win; lose], `(2 num_pairs, ...)`."""
        return values if self.num_parents == 2 else values.repeat(2, *[1] * (values.ndim - 1))

    def describe_loss(self, prompts: list[str], index: tuple[int, ...]) -> str:
        return f"the loss for the prompt {prompts[index[0]]!r} at step {self.step_indices[index].item()}"
