# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Means of few runs, and how sure they are."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """
    Mean of some runs.

    Args:
        mean (`float`): the mean.
        half_width (`float`, *optional*): half of the 95 % confidence interval, none for a single run.
        values (`tuple[float, ...]`): the runs.
    """

    mean: float
    half_width: float | None
    values: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.half_width is None else f" ± {self.half_width:.3f}")


def estimate(values: Sequence[float]) -> Estimate:
    """Mean with the interval of Student's t, which takes the runs for draws of a Gaussian."""
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ImportError(
            "Confidence intervals need SciPy, which is not installed: `pip install tapo-trl[demo]` or `pip install scipy`."
        ) from error

    values = tuple(values)
    if len(values) == 1:
        return Estimate(values[0], None, values)
    half_width = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return Estimate(statistics.mean(values), float(half_width), values)


def difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of the differences of runs with the same seeds, first minus second."""
    return estimate([a - b for a, b in zip(first, second, strict=True)])


def compare(first: Estimate, second: Estimate) -> str:
    """Whether a claim that the first is higher holds, of runs with the same seeds, in words and numbers."""
    return f"**{verdict(difference(first.values, second.values))}** ({first} against {second})."


def verdict(change: Estimate) -> str:
    """Whether a claim that something is higher than something else holds, of their [`difference`]."""
    if change.half_width is None:
        return "one seed: " + ("points the claimed way" if change.mean > 0 else "points the other way")
    if change.mean > change.half_width:
        return "holds"
    if change.mean < -change.half_width:
        return "does not hold: the opposite does"
    return "not decided"
