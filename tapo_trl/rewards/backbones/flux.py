# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""FLUX.1 as backbone of reward models."""

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel

from .base import RewardBackboneMixin
from .features import HookedFeatureTransformerMixin
from .score_stream import TextScoreTransformerMixin


class DoubleSingleBackbone(RewardBackboneMixin):
    """What the backbones on FLUX.1 and FLUX.2 share, which have double and single blocks."""

    blocks_names = ("transformer_blocks", "single_transformer_blocks")
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "^x_embedder$"]

    @property
    def backbone_dtype(self) -> torch.dtype:
        return self.x_embedder.weight.dtype


class DoubleSingleFeatureMixin(DoubleSingleBackbone, HookedFeatureTransformerMixin):
    """Mixed into FLUX.1 or FLUX.2, see [`HookedFeatureTransformerMixin`]. Single blocks are numbered on from the double ones."""

    unused_layers = ("norm_out", "proj_out")
    text_output_layers = ("attn.to_add_out", "ff_context")

    @classmethod
    def num_blocks(cls, transformer_config):
        return transformer_config["num_layers"] + transformer_config["num_single_layers"]


class DoubleSingleScoreMixin(DoubleSingleBackbone, TextScoreTransformerMixin):
    """
    Mixed into FLUX.1 or FLUX.2. Score tokens come before the prompt's, at position 0, which is not rotated.

    Attributes:
        single_projections (`tuple[str, ...]`): projections to queries, keys and values in the attention of a single block.
    """

    single_projections: tuple[str, ...]

    def score_projection_names(self) -> list[str]:
        double = [f"transformer_blocks.{i}.attn.add_{p}_proj" for i in range(self.config.num_layers) for p in "qkv"]
        count = self.config.num_single_layers
        return double + [
            f"single_transformer_blocks.{i}.attn.{name}" for i in range(count) for name in self.single_projections
        ]

    @property
    def score_width(self) -> int:
        return self.config.joint_attention_dim

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        txt_ids: torch.Tensor,
        mask_task_tokens: bool = False,
        **inputs: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            mask_task_tokens (`bool`, *optional*, defaults to `False`):
                hide the score tokens from all tokens, so that the velocity is the base transformer's.

        The others are those of the transformer in diffusers.

        Returns:
            `tuple`: velocity, shaped as `hidden_states`, and logits of shape `(batch_size,)`, float32.
        """
        score, kwargs = self.score_rows(encoder_hidden_states), {}
        count = score.shape[1]
        if mask_task_tokens:
            tokens = torch.arange(count + len(txt_ids) + hidden_states.shape[1], device=score.device)
            kwargs["attention_mask"] = (tokens >= count).view(1, 1, 1, -1)
        with self.score_states(self.single_transformer_blocks[-1]) as states:
            (velocity,) = super().forward(
                hidden_states,
                encoder_hidden_states=torch.cat([score, encoder_hidden_states], dim=1),
                txt_ids=F.pad(txt_ids, (0, 0, count, 0)),
                joint_attention_kwargs=kwargs,
                return_dict=False,
                **inputs,
            )
        return velocity, self.score_head(states[0])


class FluxBackbone(RewardBackboneMixin):
    """What the backbones on FLUX.1 share."""

    base_class = FluxTransformer2DModel
    interface_fields = ("in_channels", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds")


class FluxScoreTransformer2DModel(FluxBackbone, DoubleSingleScoreMixin, FluxTransformer2DModel):
    """
    FLUX.1's transformer with learnable score tokens before the prompt's. It returns the velocity, which the score tokens
    influence, and one logit per sample.
    """

    single_projections = ("to_q", "to_k", "to_v")


class FluxFeatureTransformer2DModel(FluxBackbone, DoubleSingleFeatureMixin, FluxTransformer2DModel):
    """The blocks of FLUX.1 up to the last tapped one."""

    time_layer = "time_text_embed"
