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
"""The first blocks of the Wan transformer."""

from collections.abc import Sequence

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from .features import Features, FeatureTransformerMixin


class WanFeatureTransformer3DModel(FeatureTransformerMixin, WanTransformer3DModel):
    """
    The blocks of Wan up to the last tapped one. They look at the prompt and do not change it: its features are the same at
    all of them.

    Args:
        feature_layers (`Sequence[int]`): blocks to tap, counted from 1, in ascending order.
        transformer_config: arguments of [`~diffusers.WanTransformer3DModel`], of the whole transformer.
    """

    base_class = WanTransformer3DModel
    interface_fields = ("in_channels", "patch_size", "text_dim")
    unused_layers = ("norm_out", "proj_out", "scale_shift_table")

    def __init__(self, feature_layers: Sequence[int], **transformer_config):
        super().__init__(**transformer_config)
        self.feature_layers = list(feature_layers)
        self.feature_dim = self.config.num_attention_heads * self.config.attention_head_dim
        self.blocks = self.blocks[: self.feature_layers[-1]]
        for name in self.unused_layers:
            delattr(self, name)

    @property
    def block_list(self) -> nn.ModuleList:
        return self.blocks

    @property
    def backbone_dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    @classmethod
    def last_layer_with_text(cls, num_layers: int) -> int:
        return num_layers

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> Features:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, channels, frames, height, width)`): noisy latents.
            timestep (`torch.Tensor` of shape `(batch_size,)`): 1000 sigma, float32.
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, text_dim)`):
                prompt embeddings.

        Returns:
            [`Features`]
        """
        rotary_emb = self.rope(hidden_states)
        video = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        temb, block_temb, text, _ = self.condition_embedder(timestep, encoder_hidden_states)
        block_temb = block_temb.unflatten(1, (6, -1))
        features = Features(visual=[], text=[], time=temb)
        for number, block in enumerate(self.blocks, start=1):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                video = self._gradient_checkpointing_func(block, video, text, block_temb, rotary_emb)
            else:
                video = block(video, text, block_temb, rotary_emb)
            if number in self.feature_layers:
                features.visual.append(video)
                features.text.append(text)
        return features
