# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Rollouts that make preference pairs: trajectory advantage sampling, Algorithm 1 and Eq. 10-12 of the paper, and kin."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..policies import PromptEmbeddings
from ..rewards.candidates import Candidates
from ..schedulers import draw_candidates
from .base import Rollout, RolloutSampler, Transitions, randn
from .pairing import PAIRINGS, Pairing


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
    former_names: ClassVar[tuple[str, ...]] = ("tapo_trl.rollouts.trajectory.TrajectoryPairs",)

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

    def describe_loss(self, index: tuple[int, ...]) -> str:
        return f"the loss for the prompt {self.prompts[index[0]]!r} at step {self.step_indices[index].item()}"


@dataclass(kw_only=True)
class TAPOSampler(RolloutSampler):
    """
    Grows a winning and a losing trajectory per prompt, or what else the pairing asks for.

    Both start from the same noise and are one trajectory until the first stochastic step. At each of the n stochastic
    steps every branch draws P candidates from one prediction; the winning branch keeps its best candidate, the losing
    branch its worst (Eq. 12). All other steps follow the ODE.

    Args:
        step_indices (`list[int]`):
            Stochastic steps W_T, see [`sde_step_indices`].
        num_candidates (`int`):
            P, at least 2.
        pairing ([`~rollouts.pairing.Pairing`], *optional*):
            Which candidates make a pair and which are kept. TAPO's by default.
        reference (`Callable`, *optional*):
            `model -> context manager` that yields the reference network; needed by the `"reference"` velocity target.
        score_batch_size (`int`, *optional*):
            Candidates per forward where a reward asks for their velocity. All at once by default.

    The others are those of [`~rollouts.sampler.RolloutSampler`].
    """

    step_indices: list[int]
    num_candidates: int
    pairing: Pairing = PAIRINGS["tapo"]
    reference: Callable[[torch.nn.Module], AbstractContextManager[torch.nn.Module]] | None = None
    score_batch_size: int | None = None

    @torch.no_grad()
    def sample(
        self,
        model: torch.nn.Module,
        prompts: list[str],
        prompt_embeds: PromptEmbeddings,
        negative_prompt_embeds: PromptEmbeddings | None,
        generators: list[torch.Generator],
        columns: dict[str, list[Any]] | None = None,
    ) -> TrajectoryPairs:
        """
        Run Algorithm 1, lines 4-13, for a batch of prompts.

        Args:
            model (`torch.nn.Module`): the policy's network.
            prompts (`list[str]`): B prompts.
            prompt_embeds ([`PromptEmbeddings`]): their embeddings, on the device of the rollout.
            negative_prompt_embeds ([`PromptEmbeddings`], *optional*): a single embedding, for guidance.
            generators (`list[torch.Generator]`): one per prompt, on the CPU: its noise depends on nothing else.
            columns (`dict[str, list]`, *optional*): further columns of the dataset, for pixel rewards.

        Returns:
            [`TrajectoryPairs`]
        """
        batch_size, device = len(prompts), prompt_embeds.device
        noise = randn(generators, self.latent_shape, device)
        latents = noise.unsqueeze(0)  # (branches, B, *latent_shape): one branch until the first stochastic step
        velocity = None
        pairing, branches = self.pairing, self.pairing.num_branches
        steps, stds, rewards, pair_rewards, parts = [], [], [], [], []
        shape = (pairing.pairs_per_prompt * batch_size, *self.latent_shape)
        parents = torch.empty(len(self.step_indices), pairing.num_parents, *shape, device=self.store_on or device)
        pairs = torch.empty(len(self.step_indices), 2, *shape, device=self.store_on or device)

        for index in self.steps():
            if velocity is None:
                velocity = self.velocity(model, latents, index, prompt_embeds, negative_prompt_embeds)

            if index not in self.step_indices:
                latents = self.scheduler.ode_step(latents, velocity, index)
                velocity = None
                continue

            latents, velocity = latents.expand(branches, *noise.shape), velocity.expand(branches, *noise.shape)
            with self.timer.stage("stochastic steps"):
                mean, std = self.scheduler.sde_mean_std(latents, velocity, index)
                noise_shape = (branches, self.num_candidates, *self.latent_shape)
                step_noise = randn(generators, noise_shape, device).transpose(0, 1)
                next_latents = draw_candidates(mean.flatten(0, 1), std, step_noise.flatten(0, 1))
            candidates = self._candidates(
                model,
                next_latents,
                clean_estimate=latents - self.scheduler.sigma(index) * velocity,
                noise=noise,
                index=index,
                prompts=prompts,
                embeds=prompt_embeds,
                negative_embeds=negative_prompt_embeds,
                columns=columns or {},
            )
            with self.timer.stage("reward", latents=len(candidates)):
                scores = self.reward(candidates).view(branches, batch_size, self.num_candidates)

            with self.timer.stage("selection"):
                selection = pairing.select(scores, generators)
                chosen = _take(candidates.latents, selection.chosen)
                rejected = _take(candidates.latents, selection.rejected)
                parents[len(steps)] = pairing.parents(latents)
                pairs[len(steps)] = pairing.pairs(chosen, rejected)
                latents = _take(candidates.latents, selection.kept)
                velocity = _take(candidates.velocity, selection.kept) if candidates.has_velocity else None
            pair_rewards.append(pairing.pairs(scores.amax(-1), scores.amin(-1)))
            rewards.append(scores)
            parts.append({name: part.view_as(scores) for name, part in self.reward.last_scores.items()})
            steps.append(index)
            stds.append(std.flatten()[0])

        pair_rewards, final_rewards = torch.stack(pair_rewards), None
        if pairing.consistent:
            of_prompts, _ = self.score(latents, noise.expand_as(latents), prompts, prompt_embeds, columns or {})
            final_rewards = of_prompts.T
        return TrajectoryPairs(
            prompt_embeds=prompt_embeds.repeat(pairing.pairs_per_prompt),
            step_indices=torch.tensor(steps),
            latents=parents,
            next_latents=pairs,
            pair_rewards=pair_rewards,
            weights=pairing.weights(pair_rewards, torch.stack(stds), final_rewards),
            rewards=torch.stack(rewards),
            final_latents=latents,
            reward_parts={name: torch.stack([part[name] for part in parts]) for name in self.reward.names},
        )

    def _candidates(
        self, model, latents, clean_estimate, noise, index, prompts, embeds, negative_embeds, columns
    ) -> Candidates:
        """`latents` of shape `(branches B, P, *latent_shape)` with all that a reward may look at, as `branches B P` rows."""
        branches = self.pairing.num_branches
        latents = latents.flatten(0, 1)
        sigma = self.scheduler.sigma(index + 1)
        embeds = embeds.repeat(branches).repeat_interleave(self.num_candidates)

        def predict(network: torch.nn.Module, *guidance) -> torch.Tensor:
            size = self.score_batch_size or len(latents)
            chunks = [slice(start, start + size) for start in range(0, len(latents), size)]
            with self.timer.stage("policy", latents=len(latents)):
                velocities = [
                    self.policy.velocity(network, latents[chunk], sigma, embeds[chunk], *guidance) for chunk in chunks
                ]
            return torch.cat(velocities)

        def predict_reference() -> torch.Tensor:
            with self.reference(model) as network:
                # Without classifier-free guidance, as the target of an SLRM's training
                return predict(network, None, self.policy.unguided(self.guidance_scale))

        def per_candidate(values: list) -> list:
            return [value for value in values * branches for _ in range(self.num_candidates)]

        return Candidates(
            latents=latents,
            sigma=sigma,
            clean_estimate=clean_estimate.flatten(0, 1).repeat_interleave(self.num_candidates, dim=0),
            initial_noise=torch.cat([noise] * branches).repeat_interleave(self.num_candidates, dim=0),
            prompts=per_candidate(prompts),
            prompt_embeds=embeds,
            columns={name: per_candidate(values) for name, values in columns.items()},
            predict_velocity=lambda: predict(model, negative_embeds, self.guidance_scale),
            predict_reference_velocity=predict_reference,
        )


def _take(values: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
    """The chosen one of the P rows of each branch and prompt: `(branches B P, ...) -> (branches, B, ...)`."""
    values = values.view(choice.numel(), -1, *values.shape[1:])
    chosen = values[torch.arange(choice.numel(), device=values.device), choice.flatten()]
    return chosen.view(*choice.shape, *values.shape[2:])
