# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""FLUX.2 as backbone of reward models."""

from diffusers import Flux2Transformer2DModel

from .base import RewardBackboneMixin
from .flux import DoubleSingleFeatureMixin, DoubleSingleScoreMixin


class Flux2Backbone(RewardBackboneMixin):
    """What the backbones on FLUX.2 share."""

    base_class = Flux2Transformer2DModel
    interface_fields = ("in_channels", "joint_attention_dim", "guidance_embeds")


class Flux2ScoreTransformer2DModel(Flux2Backbone, DoubleSingleScoreMixin, Flux2Transformer2DModel):
    """
    FLUX.2's transformer with learnable score tokens before the prompt's. It returns the velocity, which the score tokens
    influence, and one logit per sample. In single blocks one layer projects to queries, keys, values and the feed-forward: of
    that, the feed-forward's part is the prompt's.
    """

    single_projections = ("to_qkv_mlp_proj",)


class Flux2FeatureTransformer2DModel(Flux2Backbone, DoubleSingleFeatureMixin, Flux2Transformer2DModel):
    """The blocks of FLUX.2 up to the last tapped one."""

    time_layer = "time_guidance_embed"
