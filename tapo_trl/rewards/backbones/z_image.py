# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Z-Image as backbone of reward models."""

import math

import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import ADALN_EMBED_DIM, SEQ_MULTI_OF
from torch.nn.utils.rnn import pad_sequence

from .base import RewardBackboneMixin
from .features import HookedFeatureTransformerMixin
from .score_stream import TextScoreTransformerMixin


class ZImageBackbone(RewardBackboneMixin):
    """What the backbones on Z-Image share."""

    base_class = ZImageTransformer2DModel
    interface_fields = ("in_channels", "cap_feat_dim", "t_scale")
    blocks_names = ("layers",)
    dim = None  # which the base class sets

    @property
    def backbone_dtype(self) -> torch.dtype:
        return self.cap_embedder[1].weight.dtype


class ZImageFeatureTransformer2DModel(ZImageBackbone, HookedFeatureTransformerMixin, ZImageTransformer2DModel):
    """
    The blocks of Z-Image behind its refiners up to the last tapped one. Their sequence is that of the image and that of the
    prompt, both padded to a multiple of 32, one behind the other.
    """

    unused_layers = ("all_final_layer.2-1",)
    time_layer = "t_embedder"

    @property
    def time_dim(self) -> int:
        return min(self.dim, ADALN_EMBED_DIM)

    @classmethod
    def num_blocks(cls, transformer_config):
        return transformer_config["n_layers"]

    def split(self, output, inputs):
        count = math.prod(inputs["x"][0].shape[1:]) // 4  # patches of 2 x 2
        start = count + -count % SEQ_MULTI_OF
        text = [row[start : start + len(tokens)] for row, tokens in zip(output, inputs["cap_feats"], strict=True)]
        return output[:, :count], pad_sequence(text, batch_first=True)

    def text_mask(self, inputs):
        return pad_sequence([tokens.new_ones(len(tokens), dtype=torch.bool) for tokens in inputs["cap_feats"]], True)

    def unpatchify(self, tokens, *args, **kwargs):
        return tokens


class ZImageScoreTransformer2DModel(ZImageBackbone, TextScoreTransformerMixin, ZImageTransformer2DModel):
    """
    Z-Image's transformer with learnable score tokens before the image's. It returns the velocity, which the score tokens
    influence, and one logit per sample.

    The score tokens are learned in the width of the blocks and enter behind the refiners, in which they would change the prompt's.
    They are not rotated.
    """

    mask_task_tokens = False

    @property
    def score_width(self) -> int:
        return self.config.dim

    def score_projection_names(self) -> list[str]:
        return [f"layers.{i}.attention.to_{p}" for i in range(self.config.n_layers) for p in "qkv"]

    def _build_unified_sequence(self, *args, **kwargs) -> tuple[torch.Tensor | None, ...]:
        tokens, rotations, mask, noise_mask = super()._build_unified_sequence(*args, **kwargs)
        score = self.score_rows(tokens)
        count, hidden = score.shape[1], self.mask_task_tokens
        if mask is None and hidden:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if mask is not None:
            mask = F.pad(mask, (count, 0), value=not hidden)
        rotations = torch.cat([torch.ones_like(rotations[:, :1]).expand(-1, count, -1), rotations], dim=1)
        return torch.cat([score, tokens], dim=1), rotations, mask, noise_mask

    def unpatchify(self, tokens: list[torch.Tensor], *args, **kwargs) -> list[torch.Tensor]:
        count = self.task_tokens.shape[1]
        return super().unpatchify([row[count:] for row in tokens], *args, **kwargs)

    def forward(
        self, x: list[torch.Tensor], t: torch.Tensor, cap_feats: list[torch.Tensor], mask_task_tokens: bool = False
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """
        Args:
            mask_task_tokens (`bool`, *optional*, defaults to `False`):
                hide the score tokens from all tokens, so that the velocity is the base transformer's.

        The others are those of [`~diffusers.ZImageTransformer2DModel`].

        Returns:
            `tuple`: velocities with the sign turned, as `x`, and logits of shape `(batch_size,)`, float32.
        """
        self.mask_task_tokens = mask_task_tokens
        with self.score_states(self.layers[-1]) as states:
            (velocity,) = super().forward(x, t, cap_feats, return_dict=False)
        return velocity, self.score_head(states[0])
