# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""LoRA files for ComfyUI."""

import json
import math

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key


def comfyui_lora(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> dict[str, torch.Tensor]:
    """
    The tensors of a LoRA file of diffusers, with what ComfyUI needs beside them. It knows the names of diffusers' layers, and
    those of the two matrices of each; but it reads no metadata, and scales by 1 where a layer has no `alpha` beside them
    (`comfy/lora.py` and `comfy/weight_adapter/lora.py` of ComfyUI).

    Args:
        tensors (`dict[str, torch.Tensor]`): content of `pytorch_lora_weights.safetensors`.
        metadata (`dict[str, str]`, *optional*): its metadata. Without that of PEFT, the scale is 1, as in diffusers.

    Returns:
        `dict[str, torch.Tensor]`: the same tensors, and one named `"<layer>.alpha"` for each layer.

    Raises:
        ValueError: if there is something else than LoRA matrices of a transformer.
    """
    config = json.loads((metadata or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    config = {name.removeprefix("transformer."): value for name, value in config.items()}
    patterns, result = config.get("alpha_pattern") or {}, dict(tensors)
    for name, tensor in tensors.items():
        layer, _, matrix = name.rpartition(".lora_")
        if matrix not in ("A.weight", "B.weight") or not layer.startswith("transformer."):
            raise ValueError(
                f"`{name}` is no LoRA matrix of a transformer, which is all that a file for ComfyUI can have."
            )
        if matrix == "A.weight":
            rank = len(tensor)
            key = get_pattern_key(patterns.keys(), layer.removeprefix("transformer."))
            alpha = patterns.get(key, config.get("lora_alpha", rank))
            # ComfyUI divides by the rank
            alpha = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
            result[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return result
