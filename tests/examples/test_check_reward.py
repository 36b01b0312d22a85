# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tapo_trl.data.videos import write_video
from tapo_trl.rewards.pretrained.clip import PickScoreReward
from tapo_trl.rewards.pretrained.videoreward import VideoReward
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


def test_a_reward_of_videos(monkeypatch, tmp_path, capsys):
    pytest.importorskip("av")
    write_video(tmp_path / "clip.mp4", torch.rand(3, 5, 32, 32), 8)

    class Scorer:
        def __call__(self, videos, prompts):
            assert videos.shape == (1, 3, 5, 32, 32) and prompts == ["noise"]
            return torch.tensor([1.5])

    def from_pretrained(fps):
        assert fps == 8
        return Scorer()

    monkeypatch.setattr(VideoReward, "from_pretrained", from_pretrained)
    video = ["--image", str(tmp_path / "clip.mp4"), "--prompt", "noise"]
    assert run(monkeypatch, "videoreward", "--device", "cpu", *video) == 0
    assert "1.5000" in capsys.readouterr().out
    assert run(monkeypatch, "videoreward") == 2
    assert "videoreward reads videos: give one" in capsys.readouterr().err
