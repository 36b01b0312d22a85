# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Qwen-Image-2.1 as backbone of reward models."""

import torch
from diffusers import QwenImage21Transformer2DModel

from ...policies.qwen_image21 import keep_rows_apart, stream
from .base import RewardBackboneMixin
from .features import Features, SteppedFeatureTransformerMixin
from .score_stream import TextScoreTransformerMixin


class QwenImage21Backbone(RewardBackboneMixin):
    """What the backbones on Qwen-Image-2.1 share."""

    base_class = QwenImage21Transformer2DModel
    interface_fields = ("in_channels", "context_in_dim")
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "^img_in$"]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        keep_rows_apart(self)

    @property
    def backbone_dtype(self) -> torch.dtype:
        return self.img_in.weight.dtype

    def _fill_attributes(self, transformer):
        self.pos_embed.freqs = [table.clone() for table in transformer.pos_embed.freqs]


class QwenImage21FeatureTransformer2DModel(
    QwenImage21Backbone, SteppedFeatureTransformerMixin, QwenImage21Transformer2DModel
):
    """The blocks of Qwen-Image-2.1 up to the last tapped one."""

    unused_layers = ("norm_out", "proj_out")

    def embed(self, hidden_states: torch.Tensor, img_mask: torch.Tensor | None = None, **inputs) -> tuple:
        tokens, temb, _, arguments = stream(self, hidden_states, **inputs)
        count = hidden_states.shape[1]
        return tokens[:, -count:], tokens[:, :-count], temb[: len(tokens)], *arguments

    def step(self, block, visual, text, time, *arguments):
        tokens = self.run_block(block, torch.cat([text, visual], dim=1), *arguments)
        return tokens[:, text.shape[1] :], tokens[:, : text.shape[1]]

    def forward(self, **inputs) -> Features:
        features = super().forward(**inputs)
        features.text_mask = inputs.get("encoder_hidden_states_mask")
        return features


class QwenImage21ScoreTransformer2DModel(
    QwenImage21Backbone, TextScoreTransformerMixin, QwenImage21Transformer2DModel
):
    """
    Qwen-Image-2.1's transformer with learnable score tokens behind the image's, since the prompt's do not look ahead. It returns the
    velocity, which the score tokens influence, and one logit per sample. The score tokens are learned in the width of the blocks.
    """

    def __init__(self, num_task_tokens: int, task_projection_rank: int | None = None, **transformer_config):
        super().__init__(num_task_tokens, task_projection_rank, **transformer_config)
        for name in self.score_projection_names():
            self.get_submodule(name).start = -num_task_tokens

    @property
    def score_width(self) -> int:
        return self.dim

    def score_projection_names(self) -> list[str]:
        return [f"transformer_blocks.{i}.attn.to_{p}" for i in range(self.config.num_layers) for p in "qkv"]

    def forward(
        self,
        hidden_states: torch.Tensor,
        img_mask: torch.Tensor | None = None,
        mask_task_tokens: bool = False,
        **inputs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            mask_task_tokens (`bool`, *optional*, defaults to `False`):
                hide the score tokens from all tokens, so that the velocity is the base transformer's.

        The others are those of [`~diffusers.QwenImage21Transformer2DModel`].

        Returns:
            `tuple`: velocity, shaped as `hidden_states`, and logits of shape `(batch_size,)`, float32.
        """
        score, count = self.task_tokens.expand(len(hidden_states), -1, -1), hidden_states.shape[1]
        tokens, temb, target, arguments = stream(
            self, hidden_states, score_tokens=score, mask_task_tokens=mask_task_tokens, **inputs
        )
        for block in self.transformer_blocks:
            tokens = self.run_block(block, tokens, *arguments)
        start = tokens.shape[1] - score.shape[1] - count
        image, score = tokens[:, start:].split([count, score.shape[1]], dim=1)
        target = target if target is None else target[start : start + count]
        return self.proj_out(self.norm_out(image, temb, target)), self.score_head(score)
