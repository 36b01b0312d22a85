# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from types import SimpleNamespace

import pytest

from tapo_trl import profiling
from tapo_trl.profiling import StageTimer


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is moved on."""
    clock = SimpleNamespace(seconds=7.0, perf_counter=lambda: clock.seconds)
    monkeypatch.setattr(profiling, "time", clock)
    return clock


class TestStageTimer:
    def test_a_stage_does_not_count_what_is_nested_in_it(self, clock):
        timer = StageTimer(enabled=True)
        for _ in range(2):
            with timer.stage("rollout"):
                clock.seconds += 2
                with timer.stage("policy", latents=3):
                    clock.seconds += 5
        rollout, policy = timer.stages["rollout"], timer.stages["policy"]
        assert rollout.seconds == 4 and rollout.calls == 2 and rollout.latents == 0
        assert policy.seconds == 10 and policy.calls == 2 and policy.latents == 6

    def test_an_error_ends_its_stages(self):
        timer = StageTimer(enabled=True)
        with pytest.raises(KeyError), timer.stage("rollout"), timer.stage("policy"):
            raise KeyError
        with timer.stage("rollout"):
            pass
        assert timer.stages["rollout"].calls == 2 and timer.stages["policy"].calls == 1

    def test_the_table_adds_up(self, clock):
        timer = StageTimer(enabled=True)
        with timer.stage("rollout"), timer.stage("policy", latents=4):
            clock.seconds += 3
        clock.seconds += 1
        *lines, last = timer.table().splitlines()
        rows = {line[:28].strip(): line[28:].split() for line in lines}
        seconds = {name: float(row[0]) for name, row in rows.items() if name != "stage"}
        assert seconds == {"policy": 3, "rollout": 0, "everything else": 1, "all": 4}
        assert rows["policy"][1:] == ["1", "4", "75.0%"]
        assert last.startswith("100.0%")

    def test_measures_nothing_unless_enabled(self):
        timer = StageTimer()
        with timer.stage("rollout"):
            pass
        assert not timer.stages
