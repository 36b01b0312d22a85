# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Labels per dimension (visual quality, motion consistency, text alignment, ...), combined into one preference."""

import math
from collections.abc import Mapping

import numpy as np
from datasets import Dataset

from .columns import column_values


LABEL_PREFIX = "label_"

# Sums of weighted labels this close to 0, as a share of the weights, are rounding errors.
_ROUNDING = 1e-6


def check_dimension_weights(weights: Mapping[str, float]) -> None:
    """
    Raises:
        ValueError: if there are no weights, or one is not a positive number.
    """
    numbers = all(isinstance(weight, (int, float)) and 0 < weight < math.inf for weight in weights.values())
    if not weights or not numbers:
        raise ValueError(
            "`dimension_weights` must give a positive number per dimension, such as `{'visual_quality': 1.0, "
            f"'motion_consistency': 1.0}}`, got {dict(weights)}. Leave out a dimension to ignore it."
        )


def combine_dimensions(dataset: Dataset, weights: Mapping[str, float], name: str) -> np.ndarray:
    """
    How much `chosen` is preferred over all dimensions: s = sum of w_d (2 l_d - 1), divided by the sum of the weights.

    Args:
        dataset ([`~datasets.Dataset`]): with a column `label_<dimension>` per weight, which says from 0 to 1 how much
            `chosen` is preferred in that dimension: 1 it is better, 0.5 a tie, 0 `rejected` is better.
        weights (`dict[str, float]`): weight w_d of each dimension.
        name (`str`): what the dataset is called in error messages.

    Returns:
        `np.ndarray` of shape `(number of rows,)`: s in [-1, 1], exactly 0 for a tie.

    Raises:
        ValueError: if a dimension has no column, or a label is missing or not in [0, 1].
    """
    found = [column.removeprefix(LABEL_PREFIX) for column in dataset.column_names if column.startswith(LABEL_PREFIX)]
    unknown = [dimension for dimension in weights if dimension not in found]
    if unknown:
        raise ValueError(
            f"`dimension_weights` names {unknown}, but `{name}` has labels of {found or 'no dimension'}: the labels of a "
            f"dimension are the column `{LABEL_PREFIX}<dimension>`."
        )
    labels = []
    for dimension in weights:
        values = column_values(dataset, LABEL_PREFIX + dimension)
        column = np.array([_number(value) for value in values])
        wrong = np.flatnonzero(~((column >= 0) & (column <= 1)))
        if len(wrong) > 0:
            raise ValueError(
                f"The column `{LABEL_PREFIX}{dimension}` of `{name}` must hold numbers from 0 (`rejected` is better) to 1 "
                f"(`chosen` is better), got {values[wrong[0]]!r} in row {wrong[0]}."
            )
        labels.append(column)
    shares = np.array(list(weights.values()), dtype=float)
    preference = (shares / shares.sum()) @ (2 * np.stack(labels) - 1)
    return np.where(np.abs(preference) < _ROUNDING, 0.0, preference)


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan
