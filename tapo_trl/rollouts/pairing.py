# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Which candidates of a stochastic step make a pair, and from which ones the trajectories go on."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..method_card import MethodCard


WIN, LOSE = 0, 1


@dataclass(frozen=True)
class Selection:
    """
    Candidates of one stochastic step, by their number among the P of their parent.

    Args:
        chosen (`torch.LongTensor` of shape `(branches, B)`): the best of each parent.
        rejected (`torch.LongTensor` of shape `(branches, B)`): the worst of each parent.
        kept (`torch.LongTensor` of shape `(branches, B)`): with which each trajectory goes on.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    kept: torch.Tensor


@dataclass(frozen=True)
class Pairing:
    """
    A method's rule for making pairs.

    Args:
        num_branches (`int`): trajectories per prompt.
        shared_parent (`bool`):
            Whether a pair is the best and the worst candidate of the same parent, one pair per trajectory. Otherwise it
            is the best of the first and the worst of the second trajectory, one pair per prompt.
        continue_with (`str`):
            `"extremes"`: the first trajectory goes on with its best and the second with its worst candidate. `"best"`:
            all with their best. `"random"`: with any.
        threshold (`tuple[float, float]`, *optional*):
            A pair counts if its scores, read as logits, differ in probability by more than this, at the step with the
            least and with the most noise of all stochastic steps; in between it is interpolated. By default all pairs but ties
            count.
        consistent (`bool`, *optional*, defaults to `False`):
            Whether a pair counts only if its ranking does not flip until the end: its chosen side scores higher at its own
            step, and so does the final sample of the first trajectory. For two trajectories that make one pair.
        beta (`float`, *optional*, defaults to `1000.0`):
            Strength of the regularisation towards the reference that the method's authors use.
        card ([`~method_card.MethodCard`], *optional*):
            What model cards say about the method.
    """

    num_branches: int
    shared_parent: bool
    continue_with: Literal["extremes", "best", "random"]
    threshold: tuple[float, float] | None = None
    consistent: bool = False
    beta: float = 1000.0
    card: MethodCard | None = None

    def select(self, scores: torch.Tensor, generators: list[torch.Generator]) -> Selection:
        """
        Choose, for every prompt on its own.

        Args:
            scores (`torch.Tensor` of shape `(branches, B, P)`): rewards of the candidates.
            generators (`list[torch.Generator]`): one per prompt, on the CPU.
        """
        best, worst = scores.argmax(dim=-1), scores.argmin(dim=-1)
        if self.continue_with == "extremes":
            kept = torch.stack([best[WIN], worst[LOSE]])
        elif self.continue_with == "best":
            kept = best
        else:
            branches, _, num_candidates = scores.shape
            draws = [torch.randint(num_candidates, (branches,), generator=generator) for generator in generators]
            kept = torch.stack(draws, dim=1).to(scores.device)
        return Selection(chosen=best, rejected=worst, kept=kept)

    def pairs(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """
        Put values of the chosen and the rejected candidates together by pair.

        Args:
            chosen (`torch.Tensor` of shape `(branches, B, ...)`): of the best candidate of each parent.
            rejected (`torch.Tensor` of shape `(branches, B, ...)`): of the worst.

        Returns:
            `torch.Tensor` of shape `(2, num_pairs, ...)`
        """
        if self.shared_parent:
            return torch.stack([chosen.flatten(0, 1), rejected.flatten(0, 1)])
        return torch.stack([chosen[WIN], rejected[LOSE]])

    def parents(self, latents: torch.Tensor) -> torch.Tensor:
        """
        The parents of the pairs: `(branches, B, ...)` to `(1, num_pairs, ...)` where a pair shares its parent, else
        `(2, num_pairs, ...)`.
        """
        return latents.flatten(0, 1).unsqueeze(0) if self.shared_parent else latents

    @property
    def num_parents(self) -> int:
        """Parents of a pair."""
        return 1 if self.shared_parent else 2

    @property
    def pairs_per_prompt(self) -> int:
        """Pairs that a prompt gives at each stochastic step."""
        return self.num_branches if self.shared_parent else 1

    def check_number(self, pairs_per_update: int | None, num_steps: int) -> None:
        """
        Check that a prompt has so many pairs.

        Args:
            pairs_per_update (`int`, *optional*): pairs of each prompt that an update trains on. All by default.
            num_steps (`int`): number of stochastic steps that are trained on.

        Raises:
            ValueError: if it has fewer.
        """
        available = num_steps * self.pairs_per_prompt
        if pairs_per_update is not None and pairs_per_update > available:
            raise ValueError(
                f"`pairs_per_update={pairs_per_update}`, but {num_steps} stochastic steps give a prompt only {available} pairs to "
                "train on: lower it, or leave it unset for all of them."
            )

    def weights(
        self, rewards: torch.Tensor, stds: torch.Tensor, final_rewards: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        1 for the pairs that count, 0 for ties, for those below the threshold and for those whose ranking flips.

        Args:
            rewards (`torch.Tensor` of shape `(n, 2, num_pairs)`): scores of the chosen and the rejected candidates.
            stds (`torch.Tensor` of shape `(n,)`): standard deviation of each stochastic step.
            final_rewards (`torch.Tensor` of shape `(2, B)`, *optional*): rewards of the final samples, if `consistent`.

        Returns:
            `torch.Tensor` of shape `(n, num_pairs)`
        """
        gaps = rewards[:, WIN] - rewards[:, LOSE]
        counts = gaps != 0  # between equals nobody wins
        if self.threshold is not None:
            low, high = self.threshold
            noise = (stds - stds.min()) / (stds.max() - stds.min()).clamp(min=1e-12)
            # Of two logits, the probabilities under a softmax differ by tanh of half the distance.
            counts &= torch.tanh(gaps / 2) > (low + (high - low) * noise).view(-1, 1)
        if self.consistent:
            counts &= (gaps > 0) & (final_rewards[WIN] > final_rewards[LOSE])
        return counts.to(gaps.dtype)


