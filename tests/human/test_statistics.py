# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import math
import time

import numpy as np
import pytest
from scipy.stats import binomtest

from tapo_trl.human.agreement import (
    krippendorff_alpha,
    label_table,
    percent_agreement,
    resample_pairs,
    sign_test,
    wilson_interval,
)
from tapo_trl.human.assignment import left_medium
from tapo_trl.human.ranking import Contest, bradley_terry, holm, rank_sources, win_shares
from tapo_trl.human.report import select_guidelines, study_report
from tapo_trl.human.simulate import SimulatedPerson

from .studies import make_study, vote


NAN = math.nan


def alpha_by_definition(table):
    """Krippendorff's alpha with loops over all pairs of labels, and the ordinal distance by its definition."""
    units = [row[~np.isnan(row)] for row in table]
    units = [unit for unit in units if len(unit) > 1]
    labels = np.concatenate(units)
    counts = {level: (labels == level).sum() for level in (0.0, 0.5, 1.0)}

    def distance(a, b):
        low, high = min(a, b), max(a, b)
        between = sum(count for level, count in counts.items() if low <= level <= high)
        return (between - (counts[a] + counts[b]) / 2) ** 2

    observed = sum(
        distance(a, b) / (len(unit) - 1)
        for unit in units
        for i, a in enumerate(unit)
        for j, b in enumerate(unit)
        if i != j
    )
    expected = sum(distance(a, b) for i, a in enumerate(labels) for j, b in enumerate(labels) if i != j)
    return 1 - (len(labels) - 1) * observed / expected


class TestAgreement:
    def test_alpha_is_its_definition_with_gaps(self):
        rng = np.random.default_rng(0)
        for _ in range(20):
            table = rng.choice([0.0, 0.5, 1.0], (12, 4))
            table[rng.random(table.shape) < 0.4] = NAN
            assert krippendorff_alpha(table) == pytest.approx(alpha_by_definition(table), abs=1e-12)

    def test_perfect_and_opposite(self):
        column = np.array([0.0, 1.0, 0.5, 1.0])
        assert krippendorff_alpha(np.stack([column, column], 1)) == 1.0
        assert krippendorff_alpha(np.stack([column, 1 - column], 1)) < 0

    def test_degenerate_tables_are_nan_or_zero(self):
        assert math.isnan(krippendorff_alpha(np.array([[1.0, NAN], [NAN, 0.0]])))  # no overlap
        assert math.isnan(krippendorff_alpha(np.ones((5, 2))))  # one answer only
        table = np.ones((60, 2))
        table[0, 1] = 0.0
        assert krippendorff_alpha(table) == pytest.approx(0.0, abs=1e-12)  # hence the percentage, too
        assert percent_agreement(table) == pytest.approx(59 / 60)

    def test_interval_holds_the_value(self):
        rng = np.random.default_rng(1)
        truth = rng.choice([0.0, 1.0], 80)
        table = np.stack([np.where(rng.random(80) < 0.8, truth, 1 - truth) for _ in range(3)], 1)
        low, high = resample_pairs(table, krippendorff_alpha)
        assert low < krippendorff_alpha(table) < high
        assert high - low < 0.4

    def test_table_has_nan_where_nobody_voted(self):
        votes = [vote("p01", "a", 1.0), vote("p02", "b", 0.5)]
        np.testing.assert_array_equal(label_table(votes, "visual_quality"), [[1.0, NAN], [NAN, 0.5]])

    @pytest.mark.parametrize(("wins", "total"), [(9, 13), (0, 5), (50, 100), (3, 3)])
    def test_sign_test_and_wilson_are_scipys(self, wins, total):
        reference = binomtest(wins, total)
        assert sign_test(wins, total) == pytest.approx(reference.pvalue)
        interval = reference.proportion_ci(method="wilson")
        assert wilson_interval(wins, total) == pytest.approx((interval.low, interval.high))


