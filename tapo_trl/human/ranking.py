# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Win rates and Bradley-Terry scores of the models of a study, with intervals that resample people and prompts."""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from .agreement import sign_test
from .study import Pair
from .votes import FIRST, SECOND, TIE


class Contest(NamedTuple):
    """A vote on one dimension of a pair of two sources."""

    annotator: str
    prompt_id: str
    sources: tuple[str, str]
    label: float


def contests_of(votes: Sequence[dict[str, Any]], pairs: Sequence[Pair], dimension: str) -> list[Contest]:
    """The votes on pairs of two different sources, without pairs of known answers and repetitions."""
    by_id = {
        pair.pair_id: pair
        for pair in pairs
        if pair.source_0 != pair.source_1 and not pair.gold and pair.repeat_of is None
    }
    return [
        Contest(
            vote["annotator"],
            by_id[vote["pair_id"]].prompt_id,
            by_id[vote["pair_id"]].sources,
            vote["labels"][dimension],
        )
        for vote in votes
        if vote["pair_id"] in by_id
    ]


def _resampled_weights(contests: Sequence[Contest], samples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each vote counts when people and prompts are drawn with replacement, independently of each other."""
    rng = np.random.default_rng(seed)
    groups = [
        np.unique(names, return_inverse=True)
        for names in ([contest.annotator for contest in contests], [contest.prompt_id for contest in contests])
    ]
    for _ in range(samples):
        weights = np.ones(len(contests))
        for values, inverse in groups:
            weights *= np.bincount(rng.integers(0, len(values), len(values)), minlength=len(values))[inverse]
        yield weights


def win_shares(contests: Sequence[Contest], samples: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """
    How often each source wins against each other one.

    Args:
        contests (`Sequence[Contest]`): Votes on one dimension.
        samples (`int`, *optional*, defaults to `1000`): Number of resampled studies.
        seed (`int`, *optional*, defaults to `0`): Their seed.

    Returns:
        `list[dict]`: A row for two sources: `first`, `second`, `wins`, `ties`, `losses` (of the first), `people`, `prompts`,
        `share` (a tie counts half), `low` and `high` (95 %, people and prompts resampled), and `p` (sign test of the prompts, each
        of which counts once, for the source that has more of its votes; without those that are even).
    """
    rows = []
    for first, second in combinations(sorted({source for contest in contests for source in contest.sources}), 2):
        own = [contest for contest in contests if set(contest.sources) == {first, second}]
        if not own:
            continue
        labels = np.array([c.label if c.sources[0] == first else 1 - c.label for c in own])
        wins, ties, losses = (int((labels == level).sum()) for level in (FIRST, TIE, SECOND))
        shares = [
            (weights * labels).sum() / weights.sum()
            for weights in _resampled_weights(own, samples, seed)
            if weights.sum()
        ]
        low, high = np.quantile(shares, [0.025, 0.975]).tolist() if shares else (math.nan, math.nan)
        rows.append(
            {
                "first": first,
                "second": second,
                "wins": wins,
                "ties": ties,
                "losses": losses,
                "people": len({contest.annotator for contest in own}),
                "prompts": len({contest.prompt_id for contest in own}),
                "share": float(labels.mean()),
                "low": low,
                "high": high,
                "p": sign_test(*_majorities(own, labels)),
            }
        )
    return rows


def _majorities(contests: Sequence[Contest], labels: np.ndarray) -> tuple[int, int]:
    """Prompts with more votes for the first source, and all that are not even: votes on one prompt are no independent trials."""
    prompts = np.unique([contest.prompt_id for contest in contests], return_inverse=True)[1]
    balance = np.bincount(prompts, weights=labels - TIE)
    return int((balance > 0).sum()), int((balance != 0).sum())


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm, 1979)."""
    order = np.argsort(p_values)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def bradley_terry(wins: np.ndarray, prior: float = 0.5, tolerance: float = 1e-10) -> np.ndarray:
    """
    Log-strengths of the model of Bradley and Terry (1952), by Newton's method.

    Args:
        wins (`np.ndarray` of shape `(N, N)`): How often row beats column. A tie is half a win of each.
        prior (`float`, *optional*, defaults to `0.5`): Each source has drawn so often against one of mean strength. It keeps strengths finite where one
            source wins always.
        tolerance (`float`, *optional*, defaults to `1e-10`): Largest change of the last step.

    Returns:
        `np.ndarray` of shape `(N,)`: Log-strengths with mean 0. Their differences are log-odds of winning.
    """
    number, strengths = len(wins), np.zeros(len(wins))
    games = wins + wins.T
    for _ in range(100):
        chances = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
        alone = 1 / (1 + np.exp(-strengths))
        gradient = wins.sum(1) - (games * chances).sum(1) + prior * (0.5 - alone)
        weights = games * chances * (1 - chances)
        hessian = np.diag(weights.sum(1) + prior * alone * (1 - alone)) - weights
        # The mean is free without a prior
        step = np.linalg.solve(hessian + 1e-12 * np.eye(number) + (0 if prior else 1 / number), gradient)
        strengths += step / max(1.0, np.abs(step).max())
        if np.abs(step).max() < tolerance:
            break
    return strengths - strengths.mean()


def rank_sources(
    contests: Sequence[Contest], prior: float = 0.5, samples: int = 1000, seed: int = 0
) -> list[dict[str, Any]]:
    """
    Sources by their Bradley-Terry score, best first.

    Returns:
        `list[dict]`: `source`, `score`, and its 95 % interval `low` and `high` (people and prompts resampled).
    """
    sources = sorted({source for contest in contests for source in contest.sources})
    index = {source: number for number, source in enumerate(sources)}
    first = np.array([index[contest.sources[0]] for contest in contests], dtype=int)
    second = np.array([index[contest.sources[1]] for contest in contests], dtype=int)
    labels = np.array([contest.label for contest in contests])

    def scores(weights: np.ndarray) -> np.ndarray:
        wins = np.zeros((len(sources), len(sources)))
        np.add.at(wins, (first, second), weights * labels)
        np.add.at(wins, (second, first), weights * (1 - labels))
        return bradley_terry(wins, prior)

    if not sources:
        return []
    resampled = np.array([scores(weights) for weights in _resampled_weights(contests, samples, seed)])
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    values = scores(np.ones(len(contests)))
    rows = [
        {"source": source, "score": float(values[i]), "low": float(low[i]), "high": float(high[i])}
        for source, i in index.items()
    ]
    return sorted(rows, key=lambda row: -row["score"])
