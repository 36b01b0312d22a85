# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from tapo_trl.metrics import ranking_consistency, ranking_disagreement


class TestRankingDisagreement:
    def test_by_hand(self):
        margins = torch.tensor(
            [
                [1.0, 1.0, 1.0, 1.0],
                [2.0, 1.0, 1.0, -1.0],  # the last pair flips
                [-1.0, 3.0, 0.0, -2.0],  # the first flips, the third becomes a tie
            ]
        )
        expected = [[0, 1 / 4, 2.5 / 4], [1 / 4, 0, 1.5 / 4], [2.5 / 4, 1.5 / 4, 0]]
        torch.testing.assert_close(ranking_disagreement(margins), torch.tensor(expected, dtype=torch.float64))

    def test_between_two_ties_lies_no_flip(self):
        assert ranking_disagreement(torch.tensor([[0.0, 0.0], [0.0, 1.0]])).tolist() == [[0, 0.25], [0.25, 0]]

    def test_sizes_of_margins_do_not_matter(self):
        margins = torch.randn(4, 50)
        assert torch.equal(
            ranking_disagreement(margins), ranking_disagreement(margins * torch.rand(4, 50).clamp_min(1e-6))
        )

    def test_chance_gives_one_half(self):
        disagreement = ranking_disagreement(torch.randn(3, 20_000))
        assert disagreement[0, 1].item() == pytest.approx(0.5, abs=0.02)


class TestRankingConsistency:
    def test_by_hand(self):
        margins = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 1.0, -1.0], [-1.0, 3.0, 0.0, -2.0]])
        assert ranking_consistency(margins, [0.0, 0.5, 0.9]) == {
            "flips_from_next_cleaner": {0.5: 0.25, 0.9: 1.5 / 4},
            "flips_from_cleanest": {0.5: 0.25, 0.9: 2.5 / 4},
            "flips_per_pair": 2.5 / 4,
            "never_flips": 0.25,
        }

    def test_a_pair_that_flips_forth_and_back_agrees_with_the_cleanest_level(self):
        result = ranking_consistency(torch.tensor([[1.0], [-1.0], [1.0]]), [0.1, 0.2, 0.3])
        assert result["flips_from_next_cleaner"] == {0.2: 1, 0.3: 1}
        assert result["flips_from_cleanest"] == {0.2: 1, 0.3: 0}
        assert result["flips_per_pair"] == 2 and result["never_flips"] == 0

    @pytest.mark.parametrize("sigmas", [[0.5], [0.9, 0.1], [0.1, 0.1]])
    def test_levels_must_be_several_and_in_order(self, sigmas):
        with pytest.raises(ValueError, match="`sigmas` must be at least two noise levels in ascending order"):
            ranking_consistency(torch.zeros(len(sigmas), 3), sigmas)
