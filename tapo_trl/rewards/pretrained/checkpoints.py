# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""Loading of published checkpoints that no `from_pretrained` reads: files, state dicts and converted models."""

import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import SafetensorError
from transformers import PreTrainedModel


Model = TypeVar("Model", bound=torch.nn.Module)


def weights_file(weights: str, filename: str, revision: str | None = None) -> Path:
    """
    A file of a checkpoint.

    Args:
        weights (`str`): folder, another file of that folder, or Hub id.
        filename (`str`): name of the file.
        revision (`str`, *optional*): revision on the Hub.

    Raises:
        OSError: if there is no such file, or if it cannot be downloaded.
    """
    path = Path(weights)
    if not path.exists():
        return Path(hf_hub_download(weights, filename, revision=revision))
    file = path / filename if path.is_dir() else path.with_name(filename)
    if not file.is_file():
        raise OSError(f"The folder `{file.parent}` has no file `{filename}`.")
    return file


def read_state_dict(file: str | os.PathLike, mmap: bool = False) -> dict[str, torch.Tensor]:
    """
    Tensors of a `.safetensors` file, or of a file of `torch.save`, of which nothing but tensors is unpickled.

    Args:
        file (`str` or `os.PathLike`): path of the file.
        mmap (`bool`, *optional*, defaults to `False`): whether the tensors of `torch.save` stay on the disk until they are used.

    Raises:
        ValueError: if it is no such file, or a broken one.
    """
    try:
        if str(file).endswith(".safetensors"):
            return safetensors.torch.load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        unsafe = re.search(r"Unsupported .*(?= was not an allowed)", str(error))
        problem = f"{unsafe[0]}, which is not unpickled." if unsafe else str(error).splitlines()[0]
        raise ValueError(
            f"`{file}` cannot be read as tensors: {problem} If its download was cut off, delete it."
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"`{file}` holds a `{type(state).__name__}`, but a dictionary of tensors is needed.")
    return state


def read_sharded(weights: str, revision: str | None = None) -> dict[str, torch.Tensor]:
    """
    All tensors of a checkpoint of transformers, in one file or in several, safetensors or not.

    Args:
        weights (`str`): folder or Hub id.
        revision (`str`, *optional*): revision on the Hub.

    Raises:
        OSError: if there is no checkpoint.
    """
    folder = Path(weights)
    if not folder.is_dir():
        patterns = ["*.json", "*.safetensors", "pytorch_model*.bin"]
        folder = Path(snapshot_download(weights, revision=revision, allow_patterns=patterns))
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return {name: tensor for file in files for name, tensor in read_state_dict(file, mmap=True).items()}
    raise OSError(f"The folder `{folder}` has no `*.safetensors` and no `pytorch_model*.bin`.")


def renamed(state: dict[str, torch.Tensor], names: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """
    A state dict under other names.

    Args:
        state (`dict[str, torch.Tensor]`): tensors.
        names (`Sequence[tuple[str, str]]`):
            patterns and what stands in their place, one after the other. A name that becomes one with `{}` is split into three, of
            queries, keys and values.
    """
    converted = {}
    for name, tensor in state.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        parts = zip("qkv", tensor.chunk(3), strict=True) if "{}" in name else [("", tensor)]
        converted |= {name.format(part): rows.contiguous() for part, rows in parts}
    return converted


def under(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Tensors whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def load_converted(model: Model, state_dict: dict[str, torch.Tensor], source: str, dtype: torch.dtype) -> Model:
    """
    Give a module that is not a [`~transformers.PreTrainedModel`] the converted tensors of a checkpoint.

    Args:
        model (`nn.Module`): the module.
        state_dict (`dict[str, torch.Tensor]`): its tensors, in its own names.
        source (`str`): the checkpoint, for the message.
        dtype (`torch.dtype`): precision.

    Raises:
        ValueError: if names or shapes do not fit.
    """
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(f"`{source}` is no checkpoint of this scorer: {error}") from error
    return model.to(dtype)


def pretrained_from_state_dict(
    model_class: type[PreTrainedModel], config, state_dict: dict[str, torch.Tensor], source: str, dtype: torch.dtype
) -> PreTrainedModel:
    """
    Make a model of transformers from the converted tensors of a checkpoint, without initialising it first.

    Args:
        model_class (`type`): class of the model.
        config ([`~transformers.PreTrainedConfig`]): its configuration.
        state_dict (`dict[str, torch.Tensor]`): its tensors, in its own names.
        source (`str`): the checkpoint, for the message.
        dtype (`torch.dtype`): precision.

    Raises:
        ValueError: if names or shapes do not fit.
    """
    try:
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=state_dict, dtype=dtype, output_loading_info=True
        )
    except RuntimeError as error:  # shapes
        raise ValueError(f"`{source}` is no checkpoint of this scorer: {error}") from error
    problems = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    problems += [f"{name} is not known" for name in sorted(info["unexpected_keys"])]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"`{source}` is no checkpoint of this scorer: {'; '.join(problems[:3])}{more}.")
    return model
