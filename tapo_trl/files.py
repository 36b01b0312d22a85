# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Files of runs and caches: where they are, how they are written, and fingerprints of the networks that they depend on."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HOME


if TYPE_CHECKING:
    from diffusers import ModelMixin


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def cache_root(cache_dir: str | Path | None) -> Path:
    """Root of the caches: `cache_dir`, by default `tapo_trl` in the Hugging Face home."""
    return Path(HF_HOME) / "tapo_trl" if cache_dir is None else Path(cache_dir)


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """
    Write a file that is there whole or not at all, also when several processes write it at once. The body writes to the path
    that it gets, which then takes the place of `file`.
    """
    start = file.name.encode()[:200].decode(errors="ignore")  # file systems allow 255 bytes
    aside = file.with_name(f"{start}.{os.getpid()}.tmp")
    yield aside
    os.replace(aside, file)


def local_file(name_or_path: str | os.PathLike, file: str, subfolder: str | None = None, **hub_arguments) -> str:
    """A file of a folder, or of a repository on the Hub, from which it is downloaded if need be."""
    if os.path.isdir(name_or_path):
        return os.path.join(name_or_path, subfolder or "", file)
    return hf_hub_download(str(name_or_path), file, subfolder=subfolder, **hub_arguments)


def check_folder_name(folder: str | os.PathLike, option: str) -> None:
    """
    Raises:
        ValueError: if a folder that an option names cannot be made: it has no name, or it or one above it is a file.
    """
    if not str(folder).strip():
        raise ValueError(f"`{option}` is empty: name a folder, or leave it out.")
    for path in (Path(folder), *Path(folder).parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"`{option}={folder}` cannot be created: {path} is a file. Name another folder.")


def update_with_weights(digest: "hashlib._Hash", model: torch.nn.Module) -> None:
    """
    Feed a hash with the shape of every parameter, its start and the sum of its bits as an integer, which is exact in any order
    and moves with any of its values, such as the embedding of a single token.
    """
    for parameter in model.parameters():
        parameter = parameter.detach()
        bits = parameter.view(_INTEGERS[parameter.element_size()]).sum(dtype=torch.int64).item()
        digest.update(f"{tuple(parameter.shape)} {bits}".encode())
        digest.update(parameter.flatten()[:16].float().cpu().numpy().tobytes())


def weights_fingerprint(model: "ModelMixin") -> str:
    """Short hash of a configuration, a precision and weights."""
    digest = hashlib.sha256(f"{json.dumps(_config(model), sort_keys=True, default=str)} {model.dtype}".encode())
    update_with_weights(digest, model)
    return digest.hexdigest()[:16]


def signs_fingerprint(model: "ModelMixin") -> str:
    """Short hash of a configuration and the signs of all weights, which no change of precision moves."""
    digest = hashlib.sha256(json.dumps(_config(model), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().signbit().numpy().tobytes())
    return digest.hexdigest()[:16]


def _config(model: "ModelMixin") -> dict:
    return {key: value for key, value in model.config.items() if not key.startswith("_")}
