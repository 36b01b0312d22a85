# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Trained policies in the formats that diffusers loads."""

from pathlib import Path

import torch
from accelerate.utils import is_peft_model

from . import FlowPolicy


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
            `load_lora_weights`; otherwise the folder `transformer`, for `from_pretrained(..., subfolder="transformer")`.
        state_dict (`dict[str, torch.Tensor]`, *optional*): its weights, where each process has a part of them only.
    """
    if is_peft_model(model):
        policy.save_lora_weights(folder, model, state_dict)
        return
    if state_dict is not None:
        with torch.device("meta"):
            model = type(model).from_config(model.config)
        model.load_state_dict(state_dict, assign=True)
    model.save_pretrained(Path(folder) / TRANSFORMER_FOLDER)
