# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The GPU script with tiny networks on a CPU."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_steps_write_rows_and_a_failure_is_one(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["benchmarks/gpu/run.sh", str(tmp_path), "--tiny", "--steps", "wan_passes", "slrm_24gb"]
    subprocess.run(command, check=True, env=environment)
    passes, slrm = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert passes["problem"] is None and passes["rows"][0]["forward_backward"] > passes["rows"][0]["forward"] > 0
    assert slrm["rows"][0]["updates"] == 4 and slrm["rows"][0]["seconds_per_pair"] > 0

    # A step for which no time is left is named, and the script fails
    result = subprocess.run([*command[:3], "--seconds", "5", "--steps", "wan_passes"], env=environment)
    (left_out,) = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert result.returncode == 1 and left_out["problem"] == "no time was left"
