# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Simulated people, to plan a study and to test what comes after one."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from .assignment import left_medium
from .study import Pair, Study
from .votes import FIRST, SECOND, TIE, VoteStore


class SimulatedPerson:
    """
    A person who says tie, or else answers left without looking, or else is right, with given probabilities.

    Args:
        name (`str`): Name.
        accuracy (`float`): Probability of the right answer of somebody who looks. Otherwise the answer is the opposite one; of two
            media that are equally good, it is one of them.
        ties (`float`, *optional*, defaults to `0.0`): Probability of a tie.
        left_bias (`float`, *optional*, defaults to `0.0`): Probability of *left* without looking, where it is no tie.
        seed (`int`, *optional*, defaults to `0`): Seed.

    Raises:
        ValueError: if a probability is not in [0, 1].
    """

    def __init__(self, name: str, accuracy: float, ties: float = 0.0, left_bias: float = 0.0, seed: int = 0):
        for option, value in (("accuracy", accuracy), ("ties", ties), ("left_bias", left_bias)):
            if not 0 <= value <= 1:
                raise ValueError(f"`{option}` must be in [0, 1], but it is {value}.")
        self.name, self.accuracy, self.ties, self.left_bias = name, accuracy, ties, left_bias
        self.rng = random.Random(f"{seed} {name}")

    def _label(self, truth: float, left: int) -> float:
        if self.rng.random() < self.ties:
            return TIE
        if self.rng.random() < self.left_bias:
            return SECOND if left else FIRST
        if self.rng.random() < self.accuracy:
            return truth
        return self.rng.choice((FIRST, SECOND)) if truth == TIE else 1 - truth

    def vote(self, study: Study, pair: Pair, truth: float | Mapping[str, float]) -> dict[str, Any]:
        """
        An event for [`VoteStore`].

        Args:
            study ([`Study`]): The study.
            pair ([`Pair`]): The pair.
            truth (`float` or `Mapping[str, float]`): The right answer to all questions, or to each: 1 if medium 0 is better, 0.5 for a tie,
                0 if medium 1 is.
        """
        left = left_medium(study.seed, self.name, pair)
        truths = truth if isinstance(truth, Mapping) else dict.fromkeys(study.dimension_names, truth)
        return {
            "id": f"simulated {self.name} {pair.pair_id}",
            "kind": "vote",
            "annotator": self.name,
            "pair_id": pair.pair_id,
            "left": left,
            "labels": {name: self._label(truths[name], left) for name in study.dimension_names},
            "ms": 5000,
            "guideline": study.guideline_hash,
        }

    def answer_probabilities(self, truth: float, left: int) -> dict[float, float]:
        """
        How probable each answer is.

        Args:
            truth (`float`): The right answer.
            left (`int`): The medium, 0 or 1, that is on the left.
        """
        looks = (1 - self.ties) * (1 - self.left_bias)
        chances = {FIRST: 0.0, TIE: self.ties, SECOND: 0.0}
        chances[SECOND if left else FIRST] += (1 - self.ties) * self.left_bias
        chances[truth] += looks * self.accuracy
        for wrong in (FIRST, SECOND) if truth == TIE else (1 - truth,):
            chances[wrong] += looks * (1 - self.accuracy) / (2 if truth == TIE else 1)
        return chances

    def expected_shares(self, true_ties: float = 0.0) -> dict[str, float]:
        """
        What [`study_report`] finds in many votes of this person.

        Args:
            true_ties (`float`, *optional*, defaults to `0.0`): Share of the answers to which *tie* is the right one.

        Returns:
            `dict[str, float]`: Shares of `ties` among all answers, of `left` among the others, of answers that are right on known pairs
            (`gold`), and of equal answers to repeated pairs (`same`).
        """
        shares = dict.fromkeys(("ties", "left", "same"), 0.0)
        for truth, weight in ((FIRST, 1 - true_ties), (TIE, true_ties)):
            on_left, on_right = (self.answer_probabilities(truth, left) for left in (0, 1))
            shares["ties"] += weight * on_left[TIE]
            shares["left"] += weight * (on_left[FIRST] + on_right[SECOND]) / 2
            shares["same"] += weight * sum(on_left[answer] * on_right[answer] for answer in on_left)
        shares["left"] = shares["left"] / (1 - shares["ties"]) if shares["ties"] < 1 else float("nan")
        gold = [self.answer_probabilities(FIRST, left)[FIRST] for left in (0, 1)]
        return shares | {"gold": sum(gold) / 2}


def give_votes(
    study: Study, people: Sequence[SimulatedPerson], truths: Mapping[str, float | Mapping[str, float]]
) -> int:
    """
    Let people vote on all pairs of a study, in `votes.jsonl`. Who has voted on a pair does not vote on it again.

    Args:
        study ([`Study`]): The study.
        people (`Sequence[SimulatedPerson]`): The people.
        truths (`Mapping[str, float | Mapping[str, float]]`): The right answers by `pair_id`, see [`SimulatedPerson.vote`].

    Returns:
        `int`: Number of new votes.
    """
    pairs = study.read_pairs()
    with VoteStore(study.folder / "votes.jsonl") as store:
        return sum(store.append(person.vote(study, pair, truths[pair.pair_id])) for person in people for pair in pairs)
