# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""All that scores of preference pairs tell of a reward model."""

import torch

from ..data.preferences import TIE
from .consistency import ranking_consistency
from .distributions import score_distributions
from .pair_scores import PairScores
from .preference_accuracy import PreferenceAccuracy, calibrated_tie_threshold


def diagnose_scores(scores: PairScores, tie_threshold: float | None = None) -> dict[str, dict]:
    """
    Accuracy, consistency and distributions of the scores of a reward model, by rule.

    Ties of people have no right order and no preferred side: `accuracy` and `distributions` leave them out,
    `accuracy_with_ties` counts them, and for `consistency` a label means nothing.

    Args:
        scores ([`PairScores`]): scores at noise levels in ascending order, at least two.
        tie_threshold (`float`, *optional*):
            Largest margin of a predicted tie, in the units of the scores. By default the best one for the pairs, see
            [`calibrated_tie_threshold`], or 0 if none of them is a tie.

    Returns:
        `dict[str, dict]`: by rule,
            - `accuracy`: what [`PreferenceAccuracy`] says of all pairs at all levels, each of which counts once per level,
              and `tie_threshold`;
            - `consistency`: see [`ranking_consistency`];
            - `distributions`: by noise level, see [`score_distributions`].

    Raises:
        ValueError: if all pairs are ties, or the noise levels are too few or in another order.
    """
    decided = scores.labels != TIE
    if not decided.any():
        raise ValueError(
            f"All {len(decided)} pairs are ties (their `label` is {TIE}): there is no preference to compare scores with. "
            "Take pairs of which people preferred one side."
        )
    return {
        rule: {
            "accuracy": _accuracy(margins, scores, tie_threshold),
            "consistency": ranking_consistency(margins, scores.sigmas),
            "distributions": {
                sigma: score_distributions(chosen[decided], rejected[decided])
                for sigma, chosen, rejected in zip(
                    scores.sigmas, scores.chosen[rule], scores.rejected[rule], strict=True
                )
            },
        }
        for rule, margins in scores.margins.items()
    }


def _accuracy(margins: torch.Tensor, scores: PairScores, tie_threshold: float | None) -> dict:
    labels = scores.labels.expand_as(margins).flatten()
    sigmas = torch.tensor(scores.sigmas, dtype=torch.float64).repeat_interleave(margins.shape[1])
    if tie_threshold is None:
        tie_threshold = calibrated_tie_threshold(margins.flatten(), labels) if (labels == TIE).any() else 0.0
    accuracy = PreferenceAccuracy().compute(
        predictions=margins.flatten().tolist(),
        references=labels.tolist(),
        sigmas=sigmas.tolist(),
        tie_threshold=tie_threshold,
    )
    return accuracy | {"tie_threshold": tie_threshold}
