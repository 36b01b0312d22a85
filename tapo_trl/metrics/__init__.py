# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from .consistency import ranking_consistency, ranking_disagreement
from .diagnosis import diagnose_scores
from .distributions import area_under_curve, score_distributions
from .pair_scores import ACCURACY_RULES, PairScores, score_pairs, score_pairs_of_pixels
from .plots import plot_diagnosis
from .preference_accuracy import (
    PreferenceAccuracy,
    accuracy_by_level,
    accuracy_with_ties_by_level,
    calibrated_tie_threshold,
    evaluate_preference_accuracy,
    videoalign_accuracy_with_ties,
)
from .score_files import scores_from_file


__all__ = [
    "ACCURACY_RULES",
    "PairScores",
    "PreferenceAccuracy",
    "accuracy_by_level",
    "accuracy_with_ties_by_level",
    "area_under_curve",
    "calibrated_tie_threshold",
    "diagnose_scores",
    "evaluate_preference_accuracy",
    "plot_diagnosis",
    "ranking_consistency",
    "ranking_disagreement",
    "score_distributions",
    "score_pairs",
    "score_pairs_of_pixels",
    "scores_from_file",
    "videoalign_accuracy_with_ties",
]
