# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Files of LoRA weights, as diffusers loads them."""

from pathlib import Path

import torch
from diffusers.training_utils import _collate_lora_metadata
from peft import PeftModel
from peft.utils import get_peft_model_state_dict


class LoraFilesMixin:
    """How a [`FlowPolicy`] saves LoRA weights, and what loads them again."""

    def save_lora_weights(
        self, save_directory: str | Path, model: PeftModel, state_dict: dict[str, torch.Tensor] | None = None
    ) -> None:
        """
        Write `pytorch_lora_weights.safetensors` for the pipeline's `load_lora_weights`, with the adapter's metadata,
        without which `lora_alpha` is lost.

        Args:
            save_directory (`str` or `Path`): where to.
            model ([`~peft.PeftModel`]): the network.
            state_dict (`dict[str, torch.Tensor]`, *optional*): its weights, where each process has a part of them only.
        """
        metadata = _collate_lora_metadata({"transformer": model})
        self.pipeline.save_lora_weights(save_directory, lora_layers(model, state_dict), **metadata)

    def load_lora_weights(self, name_or_path: str) -> None:
        """Put the LoRA weights of a folder or of a repository on the Hub, see [`~FlowPolicy.save_lora_weights`], on the transformer."""
        self.pipeline.load_lora_weights(name_or_path, use_safetensors=True)

    @property
    def lora_calls(self) -> list[str]:
        """The same as Python code, for model cards: calls for `pipeline`, with `{model}` in the place of the folder."""
        return ['pipeline.load_lora_weights("{model}")']


def lora_layers(model: PeftModel, state_dict: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """LoRA matrices by their names in the bare network, of `model` or of its `state_dict`."""
    if state_dict is not None:
        state_dict = {name.removeprefix("base_model.model."): tensor for name, tensor in state_dict.items()}
    return get_peft_model_state_dict(model.get_base_model(), state_dict=state_dict, adapter_name="default")
