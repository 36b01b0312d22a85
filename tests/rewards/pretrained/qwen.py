# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json
from pathlib import Path

from .fixtures import recipes


def save_base(folder: Path, config: dict) -> Path:
    """A folder with the configuration and the tokenizer of a tiny Qwen2-VL, as its repository has them."""
    folder.mkdir()
    recipes.save_qwen_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
