# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from tapo_trl.metrics import area_under_curve, score_distributions


class TestAreaUnderCurve:
    @pytest.mark.parametrize(
        ("chosen", "rejected", "expected"),
        [
            ([2.0, 3.0], [0.0, 1.0], 1.0),
            ([0.0], [1.0, 2.0], 0.0),
            ([1.0, 1.0], [1.0], 0.5),
            ([3.0, 1.0], [2.0, 1.0], 2.5 / 4),  # 3 > 2, 3 > 1, 1 < 2, 1 = 1
        ],
    )
    def test_by_hand(self, chosen, rejected, expected):
        assert area_under_curve(torch.tensor(chosen), torch.tensor(rejected)) == expected

    def test_against_all_pairs(self):
        chosen, rejected = torch.randint(0, 9, (40,)).float() + 1, torch.randint(0, 9, (70,)).float()
        difference = chosen[:, None] - rejected[None]
        expected = ((difference > 0).double() + 0.5 * (difference == 0).double()).mean().item()
        assert area_under_curve(chosen, rejected) == pytest.approx(expected, abs=1e-12)


def test_score_distributions_by_hand():
    result = score_distributions(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.0, 0.0, 6.0]))
    assert result["chosen"]["mean"] == 3 and result["rejected"]["mean"] == 2
    assert result["chosen"]["std"] == pytest.approx((8 / 3) ** 0.5)
    assert result["chosen"]["quantiles"] == pytest.approx({0.05: 1.2, 0.25: 2, 0.5: 3, 0.75: 4, 0.95: 4.8})
    assert result["margin"]["mean"] == 1 and result["margin"]["quantiles"][0.5] == 1  # 1, 3, -1
    assert result["auc"] == pytest.approx(6 / 9)


def test_one_pair_has_no_spread():
    assert score_distributions(torch.tensor([2.0]), torch.tensor([1.0]))["chosen"]["std"] == 0
