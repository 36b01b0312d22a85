# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json
from types import SimpleNamespace

import pytest

from tapo_trl.runs.checkpoints import (
    SEAL_NAME,
    check_keeps_checkpoints,
    checkpoint_damage,
    checkpoint_to_resume,
    last_good_checkpoint,
    seal_checkpoint,
)


def make_checkpoint(output_dir, step, sealed=True):
    folder = output_dir / f"checkpoint-{step}"
    (folder / "global_step").mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(bytes(range(256)) * 8)
    (folder / "global_step" / "optimizer.pt").write_bytes(b"moments")
    if sealed:
        seal_checkpoint(folder)
    return folder


class TestSeal:
    def test_a_sealed_checkpoint_is_whole(self, tmp_path):
        folder = make_checkpoint(tmp_path, 1)
        assert checkpoint_damage(folder) is None
        files = json.loads((folder / SEAL_NAME).read_text())["files"]
        assert set(files) == {"weights.safetensors", "global_step/optimizer.pt"}
        assert not list(folder.glob("*.tmp"))

    def test_without_a_seal_it_was_never_finished(self, tmp_path):
        assert "never finished" in checkpoint_damage(make_checkpoint(tmp_path, 1, sealed=False))

    @pytest.mark.parametrize("name", ["weights.safetensors", "global_step/optimizer.pt"])
    def test_a_missing_a_shorter_and_a_changed_file_are_found(self, tmp_path, name):
        for step, change in enumerate(
            (
                lambda path: path.unlink(),
                lambda path: path.write_bytes(b""),
                lambda path: path.write_bytes(_flip(path)),
            )
        ):
            folder = make_checkpoint(tmp_path, step)
            change(folder / name)
            assert name in checkpoint_damage(folder)

    def test_an_unreadable_seal(self, tmp_path):
        folder = make_checkpoint(tmp_path, 1)
        (folder / SEAL_NAME).write_text("{")
        assert SEAL_NAME in checkpoint_damage(folder)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    return bytes(data)


class TestLastGoodCheckpoint:
    def test_the_newest_by_step_not_by_name(self, tmp_path):
        for step in (9, 10, 2):
            make_checkpoint(tmp_path, step)
        assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-10"

    def test_falls_back_with_a_warning(self, tmp_path, caplog):
        good = make_checkpoint(tmp_path, 1)
        make_checkpoint(tmp_path, 2, sealed=False)
        (make_checkpoint(tmp_path, 3) / "weights.safetensors").unlink()
        assert last_good_checkpoint(tmp_path) == good

    def test_none(self, tmp_path):
        assert last_good_checkpoint(tmp_path) is None
        assert last_good_checkpoint(tmp_path / "missing") is None
        (tmp_path / "checkpoint-best").mkdir()
        assert last_good_checkpoint(tmp_path) is None


class TestCheckpointToResume:
    @pytest.mark.parametrize("word", [True, "true", "True", "TRUE", "yes", "1"])
    def test_the_last_whole_one(self, tmp_path, word):
        assert checkpoint_to_resume(word, tmp_path) is None, "starts anew without any"
        for step in (1, 2):
            make_checkpoint(tmp_path, step)
        make_checkpoint(tmp_path, 3, sealed=False)
        assert checkpoint_to_resume(word, tmp_path) == tmp_path / "checkpoint-2"

    @pytest.mark.parametrize("word", [None, False, "false", "False", "", "no", "0", "None"])
    def test_none(self, tmp_path, word):
        make_checkpoint(tmp_path, 1)
        assert checkpoint_to_resume(word, tmp_path) is None

    def test_a_folder(self, tmp_path, monkeypatch):
        folder = make_checkpoint(tmp_path, 1)
        monkeypatch.setenv("HOME", str(tmp_path))
        for name in (folder, str(folder), "~/checkpoint-1"):
            assert checkpoint_to_resume(name, "elsewhere") == folder

    def test_a_folder_that_cannot_be_used(self, tmp_path):
        make_checkpoint(tmp_path, 1, sealed=False)
        for name, reason in (("checkpoint-1", "never finished"), ("ture", "no such folder")):
            with pytest.raises(ValueError, match=f"`resume_from_checkpoint`.*{name} cannot be used: .*{reason}"):
                checkpoint_to_resume(str(tmp_path / name), tmp_path)


class TestCheckKeepsCheckpoints:
    def args(self, output_dir, save_strategy="steps"):
        return SimpleNamespace(output_dir=str(output_dir), save_strategy=save_strategy)

    def test_a_start_from_the_beginning(self, tmp_path):
        make_checkpoint(tmp_path, 1, sealed=False)
        check_keeps_checkpoints(self.args(tmp_path), None)  # nothing that could be used is lost
        make_checkpoint(tmp_path, 2)
        check_keeps_checkpoints(self.args(tmp_path, "no"), None)
        with pytest.raises(ValueError, match=r"checkpoint-2.*would overwrite.*`resume_from_checkpoint=True`"):
            check_keeps_checkpoints(self.args(tmp_path), None)

    def test_a_step_back_is_said(self, tmp_path, monkeypatch):
        folders = [make_checkpoint(tmp_path, step) for step in (1, 2, 3)]
        said = []
        monkeypatch.setattr("tapo_trl.runs.checkpoints.logger.warning", said.append)
        check_keeps_checkpoints(self.args(tmp_path), folders[-1])
        assert said == []
        check_keeps_checkpoints(self.args(tmp_path), folders[0])
        assert "['checkpoint-2', 'checkpoint-3']" in said[0]
