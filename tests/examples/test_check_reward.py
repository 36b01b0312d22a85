# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from tapo_trl.rewards.pretrained.clip import PickScoreReward
from tests.testing_utils import save_tiny_clip


SCRIPT = Path(__file__).parents[2] / "examples" / "check_reward.py"


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["check_reward.py", *argv])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return exit.value.code


def test_published_score(monkeypatch, capsys):
    pytest.importorskip("rapidocr")
    assert run(monkeypatch, "ocr", "--device", "cpu") == 0
    output = capsys.readouterr().out
    assert "1.0000  published 1.0000" in output and "As in the definition" in output


def test_another_score(monkeypatch, tmp_path, capsys):
    folder = save_tiny_clip(tmp_path / "clip")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    script = runpy.run_path(str(SCRIPT))
    check = script["CHECKS"]["clip"]
    check.images, check.kwargs = [str(tmp_path / "red.png")] * 2, {"weights": folder}
    monkeypatch.setattr(sys, "argv", ["check_reward.py", "clip", "--device", "cpu"])
    assert script["main"]() == 1
    assert "NOT as in the test of CLIPModel" in capsys.readouterr().out


def test_a_picture_of_ones_own(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(PickScoreReward, "weights", save_tiny_clip(tmp_path / "clip"))
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    image = ["--image", str(tmp_path / "red.png"), "--prompt", "red"]
    assert run(monkeypatch, "pickscore", "--device", "cpu", *image) == 0
    output = capsys.readouterr().out
    assert "usual range 16 to 26" in output and "'red'. No published score" in output
