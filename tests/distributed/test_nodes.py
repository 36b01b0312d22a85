# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Two launchers, as on two machines: where a process is killed, both end, and the run goes on exactly."""

import pytest

from tapo_trl.runs.checkpoints import last_good_checkpoint
from tests.distributed.comparing import differences, read, tensor_files
from tests.distributed.conftest import EMA_RESUME
from tests.distributed.launching import on_two_nodes


pytestmark = pytest.mark.distributed

RUN = EMA_RESUME["ema"]  # with a checkpoint at step 3


@pytest.mark.parametrize("launcher", ["accelerate", pytest.param("torchrun", marks=pytest.mark.exhaustive)])
def test_a_killed_process_ends_both_nodes_and_the_run_goes_on(job, results, tmp_path, launcher):
    killed = {"run": RUN | {"dies": {"process": 1, "step": 4}, "args": RUN["args"] | {"ddp_timeout": 60}}}
    codes = on_two_nodes(launcher, job | {"runs": killed}, tmp_path)
    assert all(code != 0 for code in codes), codes
    assert last_good_checkpoint(tmp_path / "run").name == "checkpoint-3"

    codes = on_two_nodes(launcher, job | {"runs": {"run": RUN | {"resume": True}}}, tmp_path)
    assert codes == [0, 0], [(tmp_path / f"node_{node}.log").read_text()[-4000:] for node in range(2)]
    expected = tensor_files(results("ddp").folder / "ema" / "checkpoint-5")
    found = tensor_files(tmp_path / "run" / "checkpoint-5")
    assert expected.keys() == found.keys() and len(found) >= 3
    for file in expected:
        assert differences(read(expected[file]), read(found[file])) == [], file
