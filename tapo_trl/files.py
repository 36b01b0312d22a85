# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.constants import HF_HOME


def cache_root(cache_dir: str | Path | None) -> Path:
    """Root of the caches: `cache_dir`, by default `tapo_trl` in the Hugging Face home."""
    return Path(HF_HOME) / "tapo_trl" if cache_dir is None else Path(cache_dir)


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """
    Write a file that is there whole or not at all, also when several processes write it at once. The body writes to the path
    that it gets, which then takes the place of `file`.
    """
    aside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    yield aside
    os.replace(aside, file)
