# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Backbone interface of latent reward models."""

import inspect
from abc import ABC, abstractmethod
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from ...networks.sharing import all_tensors, set_tensor


class RewardBackboneMixin(ABC):
    """
    Mixed into a diffusers transformer that is part of a reward model.

    Attributes:
        base_class (`type`): the transformer as diffusers has it.
        interface_fields (`tuple[str, ...]`): fields of its configuration that latents and prompts depend on.
        blocks_names (`tuple[str, ...]`): names of its lists of blocks, in the order in which they run.
    """

    base_class: type[ModelMixin]
    interface_fields: tuple[str, ...]
    blocks_names: tuple[str, ...] = ("transformer_blocks",)

    @property
    def block_list(self) -> list[nn.Module]:
        return [block for name in self.blocks_names for block in getattr(self, name)]

    @property
    def dim(self) -> int:
        """Width of the transformer."""
        return self.config.num_attention_heads * self.config.attention_head_dim

    def run_block(self, block: nn.Module, *args: Any) -> Any:
        """Call a block, or checkpoint it."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    @property
    @abstractmethod
    def backbone_dtype(self) -> torch.dtype:
        """
        Precision of the backbone, which LoRA keeps while what is trained is float32: that of a layer which
        `_skip_layerwise_casting_patterns` keeps from being stored in float8.
        """

    @classmethod
    def base_config(cls, transformer: ModelMixin) -> dict:
        """The arguments that rebuild `transformer`."""
        names = inspect.signature(cls.base_class.__init__).parameters
        return {name: transformer.config[name] for name in names if name in transformer.config}

    def cast_weights(self, dtype: torch.dtype) -> None:
        """Cast all but what the base class keeps in float32, as its `from_pretrained` does."""
        kept = self._keep_in_fp32_modules or []
        for name, tensor in all_tensors(self):
            if not any(module in name.split(".") for module in kept):
                tensor.data = tensor.data.to(dtype)

    def _fill(self, transformer: ModelMixin, added: set[str], unused: set[str], share: bool = False) -> None:
        """
        Give this transformer, which has no weights yet, those of another one, each in its precision.

        Args:
            transformer ([`~diffusers.ModelMixin`]): the other one.
            added (`set[str]`): names of tensors that it does not have, which are left uninitialised.
            unused (`set[str]`): names of those that this one does not have.
            share (`bool`, *optional*, defaults to `False`): take its tensors themselves, not copies.
        """
        nn.Module.to(self, transformer.dtype)
        self._fill_attributes(transformer)
        source = dict(all_tensors(transformer))
        own = dict(all_tensors(self))
        unexpected = source.keys() - own.keys() - unused
        if unexpected or own.keys() - source.keys() != added:
            raise ValueError(
                "The transformer's weights do not fit its configuration; merge or detach its adapters first. "
                f"Unexpected: {sorted(unexpected)[:3]}."
            )
        if share:
            for name in added:
                set_tensor(self, name, nn.Parameter(torch.empty_like(own[name], device=transformer.device)))
            for name in source.keys() - unused:
                set_tensor(self, name, source[name])
            return
        self.to_empty(device=transformer.device)
        own = dict(all_tensors(self))  # buffers are new ones
        for name in source.keys() - unused:
            own[name].data = source[name].detach().clone()

    def _fill_attributes(self, transformer: ModelMixin) -> None:
        """Copy tensors that are neither parameters nor buffers, such as tables of rotary embeddings."""
        for name, module in self.named_modules():
            for attribute, value in vars(module).items():
                if isinstance(value, torch.Tensor) and value.is_meta:
                    setattr(module, attribute, getattr(transformer.get_submodule(name), attribute).clone())
