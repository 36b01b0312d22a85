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

from .consistency import ranking_consistency, ranking_disagreement
from .diagnosis import diagnose_scores
from .distributions import area_under_curve, score_distributions
from .pair_scores import ACCURACY_RULES, PairScores, score_pairs
from .plots import plot_diagnosis
from .preference_accuracy import PreferenceAccuracy, calibrated_tie_threshold, evaluate_preference_accuracy


__all__ = [
    "ACCURACY_RULES",
    "PairScores",
    "PreferenceAccuracy",
    "area_under_curve",
    "calibrated_tie_threshold",
    "diagnose_scores",
    "evaluate_preference_accuracy",
    "plot_diagnosis",
    "ranking_consistency",
    "ranking_disagreement",
    "score_distributions",
    "score_pairs",
]
