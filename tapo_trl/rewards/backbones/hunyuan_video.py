# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""HunyuanVideo and HunyuanVideo-1.5 as backbones of reward models."""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from diffusers import HunyuanVideo15Transformer3DModel, HunyuanVideoTransformer3DModel

from .base import RewardBackboneMixin
from .features import Features, SteppedFeatureTransformerMixin
from .score_stream import TextScoreTransformerMixin


class HunyuanBackbone(RewardBackboneMixin):
    """What the backbones on both share."""

    @property
    def backbone_dtype(self) -> torch.dtype:
        return self.x_embedder.proj.weight.dtype

    @abstractmethod
    def tokens(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens of the video and of the text, which of the latter count, and the embedding of the noise level."""

    def block_mask(self, video: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        """What blocks read as their mask."""
        return text_mask


class HunyuanVideoBackbone(HunyuanBackbone):
    """What the backbones on HunyuanVideo share, which has double and single blocks."""

    base_class = HunyuanVideoTransformer3DModel
    interface_fields = ("in_channels", "text_embed_dim", "pooled_projection_dim", "guidance_embeds")
    blocks_names = ("transformer_blocks", "single_transformer_blocks")

    def tokens(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        pooled_projections: torch.Tensor,
        guidance: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        temb, _ = self.time_text_embed(timestep, pooled_projections, guidance)
        text = self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask)
        return self.x_embedder(hidden_states), text, encoder_attention_mask.bool(), temb

    def block_mask(self, video: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        return F.pad(text_mask, (video.shape[1], 0), value=True)[:, None, None]


class HunyuanVideo15Backbone(HunyuanBackbone):
    """What the backbones on HunyuanVideo-1.5 share. The tokens of an image, which text to video masks, are left out."""

    base_class = HunyuanVideo15Transformer3DModel
    interface_fields = ("in_channels", "text_embed_dim", "text_embed_2_dim")
    # The last one is no call of a layer, which would cast it back
    _skip_layerwise_casting_patterns = ["x_embedder", "context_embedder", "norm", "cond_type_embed"]

    def tokens(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        encoder_hidden_states_2: torch.Tensor,
        encoder_attention_mask_2: torch.Tensor,
        image_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        kinds = self.cond_type_embed(torch.arange(2, device=hidden_states.device))
        text = self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask) + kinds[0]
        text = torch.cat([self.context_embedder_2(encoder_hidden_states_2) + kinds[1], text], dim=1)
        mask = torch.cat([encoder_attention_mask_2, encoder_attention_mask], dim=1).bool()
        return self.x_embedder(hidden_states), text, mask, self.time_embed(timestep)


class HunyuanFeatureMixin(HunyuanBackbone, SteppedFeatureTransformerMixin):
    """Mixed into one of both, of which only the blocks up to the last tapped one are left."""

    unused_layers = ("norm_out", "proj_out")
    text_output_layers = ("attn.to_add_out", "ff_context")

    def embed(self, hidden_states: torch.Tensor, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        video, text, mask, temb = self.tokens(hidden_states=hidden_states, **inputs)
        return video, text, temb, self.block_mask(video, mask), self.rope(hidden_states)

    def step(self, block, visual, text, time, mask, rotary_emb):
        return self.run_block(block, visual, text, time, mask, rotary_emb)

    def forward(self, **inputs: torch.Tensor) -> Features:
        features = super().forward(**inputs)
        masks = [inputs[name] for name in ("encoder_attention_mask_2", "encoder_attention_mask") if name in inputs]
        features.text_mask = torch.cat(masks, dim=1).bool()
        return features


class HunyuanVideoFeatureTransformer3DModel(HunyuanVideoBackbone, HunyuanFeatureMixin, HunyuanVideoTransformer3DModel):
    """The blocks of HunyuanVideo up to the last tapped one. Single blocks are numbered on from the double ones."""

    @classmethod
    def num_blocks(cls, transformer_config):
        return transformer_config["num_layers"] + transformer_config["num_single_layers"]


class HunyuanVideo15FeatureTransformer3DModel(
    HunyuanVideo15Backbone, HunyuanFeatureMixin, HunyuanVideo15Transformer3DModel
):
    """The blocks of HunyuanVideo-1.5 up to the last tapped one."""


class HunyuanScoreMixin(HunyuanBackbone, TextScoreTransformerMixin):
    """
    Mixed into one of both. The score tokens are learned in the width of the blocks and enter before the prompt's tokens behind the
    refiner, in which they would change the prompt. As the prompt's, they are not rotated.
    """

    @property
    def score_width(self) -> int:
        return self.dim

    def score_projection_names(self) -> list[str]:
        return [f"transformer_blocks.{i}.attn.add_{p}_proj" for i in range(self.config.num_layers) for p in "qkv"]

    def forward(
        self, hidden_states: torch.Tensor, mask_task_tokens: bool = False, **inputs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            mask_task_tokens (`bool`, *optional*, defaults to `False`):
                hide the score tokens from all tokens, so that the velocity is the base transformer's.

        The others are those of the transformer in diffusers.

        Returns:
            `tuple`: velocity, shaped as the latents, and logits of shape `(batch_size,)`, float32.
        """
        video, text, mask, temb = self.tokens(hidden_states=hidden_states, **inputs)
        score, rotary_emb = self.score_rows(text), self.rope(hidden_states)
        count = score.shape[1]
        mask = self.block_mask(video, F.pad(mask, (count, 0), value=not mask_task_tokens))
        text = torch.cat([score, text], dim=1)
        for block in self.block_list:
            video, text = self.run_block(block, video, text, temb, mask, rotary_emb)

        size, patch = hidden_states.shape[2:], (self.config.patch_size_t, *[self.config.patch_size] * 2)
        patches = self.proj_out(self.norm_out(video, temb))
        grid = [length // side for length, side in zip(size, patch, strict=True)]
        patches = patches.unflatten(1, grid).unflatten(-1, (-1, *patch))
        velocity = torch.einsum("nfhwctpq->ncfthpwq", patches).reshape(len(video), -1, *size)
        return velocity, self.score_head(text[:, :count])


class HunyuanVideoScoreTransformer3DModel(HunyuanVideoBackbone, HunyuanScoreMixin, HunyuanVideoTransformer3DModel):
    """
    HunyuanVideo's transformer with learnable score tokens before the prompt's. It returns the velocity, which the score tokens
    influence, and one logit per sample. In single blocks the score tokens come behind the video's.
    """

    def score_projection_names(self) -> list[str]:
        single = [f"single_transformer_blocks.{i}.attn.to_" for i in range(self.config.num_single_layers)]
        return super().score_projection_names() + [name + p for name in single for p in "qkv"]

    def tokens(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        video, *others = super().tokens(**inputs)
        for block in self.single_transformer_blocks:
            for projection in (block.attn.to_q, block.attn.to_k, block.attn.to_v):
                getattr(projection, "base_layer", projection).start = video.shape[1]
        return video, *others


class HunyuanVideo15ScoreTransformer3DModel(
    HunyuanVideo15Backbone, HunyuanScoreMixin, HunyuanVideo15Transformer3DModel
):
    """
    HunyuanVideo-1.5's transformer with learnable score tokens before the prompt's. It returns the velocity, which the score tokens
    influence, and one logit per sample.
    """
