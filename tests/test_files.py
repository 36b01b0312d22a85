# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest
from huggingface_hub.constants import HF_HOME

from tapo_trl.files import atomic_write, cache_root, check_folder_name


def test_cache_root(tmp_path):
    assert cache_root(None) == Path(HF_HOME) / "tapo_trl"
    assert cache_root(str(tmp_path)) == cache_root(tmp_path) == tmp_path


class TestAtomicWrite:
    def test_replaces_the_file(self, tmp_path):
        file = tmp_path / "a.json"
        file.write_text("old")
        with atomic_write(file) as aside:
            aside.write_text("new")
            assert file.read_text() == "old"
        assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]

    def test_keeps_the_file_if_the_body_fails(self, tmp_path):
        file = tmp_path / "a.json"
        file.write_text("old")
        with pytest.raises(RuntimeError), atomic_write(file) as aside:
            aside.write_text("ne")
            raise RuntimeError
        assert file.read_text() == "old"


@pytest.mark.parametrize(
    ("folder", "expected"), [("", "is empty"), (" ", "is empty"), ("{file}", "is a file"), ("{file}/a/b", "is a file")]
)
def test_folders_that_cannot_be_made(tmp_path, folder, expected):
    file = tmp_path / "file"
    file.touch()
    check_folder_name(tmp_path / "new" / "folder", "cache_dir")
    with pytest.raises(ValueError, match=f"`cache_dir.*{expected}"):
        check_folder_name(folder.format(file=file), "cache_dir")
