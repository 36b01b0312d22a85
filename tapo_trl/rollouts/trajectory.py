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

from dataclasses import dataclass, field

import torch

from ..policies import PromptEmbeddings


WIN, LOSE = 0, 1


@dataclass
class TrajectoryPairs:
    """
    Winning and losing trajectories of a batch of prompts, at their n stochastic steps.

    Args:
        prompt_embeds ([`PromptEmbeddings`]):
            Embeddings of the B prompts.
        step_indices (`torch.LongTensor` of shape `(n,)`):
            Index of each stochastic step, on the CPU.
        latents (`torch.Tensor` of shape `(n, 2, B, *latent_shape)`):
            x_t before each step, of the winning (0) and the losing (1) branch, float32.
        next_latents (`torch.Tensor` of shape `(n, 2, B, *latent_shape)`):
            The candidate that was kept, x_{t-1} of Eq. 13.
        rewards (`torch.Tensor` of shape `(n, 2, B, P)`):
            Rewards of all candidates.
        final_latents (`torch.Tensor` of shape `(2, B, *latent_shape)`):
            Clean latents at the end of both branches.
        reward_parts (`dict[str, torch.Tensor]`):
            The same as `rewards` for each reward by name.
    """

    prompt_embeds: PromptEmbeddings
    step_indices: torch.Tensor
    latents: torch.Tensor
    next_latents: torch.Tensor
    rewards: torch.Tensor
    final_latents: torch.Tensor
    reward_parts: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def num_pairs(self) -> int:
        """Number of transition pairs, n x B."""
        return self.latents.shape[0] * self.latents.shape[2]

    def transitions(self, chunk_size: int) -> list["TransitionPairs"]:
        """All n x B transition pairs, step by step, in chunks of at most `chunk_size`."""
        num_prompts = self.latents.shape[2]
        pairs = torch.arange(self.num_pairs)
        return [
            TransitionPairs(
                prompt_embeds=self.prompt_embeds[chunk % num_prompts],
                step_indices=self.step_indices[chunk // num_prompts],
                latents=self.latents[chunk // num_prompts, :, chunk % num_prompts].transpose(0, 1),
                next_latents=self.next_latents[chunk // num_prompts, :, chunk % num_prompts].transpose(0, 1),
                share=len(chunk) / self.num_pairs,
            )
            for chunk in pairs.split(chunk_size)
        ]


@dataclass
class TransitionPairs:
    """
    Pairs of transitions x_t -> x_{t-1}, the examples of Eq. 13. Each branch keeps its own parent x_t.

    Args:
        prompt_embeds ([`PromptEmbeddings`]): one prompt per pair.
        step_indices (`torch.LongTensor` of shape `(num_pairs,)`): step of each pair, on the CPU.
        latents (`torch.Tensor` of shape `(2, num_pairs, *latent_shape)`): x_t of the winning and the losing branch.
        next_latents (`torch.Tensor` of shape `(2, num_pairs, *latent_shape)`): x_{t-1}.
        share (`float`): share of the rollout's pairs that are in this chunk.
    """

    prompt_embeds: PromptEmbeddings
    step_indices: torch.Tensor
    latents: torch.Tensor
    next_latents: torch.Tensor
    share: float
