# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The reproduction is part of a checkout: it is found there, knows the results that are kept there, and is missed elsewhere."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import tapo_trl
from tapo_trl.reproduction import EXPERIMENTS, Lab, RunQueue
from tapo_trl.reproduction.runs import read_results


ROOT = Path(tapo_trl.__file__).parents[1]
KNOWN = ROOT / "benchmarks" / "paper" / "emoji"


@pytest.mark.parametrize(
    ("name", "seeds"),
    [
        ("table1", 5),
        ("recipe", 5),
        ("longer", 3),
        ("table4", 3),
        ("ablation", 3),
        ("fig12", 3),
        ("fig15", 3),
        ("fig4", 3),
        ("table3", 3),
    ],
)
def test_known_results_are_still_known(name, seeds, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)  # recipes are named from there
    monkeypatch.syspath_prepend(ROOT / "examples" / "emoji")
    world = runpy.run_path("examples/emoji/world.py")["WORLD"]
    queue = RunQueue(world, "emoji", tmp_path, known=read_results(KNOWN / "runs.jsonl"))
    monkeypatch.setattr(queue, "_make", lambda runs: pytest.fail(f"{[run.label for run in runs.values()]} are new"))
    report = EXPERIMENTS[name](Lab(queue, range(seeds)))
    command = f"tapo-trl reproduce {name} --world emoji --seeds {seeds}"
    assert report.markdown(command) == (KNOWN / f"{name}.md").read_text(encoding="utf-8")


def test_outside_of_a_checkout(tmp_path):
    (tmp_path / "tapo_trl").symlink_to(ROOT / "tapo_trl")
    command = [sys.executable, "-m", "tapo_trl.cli", "reproduce", "table1"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("tapo-trl reproduce: error: ") and "need a checkout of the repository" in run.stderr
    assert "Traceback" not in run.stderr
