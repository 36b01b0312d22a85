# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import math
import random

import pytest

from tapo_trl.human.report import study_report
from tapo_trl.human.simulate import SimulatedPerson, give_votes
from tapo_trl.human.study import Pair
from tapo_trl.human.votes import FIRST, SECOND, TIE, read_events

from .studies import make_study


@pytest.mark.parametrize("truth", [FIRST, TIE, SECOND])
@pytest.mark.parametrize("left", [0, 1])
def test_answers_are_as_probable_as_they_are_frequent(truth, left):
    person = SimulatedPerson("p01", 0.7, ties=0.15, left_bias=0.25)
    answers = [person._label(truth, left) for _ in range(20_000)]
    chances = person.answer_probabilities(truth, left)
    assert sum(chances.values()) == pytest.approx(1)
    for answer, chance in chances.items():
        assert answers.count(answer) / len(answers) == pytest.approx(chance, abs=0.012)  # 3.4 standard errors


def test_a_person_without_faults_is_right():
    person = SimulatedPerson("p01", 1.0)
    for truth in (FIRST, TIE, SECOND):
        assert person.answer_probabilities(truth, 0)[truth] == 1.0
    assert person.expected_shares(0.25) == {"ties": 0.25, "left": 0.5, "same": 1.0, "gold": 1.0}


def test_shares_of_people_who_tie_always_have_no_left():
    shares = SimulatedPerson("p01", 0.5, ties=1.0).expected_shares()
    assert (shares["ties"], shares["same"], shares["gold"]) == (1.0, 1.0, 0.0) and shares["left"] != shares["left"]


def test_expected_shares_come_back_from_the_report(tmp_path):
    """Questions with answers of their own, a third of them ties; known answers and repetitions."""
    study, rng = make_study(tmp_path, 1), random.Random(0)
    media, pairs, truths = study.read_pairs()[0].media, [], {}
    for number in range(1000):
        name = f"{number:04d}"
        truths[name] = {dimension: rng.choice((FIRST, TIE, SECOND)) for dimension in study.dimension_names}
        pairs.append(Pair(name, name, "prompt", *media, "a", "b"))
    for number in range(400):
        name = f"gold {number}"
        truths[name] = dict.fromkeys(study.dimension_names, float(number % 2))
        pairs.append(Pair(name, name, "prompt", *media, "a", "a", gold=truths[name]))
    for number in range(800):
        name = f"{number:04d}"
        truths[f"again {name}"] = truths[name]
        pairs.append(Pair(f"again {name}", name, "prompt", *media, "a", "b", repeat_of=name))
    study.write_pairs(pairs)
    people = [SimulatedPerson(f"p{number:02d}", 0.8, ties=0.1, left_bias=0.2) for number in range(3)]
    assert give_votes(study, people, truths) == 3 * 2200
    assert give_votes(study, people, truths) == 0

    events = read_events(study.folder / "votes.jsonl", study.dimension_names)
    found = study_report(study, events, samples=10)["annotators"]["all"]
    answers = [truth for answers in truths.values() for truth in answers.values()]
    expected = people[0].expected_shares(answers.count(TIE) / len(answers))
    expected["same"] = people[0].expected_shares(1 / 3)["same"]
    for name, share in expected.items():
        error = math.sqrt(share * (1 - share) / found[name]["n"])
        assert error < 0.011 and abs(found[name]["share"] - share) < 3 * error, name


def test_a_probability_that_is_none_is_named():
    with pytest.raises(ValueError, match=r"`left_bias` must be in \[0, 1\], but it is 1.5"):
        SimulatedPerson("p01", 0.8, left_bias=1.5)
