# Copyright 2026 The tapo_trl authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The first blocks of the SD3 / SD3.5 transformer."""

from collections.abc import Sequence

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from .features import Features, FeatureTransformerMixin


class SD3FeatureTransformer2DModel(FeatureTransformerMixin, SD3Transformer2DModel):
    """
    The joint blocks of SD3 up to the last tapped one.

    Args:
        feature_layers (`Sequence[int]`): blocks to tap, counted from 1, in ascending order.
        transformer_config: arguments of [`~diffusers.SD3Transformer2DModel`], of the whole transformer.
    """

    base_class = SD3Transformer2DModel
    interface_fields = ("in_channels", "patch_size", "joint_attention_dim", "pooled_projection_dim")
    unused_layers = ("norm_out", "proj_out")

    def __init__(self, feature_layers: Sequence[int], **transformer_config):
        super().__init__(**transformer_config)
        self.feature_layers = list(feature_layers)
        self.feature_dim = self.inner_dim
        self.transformer_blocks = self.transformer_blocks[: self.feature_layers[-1]]
        for name in self.unused_layers:
            delattr(self, name)

    @property
    def block_list(self) -> nn.ModuleList:
        return self.transformer_blocks

    @property
    def backbone_dtype(self) -> torch.dtype:
        return self.pos_embed.proj.weight.dtype

    @classmethod
    def last_layer_with_text(cls, num_layers: int) -> int:
        return num_layers - 1

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
    ) -> Features:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, channels, height, width)`): noisy latents.
            timestep (`torch.Tensor` of shape `(batch_size,)`): 1000 sigma, float32.
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, joint_attention_dim)`):
                prompt embeddings.
            pooled_projections (`torch.Tensor` of shape `(batch_size, pooled_projection_dim)`):
                pooled prompt embeddings.

        Returns:
            [`Features`]
        """
        image = self.pos_embed(hidden_states).contiguous()
        temb = self.time_text_embed(timestep, pooled_projections)
        text = self.context_embedder(encoder_hidden_states)
        features = Features(visual=[], text=[], time=temb)
        for number, block in enumerate(self.transformer_blocks, start=1):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                text, image = self._gradient_checkpointing_func(block, image, text, temb)
            else:
                text, image = block(image, text, temb)
            if number in self.feature_layers:
                features.visual.append(image)
                features.text.append(text)
        return features
