# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from types import SimpleNamespace

import pytest

from benchmarks.speed import equal_seconds, steps


@pytest.fixture
def clock(monkeypatch):
    """The seconds of a process that only does what the test says."""
    clock = SimpleNamespace(seconds=3.0, process_time=lambda: clock.seconds)
    for module in (equal_seconds, steps):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_seconds_without_those_of_measuring_end_a_training(clock):
    def judge(trainer):
        clock.seconds += 100
        return {"reward": 0.5}

    curve, control = equal_seconds.CurveInSeconds(8.0, 2, judge), SimpleNamespace(should_training_stop=False)
    curve.attach("trainer")
    curve.on_train_begin(None, SimpleNamespace(global_step=0), None)
    for step in range(1, 10):
        clock.seconds += 3
        curve.on_step_end(None, SimpleNamespace(global_step=step), control)
        if control.should_training_stop:
            break
    assert [(point["step"], point["seconds"]) for point in curve.points] == [(0, 0), (2, 6), (3, 9)]


def test_a_step_is_split_into_its_parts(clock):
    times = steps.StepTimes()
    for _ in range(2):
        times.on_step_begin(None, None, None)
        clock.seconds += 1  # the optimizer, and all else
        for names, seconds in ((["rollout"], 2), (["rollout", "policy"], 4), (["rollout", "reward"], 8)):
            with times.timer.stage(names[0]), times.timer.stage(names[-1]):
                clock.seconds += seconds
        with times.timer.stage("rollout"), times.timer.stage("reward"), times.timer.stage("policy"):
            clock.seconds += 16
        with times.timer.stage("loss and backward"), times.timer.stage("policy, training"):
            clock.seconds += 32
        times.on_step_end(None, None, None)
    assert times.steps == [{"sampling": 22, "scoring": 8, "update": 33}] * 2


def test_the_report_is_of_all_seeds(monkeypatch, tmp_path):
    monkeypatch.setattr(equal_seconds, "RUNS", tmp_path / "runs.jsonl")

    def train(run, work):
        reward = run.seed + run.options.get("pairs_per_update", 4)
        return [{"step": step, "seconds": 4.01 * step, "reward": reward * step} for step in (0, 1, 2)]

    monkeypatch.setitem(equal_seconds.WORLDS, "mixture", (train, equal_seconds.WORLDS["mixture"][1]))
    equal_seconds.make("mixture", tmp_path, [0, 1])
    equal_seconds.make("mixture", tmp_path, [1, 2])
    assert len(equal_seconds.read_runs()) == 18
    lines = equal_seconds.report("mixture").splitlines()
    assert lines[0] == "| mixture: reward | rate | steps | 0 s | 4 s | 8 s |" and len(lines) == 2 + 6
    assert "| pairs_per_update: 2 | x2 | 2 | 0.00 ± 0.00 | 3.00 ± 1.00 | 6.00 ± 2.00 |" in lines
    assert equal_seconds.report("emoji") == ""
