# Copyright 2026 The tapo_trl authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import time

import pytest

from tapo_trl.profiling import StageTimer


class TestStageTimer:
    def test_a_stage_does_not_count_what_is_nested_in_it(self):
        timer = StageTimer(enabled=True)
        for _ in range(2):
            with timer.stage("rollout"):
                time.sleep(0.02)
                with timer.stage("policy", latents=3):
                    time.sleep(0.05)
        rollout, policy = timer.stages["rollout"], timer.stages["policy"]
        assert rollout.seconds == pytest.approx(0.04, abs=0.02) and rollout.calls == 2 and rollout.latents == 0
        assert policy.seconds == pytest.approx(0.10, abs=0.03) and policy.calls == 2 and policy.latents == 6

    def test_an_error_ends_its_stages(self):
        timer = StageTimer(enabled=True)
        with pytest.raises(KeyError), timer.stage("rollout"), timer.stage("policy"):
            raise KeyError
        with timer.stage("rollout"):
            pass
        assert timer.stages["rollout"].calls == 2 and timer.stages["policy"].calls == 1

    def test_the_table_adds_up(self):
        timer = StageTimer(enabled=True)
        with timer.stage("rollout"), timer.stage("policy", latents=4):
            time.sleep(0.03)
        time.sleep(0.03)
        *lines, last = timer.table().splitlines()
        rows = {line[:28].strip(): line[28:].split() for line in lines}
        parts = sum(float(rows[name][0]) for name in ("policy", "rollout", "everything else"))
        assert parts == pytest.approx(float(rows["all"][0]), abs=0.02)
        assert rows["policy"][1:3] == ["1", "4"]
        assert float(last.split("%")[0]) > 95

    def test_measures_nothing_unless_enabled(self):
        timer = StageTimer()
        with timer.stage("rollout"):
            pass
        assert not timer.stages
