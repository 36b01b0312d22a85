# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Signals to a launcher reach the training: it saves, ends, leaves no process behind, and goes on exactly."""

from pathlib import Path

import pytest

from tapo_trl.runs.checkpoints import checkpoint_damage, last_good_checkpoint
from tests.distributed.comparing import differences, read, tensor_files
from tests.distributed.conftest import REUSED, SLRM_RESUME
from tests.distributed.launching import ENGINES, launch, stop


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
def stopped(job, tmp_path_factory) -> tuple[Path, dict[str, list[str]]]:
    """Folder of the runs that were stopped, all of whose processes have ended, and the whole checkpoints that they left."""
    folder, checkpoints = tmp_path_factory.mktemp("stopped"), {}
    for name, (launcher, number, run, _) in CASES.items():
        stop(ENGINES["ddp"], job | {"runs": {name: run | {"signal": number}}}, folder, launcher)
        found = (folder / name).glob("checkpoint-*")
        checkpoints[name] = [path.name for path in found if checkpoint_damage(path) is None]
    return folder, checkpoints


@pytest.fixture(scope="module")
def resumed(job, stopped) -> Path:
    """Folder of the same runs, which went on to their end."""
    runs = {name: run | {"resume": True} for name, (_, _, run, _) in CASES.items()}
    launch(ENGINES["ddp"], job | {"runs": runs}, stopped[0])
    return stopped[0]


@pytest.mark.parametrize("name", CASES)
class TestTwoProcesses:
    def test_save_and_end(self, stopped, name):
        _, checkpoints = stopped
        assert checkpoints[name] == ["checkpoint-2"]

    def test_go_on_exactly(self, results, resumed, name):
        expected = tensor_files(results("ddp").folder / CASES[name][3] / "checkpoint-5")
        found = tensor_files(resumed / name / "checkpoint-5")
        assert expected.keys() == found.keys()
        for file in expected:
            assert differences(read(expected[file]), read(found[file])) == [], file


def test_a_launcher_of_one_process_does_not_pass_signals_on_but_its_end_does(job, tmp_path):
    run = TAPO | {"signal": "SIGTERM"}
    stop(ENGINES["single"], job | {"runs": {"one": run}}, tmp_path, "accelerate")
    assert last_good_checkpoint(tmp_path / "one").name == "checkpoint-2"