class TestRanking:
    def test_bradley_terry_finds_the_strengths_that_made_the_games(self):
        strengths = np.array([-1.0, 0.0, 0.3, 0.7])
        chances = 1 / (1 + np.exp(strengths[None] - strengths[:, None]))
        wins = 1000 * chances
        np.fill_diagonal(wins, 0)
        np.testing.assert_allclose(bradley_terry(wins, prior=0), strengths - strengths.mean(), atol=1e-6)

    def test_the_prior_keeps_strengths_finite_and_more_games_count_more(self):
        few, many = (bradley_terry(np.array([[0.0, number], [0.0, 0.0]])) for number in (5, 50))
        assert 0 < few[0] - few[1] < many[0] - many[1] < 20

    def test_resampling_people_and_prompts_is_wider_than_independent_votes(self):
        """People have tastes of their own, so that votes of one person say less than as many of different people."""
        rng = np.random.default_rng(0)
        tastes = np.clip(rng.normal(0.66, 0.2, 13), 0, 1)
        contests = [
            Contest(f"p{person}", f"q{prompt}", ("a", "b"), float(rng.random() < taste))
            for person, taste in enumerate(tastes)
            for prompt in range(20)
        ]
        row = win_shares(contests)[0]
        low, high = wilson_interval(row["wins"], 260)
        assert row["low"] < low < row["share"] < high < row["high"]
        assert (row["people"], row["prompts"], row["wins"] + row["losses"]) == (13, 20, 260)

    def test_the_sign_test_has_its_level_though_votes_on_a_prompt_agree(self):
        """Of two equal sources, each of 40 prompts favours one: 5 people see the same two pictures."""
        rng, ours, naive = np.random.default_rng(0), 0, 0
        for _ in range(1000):
            shares = rng.beta(0.4, 0.4, 40)
            contests = [
                Contest(f"p{person}", f"q{prompt}", ("a", "b"), float(rng.random() < share))
                for prompt, share in enumerate(shares)
                for person in range(5)
            ]
            (row,) = win_shares(contests, samples=1)
            ours += row["p"] < 0.05
            naive += sign_test(row["wins"], row["wins"] + row["losses"]) < 0.05
        assert 0.02 <= ours / 1000 <= 0.065  # a sign test of 40 reaches 3.9 %
        assert naive / 1000 > 0.2  # votes as independent trials

    def test_the_sign_test_counts_prompts(self):
        votes = {"q0": (1.0, 1.0, 0.0), "q1": (1.0, 0.5, 0.5), "q2": (1.0, 0.0), "q3": (0.0, 0.0, 0.0)}
        contests = [
            Contest(f"p{i}", name, ("a", "b"), label)
            for name, labels in votes.items()
            for i, label in enumerate(labels)
        ]
        (row,) = win_shares(contests, samples=10)
        assert (row["wins"], row["ties"], row["losses"]) == (4, 2, 5)
        assert row["p"] == sign_test(2, 3)  # q2 is even

    def test_shares_do_not_depend_on_which_medium_is_first(self):
        contests = [Contest("p", f"q{i}", ("a", "b"), 1.0) for i in range(3)]
        swapped = [Contest("p", f"q{i}", ("b", "a"), 0.0) for i in range(3)]
        assert win_shares(contests)[0]["share"] == win_shares(swapped)[0]["share"] == 1.0

    def test_sources_come_best_first_with_intervals(self):
        rng = np.random.default_rng(0)
        order = {"best": 2.0, "middle": 1.0, "worst": 0.0}
        contests = [
            Contest(f"p{i % 7}", f"q{i}", (a, b), float(rng.random() < 1 / (1 + np.exp(order[b] - order[a]))))
            for i in range(150)
            for a, b in (("best", "middle"), ("worst", "middle"), ("best", "worst"))
        ]
        rows = rank_sources(contests, samples=200)
        assert [row["source"] for row in rows] == ["best", "middle", "worst"]
        assert all(row["low"] < row["score"] < row["high"] for row in rows)

    def test_holm(self):
        assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
        assert holm([]) == []


