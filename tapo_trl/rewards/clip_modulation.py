# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""A CLIP image tower that is told the noise level: adaptive layer norm, which is CLIP itself at the start."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn
from transformers import CLIPModel

from ..moved import moved_names


NUM_FREQUENCIES = 256


class NoiseModulation(nn.Module):
    """
    Shifts, scales and gates of the layers of an image tower, from the noise level. All are zero at the start.

    Args:
        dim (`int`): width of the tower.
        num_layers (`int`): number of its layers.
    """

    def __init__(self, dim: int, num_layers: int):
        super().__init__()
        self.frequencies = Timesteps(NUM_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.embedding = TimestepEmbedding(NUM_FREQUENCIES, dim)
        self.layers = nn.ModuleList(nn.Linear(dim, 6 * dim) for _ in range(num_layers))
        self.output = nn.Linear(dim, 2 * dim)
        for linear in (self.embedding.linear_1, self.embedding.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        for linear in (*self.layers, self.output):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, sigma: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """
        Args:
            sigma (`torch.Tensor` of shape `(batch_size,)`): noise levels in [0, 1].

        Returns:
            `tuple`: for each layer `(6, batch_size, 1, dim)`, shift, scale and gate of the attention and of the MLP; and
            `(2, batch_size, dim)`, shift and scale of the output.
        """
        frequencies = self.frequencies(sigma.float() * 1000).to(self.embedding.linear_1.weight.dtype)
        condition = F.silu(self.embedding(frequencies))
        layers = [torch.stack(linear(condition).unsqueeze(1).chunk(6, dim=-1)) for linear in self.layers]
        return layers, torch.stack(self.output(condition).chunk(2, dim=-1))


def modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`(1 + scale) x + shift`, in the precision of x."""
    return hidden_states * (1 + scale).to(hidden_states.dtype) + shift.to(hidden_states.dtype)


def modulated_layer(layer: nn.Module, hidden_states: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
    """
    A layer of CLIP's image tower with adaptive layer norm.

    Args:
        layer ([`~transformers.models.clip.modeling_clip.CLIPEncoderLayer`]): the layer.
        hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, dim)`): tokens.
        modulation (`torch.Tensor` of shape `(6, batch_size, 1, dim)`): see [`NoiseModulation`].

    Returns:
        `torch.Tensor` of shape `(batch_size, num_tokens, dim)`.
    """
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
    attended, _ = layer.self_attn(modulate(layer.layer_norm1(hidden_states), shift, scale), attention_mask=None)
    hidden_states = hidden_states + modulate(attended, torch.zeros_like(gate), gate)
    transformed = layer.mlp(modulate(layer.layer_norm2(hidden_states), mlp_shift, mlp_scale))
    return hidden_states + modulate(transformed, torch.zeros_like(mlp_gate), mlp_gate)


def modulated_image_features(
    clip: CLIPModel,
    modulation: NoiseModulation,
    pixel_values: torch.Tensor,
    sigma: torch.Tensor,
    run_layer: Callable[..., Any] | None = None,
) -> torch.Tensor:
    """
    CLIP's projected image features, conditioned on the noise level.

    Args:
        clip ([`~transformers.CLIPModel`]): the CLIP.
        modulation ([`NoiseModulation`]): what conditions its image tower.
        pixel_values (`torch.Tensor` of shape `(batch_size, 3, image_size, image_size)`): normalised pixels.
        sigma (`torch.Tensor` of shape `(batch_size,)`): noise levels in [0, 1].
        run_layer (`Callable`, *optional*):
            calls `run_layer(modulated_layer, ...)`, such as checkpointing. A plain call by default.

    Returns:
        `torch.Tensor` of shape `(batch_size, projection_dim)`.
    """
    tower = clip.vision_model
    of_layers, (shift, scale) = modulation(sigma)
    hidden_states = tower.pre_layrnorm(tower.embeddings(pixel_values.to(clip.visual_projection.weight.dtype)))
    for layer, of_layer in zip(tower.encoder.layers, of_layers, strict=True):
        arguments = (layer, hidden_states, of_layer)
        hidden_states = modulated_layer(*arguments) if run_layer is None else run_layer(modulated_layer, *arguments)
    return clip.visual_projection(modulate(tower.post_layernorm(hidden_states[:, 0]), shift, scale))


__getattr__ = moved_names(__name__)
