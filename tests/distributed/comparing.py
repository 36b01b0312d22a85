# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Compares what checkpoints hold."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=False)


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two nested values differ in a tensor or a number."""
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) else [where]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where}: other keys"]
        return [found for key in a for found in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{where}: other length"]
        pairs = enumerate(zip(a, b, strict=True))
        return [found for index, pair in pairs for found in differences(*pair, f"{where}/{index}")]
    return [where] if isinstance(a, (int, float, str, bool, type(None))) and a != b else []


def tensor_files(folder: Path) -> dict[str, Path]:
    """Files with weights and states. Random states are left out: nothing is drawn from them, and DeepSpeed does at will."""
    files = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".pt", ".bin")]
    return {path.relative_to(folder).as_posix(): path for path in files if path.name != "training_args.bin"}
