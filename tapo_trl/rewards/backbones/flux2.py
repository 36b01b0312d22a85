# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""FLUX.2 as backbone of SLRM."""

from diffusers import Flux2Transformer2DModel

from .flux import DoubleSingleScoreMixin


class Flux2ScoreTransformer2DModel(DoubleSingleScoreMixin, Flux2Transformer2DModel):
    """
    FLUX.2's transformer with learnable score tokens before the prompt's. It returns the velocity, which the score tokens
    influence, and one logit per sample. In single blocks one layer projects to queries, keys, values and the feed-forward: of
    that, the feed-forward's part is the prompt's.
    """

    base_class = Flux2Transformer2DModel
    interface_fields = ("in_channels", "joint_attention_dim", "guidance_embeds")
    single_projections = ("to_qkv_mlp_proj",)
