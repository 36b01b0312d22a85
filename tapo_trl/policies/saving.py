# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Trained policies in the formats that diffusers loads."""

from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from diffusers import ModelMixin

from . import FlowPolicy
from .experts import ExpertStack


TRANSFORMER_FOLDER = "transformer"


def save_policy(
    folder: str | Path,
    policy: FlowPolicy,
    model: torch.nn.Module,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """
    Write what was trained in the format that diffusers loads.

    Args:
        folder (`str` or `Path`): where to.
        policy ([`FlowPolicy`]): the model's family.
        model (`torch.nn.Module`): the bare network. With LoRA, `pytorch_lora_weights.safetensors` is written, for
            `load_lora_weights`; otherwise the folder `transformer`, for `from_pretrained(..., subfolder="transformer")`. The
            second of two experts has files and a folder that end in `_2`.
        state_dict (`dict[str, torch.Tensor]`, *optional*): its weights, where each process has a part of them only.
    """
    if is_peft_model(model):
        policy.save_lora_weights(folder, model, state_dict)
    else:
        save_network(Path(folder) / TRANSFORMER_FOLDER, model, state_dict)


def save_network(folder: Path, network: torch.nn.Module, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """
    Write a transformer, or two experts, as diffusers does.

    Args:
        folder (`Path`): where to. The second expert comes beside it, into the folder whose name ends in `_2`.
        network (`torch.nn.Module`): the bare network, without adapters.
        state_dict (`dict[str, torch.Tensor]`, *optional*): its weights, where each process has a part of them only.
    """
    for prefix, path, part in _parts(folder, network):
        if state_dict is not None:
            own = {name.removeprefix(prefix): state_dict[name] for name in state_dict if name.startswith(prefix)}
            with torch.device("meta"):
                part = type(part).from_config(part.config)
            part.load_state_dict(own, assign=True)
        part.save_pretrained(path)


def load_network(folder: Path, network: torch.nn.Module) -> None:
    """Put the weights that [`save_network`] has written into a network of the same kind."""
    for _, path, part in _parts(folder, network):
        part.load_state_dict(type(part).from_pretrained(path).state_dict())


def _parts(folder: Path, network: torch.nn.Module) -> list[tuple[str, Path, ModelMixin]]:
    """Prefix of the names, folder and module of each transformer in a network."""
    if not isinstance(network, ExpertStack):
        return [("", folder, network)]
    second = folder.with_name(f"{folder.name}_2")
    return [("transformer.", folder, network.transformer), ("transformer_2.", second, network.transformer_2)]
