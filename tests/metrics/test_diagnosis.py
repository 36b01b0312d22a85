# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from tapo_trl.metrics import PairScores, diagnose_scores


def scores(chosen, rejected, labels, sigmas):
    return PairScores(sigmas, torch.tensor(labels), {"none": torch.tensor(chosen)}, {"none": torch.tensor(rejected)})


class TestDiagnoseScores:
    def test_by_hand(self):
        """Three pairs, the last one a tie of people; from level to level the first flips."""
        result = diagnose_scores(
            scores(
                [[2.0, 3.0, 1.0], [0.0, 3.0, 1.0]],
                [[1.0, 0.0, 0.9], [1.0, 0.0, 1.1]],
                [1.0, 1.0, 0.5],
                (0.0, 0.8),
            )
        )["none"]
        assert result["consistency"]["flips_from_cleanest"] == {0.8: pytest.approx(2 / 3)}
        accuracy = result["accuracy"]
        assert accuracy["by_sigma"] == {0.0: 1.0, 0.8: 0.5}
        assert accuracy["accuracy"] == 0.75
        assert accuracy["tie_threshold"] == pytest.approx(0.1, abs=1e-6)  # finds both ties and costs no right pair
        assert accuracy["accuracy_with_ties"] == pytest.approx(5 / 6)
        assert accuracy["by_range"]["clean"] == {"accuracy": 1.0, "accuracy_with_ties": 1.0, "num_pairs": 3}
        assert accuracy["by_range"]["501-1000"]["accuracy_with_ties"] == pytest.approx(2 / 3)
        assert result["distributions"][0.0]["auc"] == 1.0  # the tie is left out
        assert result["distributions"][0.8]["auc"] == 0.625  # of 0 and 3 against 1 and 0: 0 = 0 counts one half
        assert result["distributions"][0.8]["chosen"]["mean"] == 1.5

    def test_without_ties_the_threshold_is_0(self):
        result = diagnose_scores(scores([[1.0], [2.0]], [[2.0], [1.0]], [1.0], (0.1, 0.2)))["none"]
        assert result["accuracy"]["tie_threshold"] == 0
        assert result["accuracy"]["accuracy_with_ties"] == result["accuracy"]["accuracy"] == 0.5

    def test_own_threshold(self):
        result = diagnose_scores(scores([[1.0], [5.0]], [[2.0], [1.0]], [1.0], (0.1, 0.2)), tie_threshold=4.0)["none"]
        assert result["accuracy"]["tie_threshold"] == 4 and result["accuracy"]["accuracy_with_ties"] == 0

    def test_ties_alone(self):
        with pytest.raises(ValueError, match="All 2 pairs are ties .*there is no preference"):
            diagnose_scores(scores([[1.0, 1.0]] * 2, [[0.0, 0.0]] * 2, [0.5, 0.5], (0.1, 0.2)))
