# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What the votes of a study say: agreement, people, and win rates of the sources."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .agreement import describe_people, krippendorff_alpha, label_table, percent_agreement, resample_pairs
from .ranking import contests_of, holm, rank_sources, win_shares
from .study import Study
from .votes import current_votes


CONFOUND = 0.75  # share of wins from which a reward model can do well by telling sources apart


def select_guidelines(
    study: Study, events: Sequence[dict[str, Any]], guidelines: str = "current"
) -> tuple[list[dict[str, Any]], int]:
    """
    The events under the present questions and guidelines, and the number of the others.

    Args:
        study ([`Study`]): The study.
        events (`Sequence[dict]`): Its events.
        guidelines (`str`, *optional*, defaults to `"current"`): `"all"` keeps all of them.
    """
    own = [event for event in events if event.get("guideline", study.guideline_hash) == study.guideline_hash]
    return (list(events), 0) if guidelines == "all" else (own, len(events) - len(own))


def study_report(
    study: Study, events: Sequence[dict[str, Any]], prior: float = 0.5, samples: int = 1000
) -> dict[str, Any]:
    """
    Statistics of a study.

    Args:
        study ([`Study`]): The study.
        events (`Sequence[dict]`): Its events.
        prior (`float`, *optional*, defaults to `0.5`): See [`bradley_terry`].
        samples (`int`, *optional*, defaults to `1000`): Resampled studies of an interval.

    Returns:
        `dict`: `votes`, `people`, `pairs` (with a vote) and `skips` by reason; `agreement` by dimension: `alpha` with its interval and
        `percent`; `annotators`, see [`describe_people`]; `wins`, rows of [`win_shares`] with their `dimension` and `p_holm`, corrected
        over all rows; `scores`, rows of [`rank_sources`] with their `dimension`, for three sources or more; `warnings`.
    """
    pairs = study.read_pairs()
    names = {pair.pair_id for pair in pairs}
    given = current_votes(events)
    votes = [vote for vote in given if vote["pair_id"] in names]
    lost = [vote["pair_id"] for vote in given if vote["pair_id"] not in names]
    agreement, wins, scores = {}, [], []
    for dimension in study.dimension_names:
        table = label_table(votes, dimension)
        low, high = resample_pairs(table, krippendorff_alpha)
        agreement[dimension] = {
            "alpha": krippendorff_alpha(table),
            "low": low,
            "high": high,
            "percent": percent_agreement(table),
        }
        contests = contests_of(votes, pairs, dimension)
        wins += [{"dimension": dimension, **row} for row in win_shares(contests, samples)]
        if len({source for contest in contests for source in contest.sources}) > 2:
            scores += [{"dimension": dimension, **row} for row in rank_sources(contests, prior, samples)]
    for row, corrected in zip(wins, holm([row["p"] for row in wins]), strict=True):
        row["p_holm"] = corrected
    people = describe_people(votes, pairs, study.seed, study.min_seconds)
    return {
        "votes": len(votes),
        "people": len(people) - 1,
        "pairs": len({vote["pair_id"] for vote in votes}),
        "skips": dict(Counter(event["reason"] for event in current_votes(events, ["skip"]))),
        "agreement": agreement,
        "annotators": people,
        "wins": wins,
        "scores": scores,
        "warnings": _warnings(people, wins, agreement, lost),
    }


def _warnings(
    people: dict[str, dict[str, Any]],
    wins: Sequence[dict[str, Any]],
    agreement: dict[str, dict[str, float]],
    lost: Sequence[str],
) -> list[str]:
    found = []
    if lost:
        found.append(
            f"{len(lost)} votes are on pairs that pairs.jsonl does not have, such as {lost[0]}. They do not count."
        )
    for name, person in people.items():
        who = "All people together" if name == "all" else name
        if person["left"]["p"] < 0.01:
            found.append(
                f"{who}: the left one wins {person['left']['share']:.0%} of the answers (p = {person['left']['p']:.2g})."
            )
        if name != "all" and person["gold"]["n"] >= 5 and person["gold"]["share"] < 0.7:
            found.append(f"{name}: {person['gold']['share']:.0%} of {person['gold']['n']} known answers are right.")
    for row in wins:
        if max(row["share"], 1 - row["share"]) >= CONFOUND and row["prompts"] >= 10:
            best = row["first"] if row["share"] > 0.5 else row["second"]
            found.append(
                f"{row['dimension']}: {best} wins {max(row['share'], 1 - row['share']):.0%} against the other source. A reward model "
                "that tells the two apart is right as often: add pairs of one source with two seeds (`same_source`)."
            )
    for name, values in agreement.items():
        if math.isnan(values["alpha"]):
            found.append(f"{name}: there is no alpha, since no pair has two votes or all answers are the same.")
    return found