_ONE_TRAJECTORY = (
    "{} draws one trajectory for every prompt. At a few stochastic steps it draws several candidates, of which a reward model "
    "picks the best and the worst, and goes on from one of them. Pairs that the reward model hardly tells apart do not "
    "count{}. The policy is trained to prefer, at each of those steps, the best to the worst transition, relative to the base "
    "model."
)

PAIRINGS = {
    "tapo": Pairing(
        num_branches=2,
        shared_parent=False,
        continue_with="extremes",
        card=MethodCard(
            name="TAPO",
            tags=("tapo",),
            paper="xian2026consistent",
            title="**TAPO** (Trajectory Advantages Preference Optimization)",
            text="TAPO draws, for every prompt, a winning and a losing trajectory that share their initial noise. At a few "
            "stochastic steps each branch draws several candidates, and a reward model keeps the best of the one and the worst "
            "of the other. The policy is then trained to prefer, at each of those steps, the winning transition to the losing "
            "one, relative to the base model.",
        ),
    ),
    "tapo_within": Pairing(
        num_branches=2,
        shared_parent=True,
        continue_with="extremes",
        card=MethodCard(
            name="TAPO-within",
            tags=("tapo-within",),
            paper="xian2026consistent",
            title="**TAPO** (Trajectory Advantages Preference Optimization) with pairs within each trajectory",
            text="Two trajectories that share their initial noise are drawn for every prompt, as in TAPO. At a few stochastic "
            "steps each of them draws several candidates, and a reward model picks the best and the worst of each. The policy "
            "is then trained to prefer, at each of those steps, the best to the worst transition from the same latent, "
            "relative to the base model.",
        ),
    ),
    "spo": Pairing(
        num_branches=1,
        shared_parent=True,
        continue_with="random",
        threshold=(0.3, 0.3),
        beta=10.0,
        card=MethodCard(
            name="SPO",
            tags=("spo",),
            paper="liang2024step",
            title="**SPO** (Step-by-step Preference Optimization)",
            text=_ONE_TRAJECTORY.format("SPO", ""),
        ),
    ),
    "lpo": Pairing(
        num_branches=1,
        shared_parent=True,
        continue_with="random",
        threshold=(0.35, 0.5),
        beta=500.0,
        card=MethodCard(
            name="LPO",
            tags=("lpo",),
            paper="zhang2025diffusion",
            title="**LPO** (Latent Preference Optimization)",
            text=_ONE_TRAJECTORY.format("LPO", ", with a threshold that grows with the noise"),
        ),
    ),
}


def get_pairing(
    name: str, continue_with: str | None = None, threshold: list[float] | None = None, consistent: bool = False
) -> Pairing:
    """
    A method's rule for making pairs, with changes.

    Args:
        name (`str`):
            - `"tapo"`: the best of a winning and the worst of a losing trajectory (Eq. 12 of TAPO).
            - `"tapo_within"`: the same two trajectories, but in each the best and the worst of its own candidates.
            - `"spo"`: the best and the worst of one trajectory that goes on at random, if they differ enough (SPO).
            - `"lpo"`: the same with a threshold that grows with the noise of the step (LPO).
        continue_with (`str`, *optional*): `"best"` or `"random"`, for `"spo"` and `"lpo"`.
        threshold (`list[float]`, *optional*): one number, or two for the least and the most noise.
        consistent (`bool`, *optional*, defaults to `False`): whether pairs whose ranking flips are left out, for `"tapo"`.
    """
    if name not in PAIRINGS:
        raise ValueError(f"`pairing` must be one of {tuple(PAIRINGS)}, got {name!r}.")
    pairing = PAIRINGS[name]
    if continue_with is not None:
        if continue_with not in ("best", "random"):
            raise ValueError(f"`continue_with` must be 'best' or 'random', got {continue_with!r}.")
        if pairing.continue_with == "extremes":
            raise ValueError(
                f"`continue_with` is for the pairings of one trajectory, 'spo' and 'lpo': with {name!r} the winning "
                "trajectory goes on with its best and the losing one with its worst candidate."
            )
        pairing = replace(pairing, continue_with=continue_with)
    if threshold is not None:
        if len(threshold) not in (1, 2) or not all(0 <= value < 1 for value in threshold):
            raise ValueError(f"`pair_threshold` must be one or two numbers in [0, 1), got {threshold}.")
        pairing = replace(pairing, threshold=(threshold[0], threshold[-1]))
    if consistent:
        if pairing.shared_parent:
            raise ValueError(
                f"`consistent_pairs=True` compares the ends of a pair's two trajectories, but with `pairing={name!r}` both "
                "sides of a pair are candidates of one trajectory. Use `pairing='tapo'`, or a `pair_threshold`."
            )
        pairing = replace(pairing, consistent=True)
    return pairing
