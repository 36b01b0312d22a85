# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Two transformers as one network: [`ExpertStack`]."""

import torch
from diffusers import ModelMixin
from torch import nn


EXPERTS = {"high": "transformer", "low": "transformer_2"}  # by noise level, as components of a pipeline


class ExpertStack(nn.Module):
    """
    Two transformers of one architecture, of which each sample goes through one, by its noise level. To trainers it is one network:
    with one LoRA, one reference, one optimizer. Its parameters are those of its children, `transformer` and `transformer_2`.

    Args:
        transformer ([`~diffusers.ModelMixin`]): expert for high noise levels.
        transformer_2 ([`~diffusers.ModelMixin`]): expert for low noise levels.
        boundary (`float`): smallest timestep of the expert for high noise levels, in the terms of the transformer.
    """

    def __init__(self, transformer: ModelMixin, transformer_2: ModelMixin, boundary: float):
        super().__init__()
        self.transformer, self.transformer_2, self.boundary = transformer, transformer_2, boundary
        for name in ("_no_split_modules", "_keep_in_fp32_modules", "_skip_layerwise_casting_patterns"):
            setattr(self, name, getattr(transformer, name))

    @property
    def config(self):
        return self.transformer.config

    @property
    def _internal_dict(self):
        return self.transformer._internal_dict

    @_internal_dict.setter
    def _internal_dict(self, config) -> None:
        self.transformer._internal_dict = config

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def enable_gradient_checkpointing(self) -> None:
        for expert in self.children():
            expert.enable_gradient_checkpointing()

    def set_attention_backend(self, backend: str) -> None:
        for expert in self.children():
            expert.set_attention_backend(backend)

    def is_high(self, timestep: torch.Tensor) -> torch.Tensor:
        """Which of the timesteps are those of `transformer`."""
        return timestep >= self.boundary

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, **inputs) -> tuple[torch.Tensor]:
        """
        Arguments are those of the transformers, one row of each tensor per sample. Samples of both experts may be mixed.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, *latent_shape)`): noisy latents.
            timestep (`torch.Tensor` of shape `(batch_size,)`): see [`~ExpertStack.is_high`].
            inputs: further arguments.
        """
        inputs = {"hidden_states": hidden_states, "timestep": timestep, **inputs}
        is_high = self.is_high(timestep)
        if timestep.is_meta or is_high.all():  # without values, only shapes matter
            return self.transformer(**inputs)
        if not is_high.any():
            return self.transformer_2(**inputs)
        rows = [is_high.nonzero().flatten(), (~is_high).nonzero().flatten()]
        outputs = [
            expert(
                **{name: value[own] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
            )
            for expert, own in zip(self.children(), rows, strict=True)
        ]
        return (torch.cat([output for (output,) in outputs])[torch.cat(rows).argsort()],)
