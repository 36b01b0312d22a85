# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""An append-only JSONL file for one writer, whose rows are on disk before their sender knows of it."""

import fcntl
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .study import read_jsonl


logger = logging.get_logger(__name__)


class AppendLog:
    """
    A JSONL file, open for appending by one process.

    A row is written with one system call and synchronised to the disk before [`~AppendLog.append`] returns. A row whose key
    is known is not written again, so that a sender without an answer can send it again. What a killed process left of a line is cut off:
    it was never acknowledged. A whole last line without its end stays.

    Args:
        file (`str` or `Path`): The file. Made if it does not exist.
        key (`str`): The field that names a row.
        required (`Iterable[str]`, *optional*): Fields that each row has.

    Raises:
        RuntimeError: if another process has it open.
        ValueError: if a line before the last one is damaged.
    """

    def __init__(self, file: str | Path, key: str, required: Iterable[str] = ()):
        self.file, self.key = Path(file), key
        self._descriptor: int | None = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(
                    f"{self.file} is in use by another process, such as a second server. Stop it first."
                ) from None
            self._mend_last_line()
            _sync_folder(self.file.parent)
            self.rows = read_jsonl(self.file, required=(key, *required))
        except BaseException:
            self.close()
            raise
        self._keys = {row[key] for row in self.rows}
        self._lock = threading.Lock()

    def _mend_last_line(self) -> None:
        """End a last line that is whole, as an editor may leave it, and cut off one that is not."""
        content = self.file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole == len(content):
            return
        try:
            json.loads(content[whole:])
            os.write(self._descriptor, b"\n")
        except ValueError:
            logger.warning(
                f"{self.file} ends with {len(content) - whole} bytes of a row that was never acknowledged. They are cut off."
            )
            os.ftruncate(self._descriptor, whole)
        os.fsync(self._descriptor)

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def append(self, row: dict[str, Any]) -> bool:
        """
        Write a row, and return when it is on disk.

        Returns:
            `bool`: `False` if its key is known, and it was not written again.

        Raises:
            OSError: if it cannot be written whole, such as on a full disk. The file is as before.
        """
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        with self._lock:
            if row[self.key] in self._keys:
                return False
            size = os.fstat(self._descriptor).st_size
            try:
                written = os.write(self._descriptor, line)
                if written < len(line):
                    raise OSError(
                        f"only {written} of {len(line)} bytes could be written to {self.file}: is the disk full?"
                    )
                os.fsync(self._descriptor)
            except OSError:
                os.ftruncate(self._descriptor, size)
                raise
            self._keys.add(row[self.key])
            self.rows.append(row)
            return True

    def close(self) -> None:
        """Close the file, so that another process can open it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "AppendLog":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
