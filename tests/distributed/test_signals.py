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

"""Signals to a launcher reach the training: it saves, ends, leaves no process behind, and goes on exactly."""

from functools import cache
from pathlib import Path

import pytest

from tapo_trl.trainer.checkpoints import last_good_checkpoint

from .comparing import differences, read, tensor_files
from .conftest import REUSED, SLRM_RESUME
from .launching import ENGINES, launch, stop


pytestmark = pytest.mark.distributed

TAPO, SLRM = REUSED | {"ema": True}, SLRM_RESUME["slrm_adam"]
WITH_LOADER = SLRM | {"args": SLRM["args"] | {"dataloader_num_workers": 1}}
CASES = {  # launcher, signal, run, and the unbroken run under DDP
    "killed": ("accelerate", "SIGKILL", TAPO, "ema"),
    "interrupted": ("accelerate", "SIGINT", TAPO, "ema"),
    # torchrun signals a whole group of processes, the data loader's among them
    "terminated": ("torchrun", "SIGTERM", WITH_LOADER, "slrm_adam"),
}


@pytest.fixture(scope="module")
def stopped(job, tmp_path_factory):
    """Folder of the runs that were stopped, and how long their processes stayed after their launcher had ended."""

    @cache
    def all_cases() -> tuple[Path, dict[str, float]]:
        folder, seconds = tmp_path_factory.mktemp("stopped"), {}
        for name, (launcher, number, run, _) in CASES.items():
            runs = {name: run | {"signal": number}}
            seconds[name] = stop(ENGINES["ddp"], job | {"runs": runs}, folder, launcher)
        return folder, seconds

    return all_cases


@pytest.fixture(scope="module")
def resumed(job, stopped) -> dict[str, dict]:
    folder, _ = stopped()
    stops = {name: last_good_checkpoint(folder / name) for name in CASES}
    runs = {name: run | {"resume": True} for name, (_, _, run, _) in CASES.items()}
    return stops, launch(ENGINES["ddp"], job | {"runs": runs}, folder)


@pytest.mark.parametrize("name", CASES)
class TestTwoProcesses:
    def test_save_and_end(self, stopped, name):
        folder, seconds = stopped()
        assert seconds[name] < 30
        checkpoint = last_good_checkpoint(folder / name)
        assert checkpoint.name in ("checkpoint-2", "checkpoint-3", "checkpoint-4")
        assert [path.name for path in (folder / name).glob("checkpoint-*")] == [checkpoint.name]

    def test_go_on_exactly(self, results, stopped, resumed, name):
        folder, _ = stopped()
        expected = tensor_files(results("ddp").folder / CASES[name][3] / "checkpoint-5")
        found = tensor_files(folder / name / "checkpoint-5")
        assert expected.keys() == found.keys()
        for file in expected:
            assert differences(read(expected[file]), read(found[file])) == [], file


def test_a_launcher_of_one_process_does_not_pass_signals_on_but_its_end_does(job, tmp_path):
    run = TAPO | {"signal": "SIGTERM"}
    assert stop(ENGINES["single"], job | {"runs": {"one": run}}, tmp_path, "accelerate") < 30
    assert last_good_checkpoint(tmp_path / "one").name in ("checkpoint-2", "checkpoint-4")
