# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Rollouts that make preference pairs: trajectory advantage sampling, Algorithm 1 and Eq. 10-12 of the paper, and kin."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..rewards.scoring import Candidates
from ..schedulers import draw_candidates
from .base import Rollout, RolloutInputs, RolloutSampler, Transitions
from .pairing import LOSE, PAIRINGS, WIN, Pairing, Selection


@dataclass(kw_only=True)
class TrajectoryPairs(Rollout):
    """
    Preference pairs of a batch of prompts, N at each of the n stochastic steps.

    Args:
        step_indices (`torch.LongTensor` of shape `(n,)`):
            Index of each stochastic step, on the CPU.
        latents (`torch.Tensor` of shape `(n, 2, N, *latent_shape)` or `(n, 1, N, *latent_shape)`):
            x_t before each step, of the winning (0) and the losing (1) side, or one that both share, float32. Not always
            on the device of the rollout, see [`TAPOSampler`].
        next_latents (`torch.Tensor` of shape `(n, 2, N, *latent_shape)`):
            The candidates that make the pair, x_{t-1} of Eq. 13.
        pair_rewards (`torch.Tensor` of shape `(n, 2, N)`):
            Their rewards.
        rewards (`torch.Tensor` of shape `(n, branches, B, P)`):
            Rewards of all candidates.
        final_latents (`torch.Tensor` of shape `(branches, B, *latent_shape)`):
            Clean latents at the end of each trajectory.
        candidate_means (`torch.Tensor`, *optional*):
            Mean of all candidates of each parent, shaped as `latents`.

    The others are those of [`~rollouts.base.Rollout`].
    """

    step_indices: torch.Tensor
    latents: torch.Tensor
    next_latents: torch.Tensor
    pair_rewards: torch.Tensor
    final_latents: torch.Tensor
    candidate_means: torch.Tensor | None = None

    of_levels: ClassVar[tuple[str, ...]] = ("step_indices", "candidate_means", "latents", "next_latents")
    former_names: ClassVar[tuple[str, ...]] = ("tapo_trl.rollouts.trajectory.TrajectoryPairs",)

    @property
    def num_pairs(self) -> int:
        """Number of transition pairs, n x N."""
        return self.num_examples

    def _examples(self, level: torch.Tensor, row: torch.Tensor) -> "TransitionPairs":
        means = self.candidate_means
        return TransitionPairs(
            prompt_embeds=self.prompt_embeds[row],
            step_indices=self.step_indices[level],
            latents=self.latents[level, :, row].transpose(0, 1),
            next_latents=self.next_latents[level, :, row].transpose(0, 1),
            candidate_means=None if means is None else means[level, :, row].transpose(0, 1),
            weights=self.weights[level, row],
        )

    def _name_reward(self, index: tuple[int, ...]) -> str:
        """The reward that is not finite. One that is NaN for all candidates of the step may be one that does not count there."""
        names = [name for name, scores in self.reward_parts.items() if not scores[index].isfinite()]
        certain = [name for name in names if not self.reward_parts[name][index[0]].isnan().all()]
        if certain or len(names) < 2:
            return f"the reward `{(certain or names)[0]}`" if names else "the reward"
        return f"one of the rewards {names}"

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
        latents (`torch.Tensor` of shape `(2, num_pairs, *latent_shape)` or `(1, num_pairs, *latent_shape)`): x_t of the
            winning and the losing side, or of both.
        next_latents (`torch.Tensor` of shape `(2, num_pairs, *latent_shape)`): x_{t-1}.
        candidate_means (`torch.Tensor`, *optional*): mean of all candidates of each parent, shaped as `latents`.

    The others are those of [`~rollouts.base.Transitions`].
    """

    step_indices: torch.Tensor
    latents: torch.Tensor
    next_latents: torch.Tensor
    candidate_means: torch.Tensor | None = None

    on_device: ClassVar[tuple[str, ...]] = ("latents", "next_latents", "candidate_means")

    @property
    def num_parents(self) -> int:
        """2 if each side of a pair has its own parent, 1 if they share it."""
        return self.latents.shape[0]

    def of_both_sides(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the parents, `(num_parents num_pairs, ...)`, as those of [win; lose], `(2 num_pairs, ...)`."""
        return values if self.num_parents == 2 else values.repeat(2, *[1] * (values.ndim - 1))


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
        keep_candidate_means (`bool`, *optional*, defaults to `False`):
            Whether the pairs come with the mean of all candidates of their parents.

    The others are those of [`~rollouts.base.RolloutSampler`].
    """

    step_indices: list[int]
    num_candidates: int
    pairing: Pairing = PAIRINGS["tapo"]
    reference: Callable[[torch.nn.Module], AbstractContextManager[torch.nn.Module]] | None = None
    score_batch_size: int | None = None
    keep_candidate_means: bool = False

    def run(self, inputs: RolloutInputs) -> TrajectoryPairs:
        """Run Algorithm 1, lines 4-13, for a batch of prompts."""
        noise = inputs.randn(*self.latent_shape)
        record = _Record(self, inputs)
        latents, velocity = noise.unsqueeze(0), None  # one branch until the first stochastic step

        for index in self.steps():
            if velocity is None:
                velocity = self.velocity(inputs, latents, index)
            if index not in self.step_indices:
                latents, velocity = self.scheduler.ode_step(latents, velocity, index), None
                continue

            latents, velocity = (x.expand(self.pairing.num_branches, *noise.shape) for x in (latents, velocity))
            candidates, std = self._draw(inputs, noise, latents, velocity, index)
            with self.timer.stage("reward", latents=len(candidates)):
                scores = self.reward(candidates).view(*latents.shape[:2], self.num_candidates)
            with self.timer.stage("selection"):
                selection = self.pairing.select(scores, inputs.generators)
                record.add(latents, std, candidates, scores, selection)
                latents = _take(candidates.latents, selection.kept)
                velocity = _take(candidates.velocity, selection.kept) if candidates.has_velocity else None

        final_rewards = None
        if self.pairing.consistent:
            final_rewards = self.score(inputs, latents, noise.expand_as(latents))["rewards"].T
        return record.pairs(latents, final_rewards)

    def _draw(
        self,
        inputs: RolloutInputs,
        initial_noise: torch.Tensor,
        parents: torch.Tensor,
        velocity: torch.Tensor,
        index: int,
    ) -> tuple[Candidates, torch.Tensor]:
        """
        P candidates of each of the parents, of shape `(branches, B, *latent_shape)`, as `branches B P` rows with all that a
        reward may look at; and the standard deviation of the step.
        """
        branches = len(parents)
        with self.timer.stage("stochastic steps"):
            mean, std = self.scheduler.sde_mean_std(parents, velocity, index)
            noise = inputs.randn(branches, self.num_candidates, *self.latent_shape).transpose(0, 1)
            latents = draw_candidates(mean.flatten(0, 1), std, noise.flatten(0, 1)).flatten(0, 1)
        sigma = self.scheduler.sigma(index + 1)
        embeds = inputs.prompt_embeds.repeat(branches).repeat_interleave(self.num_candidates)

        def predict(network: torch.nn.Module, *guidance) -> torch.Tensor:
            size = self.score_batch_size or len(latents)
            chunks = [slice(start, start + size) for start in range(0, len(latents), size)]
            with self.timer.stage("policy", latents=len(latents)):
                velocities = [
                    self.policy.velocity(network, latents[chunk], sigma, embeds[chunk], *guidance) for chunk in chunks
                ]
            return torch.cat(velocities)

        def predict_reference() -> torch.Tensor:
            with self.reference(inputs.model) as network:
                return predict(network)  # without a guidance scale, as the target of an SLRM's training

        def per_candidate(values: list) -> list:
            return [value for value in values * branches for _ in range(self.num_candidates)]

        clean_estimate = parents - self.scheduler.sigma(index) * velocity
        candidates = Candidates(
            latents=latents,
            sigma=sigma,
            clean_estimate=clean_estimate.flatten(0, 1).repeat_interleave(self.num_candidates, dim=0),
            initial_noise=torch.cat([initial_noise] * branches).repeat_interleave(self.num_candidates, dim=0),
            prompts=per_candidate(inputs.prompts),
            prompt_embeds=embeds,
            columns={name: per_candidate(values) for name, values in inputs.columns.items()},
            predict_velocity=lambda: predict(inputs.model, inputs.negative_prompt_embeds, self.guidance_scale),
            predict_reference_velocity=predict_reference,
        )
        return candidates, std


class _Record:
    """Collects the pairs of a rollout, step by step."""

    def __init__(self, sampler: TAPOSampler, inputs: RolloutInputs):
        self.pairing, self.reward, self.step_indices = sampler.pairing, sampler.reward, sampler.step_indices
        self.prompt_embeds = inputs.prompt_embeds.repeat(self.pairing.pairs_per_prompt)
        shape = (self.pairing.pairs_per_prompt * len(inputs.prompts), *sampler.latent_shape)
        num_steps, device = len(self.step_indices), sampler.store_on or inputs.prompt_embeds.device
        self.latents = torch.empty(num_steps, self.pairing.num_parents, *shape, device=device)
        self.next_latents = torch.empty(num_steps, 2, *shape, device=device)
        self.candidate_means = torch.empty_like(self.latents) if sampler.keep_candidate_means else None
        self.stds, self.rewards, self.raw_rewards, self.pair_rewards, self.parts = [], [], [], [], []

    def add(
        self,
        parents: torch.Tensor,
        std: torch.Tensor,
        candidates: Candidates,
        scores: torch.Tensor,
        selection: Selection,
    ) -> None:
        step = len(self.stds)
        chosen, rejected = (_take(candidates.latents, side) for side in (selection.chosen, selection.rejected))
        self.latents[step] = self.pairing.parents(parents)
        self.next_latents[step] = self.pairing.pairs(chosen, rejected)
        if self.candidate_means is not None:
            of_parents = candidates.latents.view(*scores.shape, *parents.shape[2:]).mean(2)
            self.candidate_means[step] = self.pairing.parents(of_parents)
        self.stds.append(std.flatten()[0])
        self.rewards.append(scores)
        self.raw_rewards.append(self.reward.last_sum.view_as(scores))
        self.pair_rewards.append(self.pairing.pairs(scores.amax(-1), scores.amin(-1)))
        self.parts.append({name: part.view_as(scores) for name, part in self.reward.last_scores.items()})

    def pairs(self, final_latents: torch.Tensor, final_rewards: torch.Tensor | None) -> TrajectoryPairs:
        pair_rewards = torch.stack(self.pair_rewards)
        return TrajectoryPairs(
            prompt_embeds=self.prompt_embeds,
            step_indices=torch.tensor(sorted(self.step_indices)),
            latents=self.latents,
            next_latents=self.next_latents,
            pair_rewards=pair_rewards,
            weights=self.pairing.weights(pair_rewards, torch.stack(self.stds), final_rewards),
            rewards=torch.stack(self.rewards),
            raw_rewards=torch.stack(self.raw_rewards),
            final_latents=final_latents,
            candidate_means=self.candidate_means,
            reward_parts={name: torch.stack([part[name] for part in self.parts]) for name in self.reward.names},
        )


def _take(values: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
    """The chosen one of the P rows of each branch and prompt: `(branches B P, ...) -> (branches, B, ...)`."""
    values = values.view(choice.numel(), -1, *values.shape[1:])
    chosen = values[torch.arange(choice.numel(), device=values.device), choice.flatten()]
    return chosen.view(*choice.shape, *values.shape[2:])


def pair_metrics(pairs: TrajectoryPairs) -> dict[str, torch.Tensor]:
    """
    Metrics of the rewards of preference pairs.

    Args:
        pairs ([`TrajectoryPairs`]): the rollout.

    Returns:
        `dict[str, torch.Tensor]` of shape `(B,)`: `reward` and `reward_std`, over candidates of one draw; `reward_gap`,
            between the two sides of a pair; `pairs_kept`, the share of pairs that count; and mean and deviation of each
            reward, if there are several.
    """
    num_prompts = pairs.rewards.shape[2]

    def of_prompts(values: torch.Tensor) -> torch.Tensor:
        """`(n, N)`, N being a multiple of B, to `(B,)`."""
        return values.reshape(-1, num_prompts).mean(0)

    metrics = {
        "reward": pairs.logged_rewards.mean(dim=(0, 1, 3)),
        "reward_std": pairs.logged_rewards.std(dim=-1).mean(dim=(0, 1)),
        "reward_gap": of_prompts(pairs.pair_rewards[:, WIN] - pairs.pair_rewards[:, LOSE]),
        "pairs_kept": of_prompts(pairs.weights),
    }
    if len(pairs.reward_parts) > 1:
        for name, scores in pairs.reward_parts.items():
            counts = ~scores.isnan().flatten(1).all(dim=1)  # steps at which it does, see `RangeWeight`
            metrics[f"rewards/{name}/mean"] = scores[counts].mean(dim=(0, 1, 3))
            metrics[f"rewards/{name}/std"] = scores[counts].std(dim=-1).mean(dim=(0, 1))
    return metrics
