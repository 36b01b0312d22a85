# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Simulated people, to plan a study and to test what comes after one."""

import random
from typing import Any

from .assignment import left_medium
from .study import Pair, Study
from .votes import FIRST, SECOND, TIE


class SimulatedPerson:
    """
    A person who says tie, or else answers left without looking, or else is right, with given probabilities.

    Args:
        name (`str`): Name.
        accuracy (`float`): Probability of the right answer of somebody who looks.
        ties (`float`, *optional*, defaults to `0.0`): Probability of a tie.
        left_bias (`float`, *optional*, defaults to `0.0`): Probability of *left* without looking, where it is no tie.
        seed (`int`, *optional*, defaults to `0`): Seed.
    """

    def __init__(self, name: str, accuracy: float, ties: float = 0.0, left_bias: float = 0.0, seed: int = 0):
        self.name, self.accuracy, self.ties, self.left_bias = name, accuracy, ties, left_bias
        self.rng = random.Random(f"{seed} {name}")

    def _label(self, truth: float, left: int) -> float:
        if self.rng.random() < self.ties:
            return TIE
        if self.rng.random() < self.left_bias:
            return SECOND if left else FIRST
        return truth if self.rng.random() < self.accuracy else 1 - truth

    def vote(self, study: Study, pair: Pair, truth: float) -> dict[str, Any]:
        """
        An event for [`VoteStore`].

        Args:
            study ([`Study`]): The study.
            pair ([`Pair`]): The pair.
            truth (`float`): The right answer to all questions: 1 if medium 0 is better, 0 if medium 1 is.
        """
        left = left_medium(study.seed, self.name, pair)
        return {
            "id": f"simulated {self.name} {pair.pair_id}",
            "kind": "vote",
            "annotator": self.name,
            "pair_id": pair.pair_id,
            "left": left,
            "labels": {name: self._label(truth, left) for name in study.dimension_names},
            "ms": 5000,
            "guideline": study.guideline_hash,
        }
