# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
from datasets import Dataset

from tapo_trl.data.dimensions import check_dimension_weights, combine_dimensions


def labelled(**labels) -> Dataset:
    return Dataset.from_dict({f"label_{dimension}": values for dimension, values in labels.items()})


def test_sign_of_the_weighted_sum():
    dataset = labelled(quality=[1, 1, 0, 0.5, 1, 0.75], motion=[1, 0, 0, 0.5, 0.5, 0.25], text=[0.0, 1, 1, 1, 1, 1])
    preference = combine_dimensions(dataset, {"quality": 3.0, "motion": 1.0}, "pairs")
    np.testing.assert_allclose(preference, [1, 0.5, -1, 0, 0.75, 0.25])


def test_a_tie_is_exact_in_spite_of_rounding():
    # (0.1 + 0.2) - 0.3 is not 0 in floating point.
    dataset = labelled(a=[1], b=[1], c=[0])
    assert combine_dimensions(dataset, {"a": 0.1, "b": 0.2, "c": 0.3}, "pairs").tolist() == [0.0]


def test_unknown_dimension_names_those_there_are():
    message = r"`dimension_weights` names \['beauty'\], but `pairs` has labels of \['quality', 'motion'\]"
    with pytest.raises(ValueError, match=message):
        combine_dimensions(labelled(quality=[1], motion=[1]), {"quality": 1, "beauty": 1}, "pairs")
    with pytest.raises(ValueError, match="`pairs` has labels of no dimension: .* column `label_<dimension>`"):
        combine_dimensions(Dataset.from_dict({"label": [1]}), {"quality": 1}, "pairs")


@pytest.mark.parametrize("value", [1.5, -0.5, None, float("nan")])
def test_labels_out_of_range(value):
    with pytest.raises(
        ValueError, match=f"`label_quality` of `pairs` must hold numbers from 0 .* got {value} in row 1"
    ):
        combine_dimensions(labelled(quality=[0.5, value]), {"quality": 1}, "pairs")


def test_labels_that_are_no_numbers():
    with pytest.raises(ValueError, match="got 'A' in row 0"):
        combine_dimensions(labelled(quality=["A", "B"]), {"quality": 1}, "pairs")


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": -1.0}, {"a": float("nan")}, {"a": "1"}])
def test_weights(weights):
    with pytest.raises(ValueError, match="`dimension_weights` must give a positive number"):
        check_dimension_weights(weights)
