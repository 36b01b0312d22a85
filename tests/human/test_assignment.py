# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest

from tapo_trl.human.assignment import LEASE_SECONDS, Assignment, left_medium
from tapo_trl.human.study import Pair

from .studies import make_study, vote


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def work(assignment, annotator, most=100):
    """Pairs in the order in which a person votes on them."""
    seen = []
    while len(seen) < most and (pair := assignment.next(annotator)) is not None:
        seen.append(pair.pair_id)
        assignment.record(vote(annotator, pair.pair_id))
    return seen


class TestSides:
    PAIRS = [Pair(f"{number}", "p", "prompt", "0.png", "1.png", "a", "b") for number in range(2000)]

    def test_they_are_even_and_differ_between_people(self):
        first, second = ([left_medium(0, name, pair) for pair in self.PAIRS] for name in ("p01", "p02"))
        assert 0.45 < sum(first) / len(first) < 0.55
        assert 0.45 < sum(a == b for a, b in zip(first, second, strict=True)) / len(first) < 0.55

    def test_a_repeated_pair_is_swapped(self):
        for pair in self.PAIRS[:20]:
            again = Pair("r", "p", "prompt", "0.png", "1.png", "a", "b", repeat_of=pair.pair_id)
            assert left_medium(0, "p01", again) == 1 - left_medium(0, "p01", pair)


class TestOrder:
    def test_each_person_sees_each_pair_once_in_an_order_of_their_own(self, tmp_path, clock):
        study = make_study(tmp_path, 12)
        assignment = Assignment(study, study.read_pairs(), [], clock)
        first, second = work(assignment, "p01"), work(assignment, "p02")
        assert sorted(first) == sorted(second) == [f"{number:04d}" for number in range(12)]
        assert first != second
        assert assignment.next("p01") is None

    def test_a_new_server_goes_on(self, tmp_path, clock):
        study = make_study(tmp_path, 8)
        pairs = study.read_pairs()
        whole = work(Assignment(study, pairs, [], clock), "p01")
        events = [vote("p01", pair_id) for pair_id in whole[:3]]
        assert work(Assignment(study, pairs, events, clock), "p01") == whole[3:]

    def test_votes_per_pair(self, tmp_path, clock):
        study = make_study(tmp_path, 10, votes_per_pair=2)
        assignment = Assignment(study, study.read_pairs(), [], clock)
        people = [f"p{number:02d}" for number in range(5)]
        open_people = list(people)
        while open_people:
            for name in list(open_people):
                if not work(assignment, name, most=1):
                    open_people.remove(name)
        assert set(assignment.votes.values()) == {2}
        assert sum(assignment.votes.values()) == 20

    def test_a_pair_that_somebody_looks_at_is_not_handed_out_again_until_the_lease_ends(self, tmp_path, clock):
        study = make_study(tmp_path, 2, votes_per_pair=1)
        assignment = Assignment(study, study.read_pairs(), [], clock)
        first, second = assignment.next("p01"), assignment.next("p02")
        assert first != second
        assert assignment.next("p03") is None
        assert assignment.next("p01") == first  # a reload
        clock.now = LEASE_SECONDS + 1
        assert assignment.next("p03") is not None

    def test_known_answers_come_regularly(self, tmp_path, clock):
        study = make_study(tmp_path, 20, gold=4, gold_every=5)
        pairs = study.read_pairs()
        gold = {pair.pair_id for pair in pairs if pair.gold}
        seen = work(Assignment(study, pairs, [], clock), "p01")
        assert [place for place, pair_id in enumerate(seen, 1) if pair_id in gold] == [5, 10, 15, 20]

    def test_repetitions_come_later_and_only_to_those_who_voted(self, tmp_path, clock):
        study = make_study(tmp_path, 12, repeats=3)
        assignment = Assignment(study, study.read_pairs(), [], clock)
        seen = work(assignment, "p01")
        assert len(seen) == 15
        for number in range(3):
            assert seen.index(f"r{number:04d}") > seen.index(f"{number:04d}")
        skipping = Assignment(study, study.read_pairs(), [], clock)
        seen = []
        while (pair := skipping.next("p01")) is not None:
            seen.append(pair.pair_id)
            skipping.record(vote("p01", pair.pair_id, kind="skip", reason="broken"))
        assert len(seen) == 12


class TestUndo:
    def test_the_pair_comes_back_and_its_vote_does_not_count(self, tmp_path, clock):
        study = make_study(tmp_path, 4, votes_per_pair=1)
        assignment = Assignment(study, study.read_pairs(), [], clock)
        seen = work(assignment, "p01", most=2)
        last = assignment.last("p01")
        assert last.pair_id == seen[-1]
        assignment.record(vote("p01", last.pair_id, kind="undo"))
        assignment.hold("p01", last)
        assert assignment.next("p01") == last
        assert assignment.votes[last.pair_id] == 0
        assert assignment.last("p01").pair_id == seen[0]
        assert assignment.progress("p01") == (1, 4)


def test_votes_on_pairs_that_are_gone_change_nothing(tmp_path):
    study = make_study(tmp_path, 3)
    assignment = Assignment(study, study.read_pairs(), [vote("p01", "renamed"), vote("p01", "0000")])
    assert assignment.progress("p01") == (1, 3)
    assert assignment.last("p01").pair_id == "0000"
    assert sorted(work(assignment, "p01")) == ["0001", "0002"]


def test_progress_counts_what_others_have_done(tmp_path):
    study = make_study(tmp_path, 4, gold=1, votes_per_pair=1)
    assignment = Assignment(study, study.read_pairs(), [])
    assert assignment.progress("p01") == (0, 4)
    assignment.record(vote("p02", "0000"))
    assignment.record(vote("p02", "0003"))  # the known answer: all see it
    assert assignment.progress("p01") == (0, 3)
    assert assignment.progress("p02") == (2, 4)
    assignment.record(vote("p02", "0000", kind="undo"))
    assert assignment.progress("p01") == (0, 4)


def test_progress_counts_only_repetitions_that_come(tmp_path):
    study = make_study(tmp_path, 3, repeats=2, votes_per_pair=1)
    assignment = Assignment(study, study.read_pairs(), [])
    assert assignment.progress("p01") == (0, 5)
    assignment.record(vote("p02", "0000"))  # its repetition comes to p02 alone
    assert assignment.progress("p01") == (0, 3)
    assert assignment.progress("p02") == (1, 5)
    assignment.record(vote("p01", "0001", kind="skip", reason="broken"))  # no repetition of what was skipped
    assert assignment.progress("p01") == (1, 2)
    seen = work(assignment, "p02")
    assert sorted(seen) == ["0001", "0002", "r0000", "r0001"]
    assert assignment.progress("p02") == (5, 5)
    assert assignment.next("p01") is None and assignment.progress("p01") == (1, 1)
    assignment.record(vote("p02", "r0000", kind="undo"))
    assert assignment.progress("p02") == (4, 5)
