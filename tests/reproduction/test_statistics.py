# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest

from tapo_trl.reproduction.statistics import difference, estimate, verdict


class TestEstimate:
    def test_interval_of_three_runs(self):
        # Student's t with 2 degrees of freedom: 4.302653; standard deviation 1, standard error 1 / sqrt(3)
        result = estimate([1.0, 2.0, 3.0])
        assert result.mean == pytest.approx(2.0)
        assert result.half_width == pytest.approx(4.302653 / 3**0.5, rel=1e-6)

    def test_one_run_has_no_interval(self):
        assert estimate([0.25]).half_width is None
        assert str(estimate([0.25])) == "0.250"

    def test_difference_pairs_the_seeds(self):
        # Far apart in level, and still the same difference: the interval is that of the differences
        result = difference([10.0, 20.0, 30.0], [9.0, 19.0, 29.0])
        assert result.mean == pytest.approx(1.0)
        assert result.half_width == pytest.approx(0.0, abs=1e-12)

    def test_difference_of_other_numbers_of_seeds_is_refused(self):
        with pytest.raises(ValueError):
            difference([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 1.1, 0.9], "holds"),
        ([-1.0, -1.1, -0.9], "does not hold: the opposite does"),
        ([1.0, -1.0, 0.2], "not decided"),
        ([1.0], "one seed: points the claimed way"),
        ([-1.0], "one seed: points the other way"),
    ],
)
def test_verdict(values, expected):
    assert verdict(estimate(values)) == expected