class TestReport:
    @pytest.fixture
    def simulated(self, tmp_path):
        """Four people of known accuracy, ties and bias to the left, on 500 pairs of which the truth is known."""
        study = make_study(tmp_path, 2, gold=0)
        pairs = study.read_pairs()
        pairs = [
            type(pairs[0])(
                f"{i:04d}",
                f"p{i}",
                "prompt",
                *pairs[0].media,
                "a",
                "b",
                gold=dict.fromkeys(study.dimension_names, i % 2),
            )
            for i in range(500)
        ]
        study.write_pairs(pairs)
        people = [SimulatedPerson(f"p{number:02d}", 0.8, ties=0.1, left_bias=0.2) for number in range(4)]
        events = [person.vote(study, pair, float(pair.gold["visual_quality"])) for person in people for pair in pairs]
        return study, events

    def test_accuracy_ties_and_bias_come_back(self, simulated):
        study, events = simulated
        person = study_report(study, events, samples=10)["annotators"]["all"]
        left, right = 0.2 + 0.8 * 0.5, 0.9 * (0.2 * 0.5 + 0.8 * 0.8)
        for name, truth in (("ties", 0.1), ("left", left), ("gold", right)):
            values = person[name]
            assert values["low"] < truth < values["high"], name
            assert values["high"] - values["low"] < 0.035
        assert person["left"]["p"] < 0.01

    def test_several_answers_of_a_vote_are_one_for_the_bias(self, tmp_path):
        study = make_study(tmp_path, 40)
        events = []
        for number, pair in enumerate(study.read_pairs()):  # 26 of 40 times left, in both dimensions
            left = left_medium(study.seed, "p01", pair)
            events.append(vote("p01", pair.pair_id, float((left == 0) == (number < 26)), left=left))
        left = study_report(study, events, samples=10)["annotators"]["p01"]["left"]
        assert (left["share"], left["n"], left["p"]) == (26 / 40, 80, sign_test(26, 40))

    def test_warnings(self, tmp_path):
        study = make_study(tmp_path, 12, gold=1)
        events = [vote("p01", pair.pair_id, 1.0) for pair in study.read_pairs()]
        warnings = " ".join(study_report(study, events, samples=10)["warnings"])
        assert "a wins 100%" in warnings
        assert "no alpha" in warnings

    def test_gold_and_repeats_are_no_contests(self, tmp_path):
        study = make_study(tmp_path, 8, gold=2, repeats=2)
        events = [vote("p01", pair.pair_id, 1.0) for pair in study.read_pairs()]
        report = study_report(study, events, samples=10)
        assert report["wins"][0]["wins"] == 6
        assert report["annotators"]["p01"]["same"] == pytest.approx(
            {"share": 1.0, "low": 0.51, "high": 1.0, "n": 4}, abs=0.01
        )

    def test_votes_on_earlier_questions_are_not_pooled(self, tmp_path):
        study = make_study(tmp_path, 2)
        old, new = vote("p01", "0000", guideline="other"), vote("p01", "0001", guideline=study.guideline_hash)
        assert select_guidelines(study, [old, new]) == ([new], 1)
        assert select_guidelines(study, [old, new], "all") == ([old, new], 0)

    def test_votes_on_pairs_that_are_gone_are_named(self, tmp_path):
        study = make_study(tmp_path, 2)
        report = study_report(study, [vote("p01", "0000"), vote("p01", "renamed")], samples=10)
        assert report["votes"] == 1
        assert any(
            "1 votes are on pairs that pairs.jsonl does not have, such as renamed" in w for w in report["warnings"]
        )


def test_a_large_study_takes_seconds():
    contests = [Contest(f"p{n % 3}", f"prompt {n // 3}", ("a", "b"), (n % 7) / 6 // 0.4 / 2) for n in range(30_000)]
    start = time.process_time()
    row = win_shares(contests, samples=100)[0]
    assert row["wins"] + row["ties"] + row["losses"] == 30_000
    balances = [sum((n % 7) / 6 // 0.4 / 2 - 0.5 for n in range(first, first + 3)) for first in range(0, 30_000, 3)]
    assert row["p"] == sign_test(sum(b > 0 for b in balances), sum(b != 0 for b in balances))
    assert time.process_time() - start < 10  # minutes where each sample looks the names up again
