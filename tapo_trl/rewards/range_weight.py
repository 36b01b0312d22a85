# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Weights of rewards that depend on the noise level."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RangeWeight:
    """
    A weight of noise levels `min_sigma <= sigma < max_sigma`, and 0 elsewhere.

    Args:
        weight (`float`): the weight.
        min_sigma (`float`, *optional*, defaults to `0.0`): the first noise level at which it counts.
        max_sigma (`float`, *optional*, defaults to infinity): the first one from which it counts no more.
    """

    weight: float
    min_sigma: float = 0.0
    max_sigma: float = math.inf

    def __call__(self, sigma: float) -> float:
        return self.weight if self.min_sigma <= sigma < self.max_sigma else 0.0
