# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Linear layers with weights in float8."""

import re

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from torch import nn


class Float8Linear(nn.Module):
    """
    A frozen linear layer with weights of one byte, and one scale per row. They are cast to the input's precision for each
    forward and each backward, and kept in between as bytes only.

    The bytes are an integer buffer, so that nothing that casts or broadcasts a network's weights changes them.

    Args:
        linear (`nn.Linear`): the layer, whose weights are rounded.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
        self.register_buffer("weight_bytes", (weight / scale).to(torch.float8_e4m3fn).view(torch.uint8))
        self.register_buffer("weight_scale", scale.to(linear.weight.dtype))
        self.bias = linear.bias

    @property
    def weight(self) -> torch.Tensor:
        """The rounded weights, in the precision that the layer had."""
        return _dequantize(self.weight_bytes, self.weight_scale, self.weight_scale.dtype)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        device_type = hidden_states.device.type
        if torch.is_autocast_enabled(device_type):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device_type))
        return _Float8Product.apply(hidden_states, self.weight_bytes, self.weight_scale, self.bias)


class _Float8Product(torch.autograd.Function):
    """Keeps the bytes for the backward pass instead of the weights that they were cast to."""

    @staticmethod
    def forward(ctx, hidden_states, weight_bytes, scale, bias):
        ctx.save_for_backward(weight_bytes, scale)
        dtype = hidden_states.dtype
        weight = _dequantize(weight_bytes, scale, dtype)
        return F.linear(hidden_states, weight, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx, gradient):
        weight_bytes, scale = ctx.saved_tensors
        return gradient @ _dequantize(weight_bytes, scale, gradient.dtype), None, None, None


def _dequantize(weight_bytes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight_bytes.view(torch.float8_e4m3fn).to(dtype) * scale.to(dtype)


def store_base_in_float8(transformer: ModelMixin) -> int:
    """
    Replace the frozen linear layers of a transformer, under LoRA or not, by [`Float8Linear`]s. Embeddings, norms and the
    last projection stay as they are.

    Returns:
        `int`: number of layers.
    """
    patterns = (*DEFAULT_SKIP_MODULES_PATTERN, *transformer._skip_layerwise_casting_patterns)
    layers = [
        name
        for name, module in transformer.named_modules()
        if type(module) is nn.Linear
        and not module.weight.requires_grad
        and "lora_" not in name
        and not any(re.search(pattern, name) for pattern in patterns)
    ]
    for name in layers:
        transformer.set_submodule(name, Float8Linear(transformer.get_submodule(name)))
    return len(layers)
