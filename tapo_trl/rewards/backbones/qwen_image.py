# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Qwen-Image as backbone of reward models."""

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

from .base import RewardBackboneMixin
from .features import HookedFeatureTransformerMixin
from .score_stream import TextScoreTransformerMixin


class QwenScoreRope(QwenEmbedRope):
    """Positions of image and prompt, with score tokens before the prompt's, which are not rotated and move no other token."""

    num_task_tokens: int = 0

    def forward(self, video_fhw, device=None, max_txt_seq_len=None) -> tuple[torch.Tensor, torch.Tensor]:
        image, text = super().forward(video_fhw, device, max_txt_seq_len - self.num_task_tokens)
        return image, torch.cat([torch.ones_like(text[:1]).expand(self.num_task_tokens, -1), text])


class QwenImageBackbone(RewardBackboneMixin):
    """What the backbones on Qwen-Image share."""

    base_class = QwenImageTransformer2DModel
    interface_fields = ("in_channels", "joint_attention_dim")
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "^img_in$"]

    @property
    def backbone_dtype(self) -> torch.dtype:
        return self.img_in.weight.dtype


class QwenImageFeatureTransformer2DModel(
    QwenImageBackbone, HookedFeatureTransformerMixin, QwenImageTransformer2DModel
):
    """The blocks of Qwen-Image up to the last tapped one."""

    unused_layers = ("norm_out", "proj_out")
    text_output_layers = ("attn.to_add_out", "txt_mlp")
    time_layer = "time_text_embed"


class QwenImageScoreTransformer2DModel(QwenImageBackbone, TextScoreTransformerMixin, QwenImageTransformer2DModel):
    """
    Qwen-Image's transformer with learnable score tokens before the prompt's. It returns the velocity, which the score tokens
    influence, and one logit per sample.
    """

    def __init__(self, num_task_tokens: int, task_projection_rank: int | None = None, **transformer_config):
        super().__init__(num_task_tokens, task_projection_rank, **transformer_config)
        positions = self.pos_embed
        self.pos_embed = QwenScoreRope(positions.theta, positions.axes_dim, positions.scale_rope)
        self.pos_embed.num_task_tokens = num_task_tokens

    @property
    def score_width(self) -> int:
        return self.config.joint_attention_dim

    def score_projection_names(self) -> list[str]:
        return [f"transformer_blocks.{i}.attn.add_{p}_proj" for i in range(self.config.num_layers) for p in "qkv"]

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        mask_task_tokens: bool = False,
        **inputs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            mask_task_tokens (`bool`, *optional*, defaults to `False`):
                hide the score tokens from all tokens, so that the velocity is the base transformer's.

        The others are those of [`~diffusers.QwenImageTransformer2DModel`].

        Returns:
            `tuple`: velocity, shaped as `hidden_states`, and logits of shape `(batch_size,)`, float32.
        """
        score, mask = self.score_rows(encoder_hidden_states), encoder_hidden_states_mask
        if mask is None and mask_task_tokens:
            mask = torch.ones(encoder_hidden_states.shape[:2], dtype=torch.bool, device=score.device)
        if mask is not None:
            mask = F.pad(mask, (score.shape[1], 0), value=not mask_task_tokens)
        with self.score_states(self.transformer_blocks[-1]) as states:
            (velocity,) = super().forward(
                hidden_states,
                encoder_hidden_states=torch.cat([score, encoder_hidden_states], dim=1),
                encoder_hidden_states_mask=mask,
                return_dict=False,
                **inputs,
            )
        return velocity, self.score_head(states[0])
