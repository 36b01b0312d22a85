# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""One set of frozen weights for a policy and for the reward models that were trained with LoRA from the same base."""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.utils import _add_variant
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftConfig
from safetensors import safe_open
from torch import nn

from ..files import local_file


WEIGHTS = "diffusion_pytorch_model.safetensors"
LEAVES_BASE = (True, False, "gaussian", "orthogonal")  # ways to start a LoRA that do not change what it is added to


def base_names(transformer: nn.Module) -> dict[str, str]:
    """Parameters and buffers that are no adapter's, from their names without adapters to those that they have."""
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): name
        for name, _ in all_tensors(transformer)
        if "lora_" not in name and ".modules_to_save." not in name
    }


def base_tensors(transformer: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers that are no adapter's, by their names without adapters."""
    tensors = dict(all_tensors(transformer))
    return {name: tensors[own_name] for name, own_name in base_names(transformer).items()}


def base_fingerprint(model: nn.Module) -> str:
    """
    Short hash of the parameters of a network that are no adapter's: their shapes and the signs of all their values, which no
    change of precision moves. A fine-tuning, also a merged LoRA, turns those of small values.
    """
    parameters, digest = dict(model.named_parameters()), hashlib.sha256()
    for name, own_name in sorted(base_names(model).items()):
        if own_name in parameters:
            tensor = parameters[own_name].detach()
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(np.packbits(tensor.signbit().cpu().numpy()).tobytes())
    return digest.hexdigest()[:16]


def check_base_stays(lora_config: PeftConfig, what: str) -> None:
    """
    Raises:
        ValueError: if this is no LoRA, or one that changes the weights that it is added to, as PiSSA does.
    """
    if not isinstance(lora_config, LoraConfig):
        raise ValueError(
            f"Only LoRA is known to leave shared weights alone: {what} is a `{type(lora_config).__name__}`."
        )
    for name, allowed in (("init_lora_weights", LEAVES_BASE), ("bias", ("none",))):
        value = getattr(lora_config, name)
        if value not in allowed:
            raise ValueError(
                f"`{name}={value!r}` of {what} changes the base's weights, which are shared: choose one of {allowed}, or do "
                "without sharing."
            )


def check_same(tensors: Iterator[tuple[str, torch.Tensor]], base: dict[str, torch.Tensor], label: str) -> None:
    """
    Raises:
        ValueError: if one of `tensors` is not the tensor of the same name in `base`, bit by bit.
    """
    for name, tensor in tensors:
        own = base[name]
        if tensor is own:
            continue
        facts = (tuple(tensor.shape), tensor.dtype), (tuple(own.shape), own.dtype)
        if facts[0] != facts[1]:
            problem = "it is {0[0]}, {0[1]} there, but {1[0]}, {1[1]} in the policy".format(*facts)
        elif not torch.equal(tensor.to(own.device), own):
            problem = "its values differ"
        else:
            continue
        raise ValueError(
            f"The {label} cannot share the policy's weights, because its base is another: `{name}` is the first tensor that is "
            f"not the same, {problem}."
        )


def saved_tensors(
    name_or_path: str,
    base: dict[str, torch.Tensor],
    variant: str | None = None,
    subfolder: str = "transformer",
    **kwargs,
) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Tensors of the transformer of a saved pipeline, one at a time, cast as they would be if they were loaded.

    Args:
        name_or_path (`str`): Hub id or folder of the pipeline.
        base (`dict[str, torch.Tensor]`): tensors that give names and precisions.
        variant (`str`, *optional*): variant of its files, such as `"fp16"`.
        subfolder (`str`, *optional*, defaults to `"transformer"`): its folder that the transformer is in.
        kwargs: arguments of [`~huggingface_hub.hf_hub_download`], such as `revision` or `token`.
    """
    file_of = functools.partial(local_file, name_or_path, subfolder=subfolder, **kwargs)
    index_name, weights_name = _add_variant(f"{WEIGHTS}.index.json", variant), _add_variant(WEIGHTS, variant)
    try:
        with open(file_of(index_name), encoding="utf-8") as index:
            files = sorted(set(json.load(index)["weight_map"].values()))
    except (EntryNotFoundError, FileNotFoundError):
        files = [weights_name]
    for file in files:
        with safe_open(file_of(file), framework="pt") as tensors:
            for name in tensors.keys():
                if name in base:
                    yield name, tensors.get_tensor(name).to(base[name].dtype)


def share_parameters(backbone: nn.Module, transformer: ModelMixin) -> int:
    """
    Put the transformer's base tensors in the place of a backbone's tensors of the same name. The objects are the same ones
    from then on, so that what moves or casts one of the two moves or casts both, but for buffers, of which PyTorch makes new
    ones: share again after it.

    Args:
        backbone (`nn.Module`): backbone of a reward model, with or without LoRA.
        transformer ([`~diffusers.ModelMixin`]): the policy's, with or without LoRA.

    Returns:
        `int`: number of tensors that are shared.
    """
    base, names = base_tensors(transformer), base_names(backbone)
    shared = base.keys() & names.keys()
    for name in shared:
        set_tensor(backbone, names[name], base[name])
    return len(shared)


def all_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, those that are not saved included."""
    return itertools.chain(module.named_parameters(), module.named_buffers())


def set_tensor(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor in the place of the parameter or buffer of this name. The object is kept: whoever else has it shares it."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = tensor
