# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""How far people agree: with each other, with known answers, and with themselves."""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from statistics import NormalDist
from typing import Any

import numpy as np

from .assignment import left_medium
from .study import Pair
from .votes import FIRST, TIE


LEVELS = (0.0, 0.5, 1.0)  # medium 1 is better, tie, medium 0 is better


def label_table(votes: Sequence[dict[str, Any]], dimension: str, pairs: Sequence[str] | None = None) -> np.ndarray:
    """
    The labels of a dimension, NaN where a person did not vote.

    Args:
        votes (`Sequence[dict]`): Votes, from [`current_votes`].
        dimension (`str`): The dimension.
        pairs (`Sequence[str]`, *optional*): Names of the pairs. All that have votes by default.

    Returns:
        `np.ndarray` of shape `(num_pairs, num_people)`, float64.
    """
    pairs = list(dict.fromkeys(vote["pair_id"] for vote in votes)) if pairs is None else list(pairs)
    people = list(dict.fromkeys(vote["annotator"] for vote in votes))
    rows, columns = ({name: index for index, name in enumerate(names)} for names in (pairs, people))
    table = np.full((len(pairs), len(people)), np.nan)
    for vote in votes:
        if vote["pair_id"] in rows:
            table[rows[vote["pair_id"]], columns[vote["annotator"]]] = vote["labels"][dimension]
    return table


def krippendorff_alpha(table: np.ndarray) -> float:
    """
    Krippendorff's alpha of ordinal labels (Krippendorff, Content Analysis, chapter 12): 1 for perfect agreement, 0 for that of chance.

    Args:
        table (`np.ndarray` of shape `(num_pairs, num_people)`): Labels 0, 0.5 and 1; NaN where there is none.

    Returns:
        `float`: Alpha; NaN if no pair has two labels, or all labels are the same.
    """
    counts = np.stack([(table == level).sum(axis=1) for level in LEVELS], axis=1).astype(float)
    counts = counts[counts.sum(axis=1) >= 2]
    if len(counts) == 0:
        return math.nan
    sizes = counts.sum(axis=1, keepdims=True)
    # Coincidences: ordered pairs of labels of the same pair, each pair with the weight of its number of labels
    coincidences = (counts / (sizes - 1)).T @ counts - np.diag((counts / (sizes - 1)).sum(axis=0))
    totals = coincidences.sum(axis=0)
    below = np.cumsum(totals) - totals / 2
    distances = (below[:, None] - below[None, :]) ** 2
    expected = (np.outer(totals, totals) * distances).sum() / (totals.sum() - 1)
    return math.nan if expected == 0 else float(1 - (coincidences * distances).sum() / expected)


def percent_agreement(table: np.ndarray) -> float:
    """Share of equal labels, over the pairs of people who voted on the same pair; NaN if there are none."""
    equal = total = 0
    for first, second in combinations(range(table.shape[1]), 2):
        both = ~np.isnan(table[:, first]) & ~np.isnan(table[:, second])
        equal += int((table[both, first] == table[both, second]).sum())
        total += int(both.sum())
    return equal / total if total else math.nan


def resample_pairs(
    table: np.ndarray, statistic: Callable[[np.ndarray], float], samples: int = 300, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a statistic of a table, from tables whose pairs are drawn with replacement; NaN if it has none."""
    rng = np.random.default_rng(seed)
    values = np.array(
        [statistic(table[rng.integers(0, len(table), len(table))]) for _ in range(samples if len(table) else 0)]
    )
    values = values[~np.isnan(values)]
    return tuple(np.quantile(values, [0.025, 0.975]).tolist()) if len(values) else (math.nan, math.nan)


def wilson_interval(successes: float, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share of independent trials; NaN without any."""
    if total == 0:
        return math.nan, math.nan
    z, share = NormalDist().inv_cdf(0.5 + confidence / 2), successes / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    return middle - half, middle + half


def sign_test(successes: int, total: int) -> float:
    """Two-sided p-value of a fair coin (binomial test with probability 1/2); 1 without trials."""
    tail = ways = 1
    for k in range(min(successes, total - successes)):  # `math.comb` of each would take minutes for a large study
        ways = ways * (total - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**total)


def share_with_interval(successes: float, total: int) -> dict[str, Any]:
    """`share`, `low`, `high` (Wilson) and `n`."""
    low, high = wilson_interval(successes, total)
    return {"share": successes / total if total else math.nan, "low": low, "high": high, "n": total}


def describe_people(
    votes: Sequence[dict[str, Any]], pairs: Sequence[Pair], seed: int, min_seconds: float = 0.0
) -> dict[str, dict[str, Any]]:
    """
    What is known of each person, and of all together (`"all"`).

    Args:
        votes (`Sequence[dict]`): Votes, from [`current_votes`].
        pairs (`Sequence[Pair]`): Pairs of the study.
        seed (`int`): Seed of the study, which gives the sides.
        min_seconds (`float`, *optional*, defaults to `0.0`): Votes that took less are counted as fast.

    Returns:
        `dict`: By person `votes`, `fast`, `seconds` (median), and shares with intervals over all answers: `ties`, `left` (of the
        answers that are no tie; its `p` is a sign test that counts each vote once, by the side of most of its answers), `gold` (right answers, of known ones), `same` (same answers to repeated pairs).
    """
    by_id = {pair.pair_id: pair for pair in pairs}
    votes = [vote for vote in votes if vote["pair_id"] in by_id]
    people = list(dict.fromkeys(vote["annotator"] for vote in votes))
    of_people = {name: [vote for vote in votes if vote["annotator"] == name] for name in people}
    return {name: _describe(own, by_id, seed, min_seconds) for name, own in {"all": votes, **of_people}.items()}


def _describe(
    votes: Sequence[dict[str, Any]], by_id: dict[str, Pair], seed: int, min_seconds: float
) -> dict[str, Any]:
    answers = left = ties = gold = right = repeats = same = left_votes = right_votes = 0
    labels = {(vote["annotator"], vote["pair_id"]): vote["labels"] for vote in votes}
    for vote in votes:
        pair = by_id[vote["pair_id"]]
        shown_left = vote.get("left", left_medium(seed, vote["annotator"], pair))
        original = labels.get((vote["annotator"], pair.repeat_of))
        on_left = [(label == FIRST) == (shown_left == 0) for label in vote["labels"].values() if label != TIE]
        left += sum(on_left)
        left_votes += 2 * sum(on_left) > len(on_left)
        right_votes += 2 * sum(on_left) < len(on_left)
        for name, label in vote["labels"].items():
            answers += 1
            ties += label == TIE
            if pair.gold and name in pair.gold:
                gold += 1
                right += label == pair.gold[name]
            if original is not None:
                repeats += 1
                same += label == original[name]
    seconds = [vote["ms"] / 1000 for vote in votes if "ms" in vote]
    return {
        "votes": len(votes),
        "fast": sum(value < min_seconds for value in seconds),
        "seconds": float(np.median(seconds)) if seconds else math.nan,
        "ties": share_with_interval(ties, answers),
        "left": {**share_with_interval(left, answers - ties), "p": sign_test(left_votes, left_votes + right_votes)},
        "gold": share_with_interval(right, gold),
        "same": share_with_interval(same, repeats),
    }
