# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""HunyuanVideo and HunyuanVideo-1.5 as backbones of SLRM."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import HunyuanVideo15Transformer3DModel, HunyuanVideoTransformer3DModel

from .score_stream import TextScoreTransformerMixin


class HunyuanScoreMixin(TextScoreTransformerMixin):
    """
    What the backbones on HunyuanVideo share. The score tokens are learned in the width of the blocks and enter before the prompt's
    tokens behind the refiner, in which they would change the prompt. As the prompt's, they are not rotated.
    """

    @property
    def backbone_dtype(self) -> torch.dtype:
        return self.x_embedder.proj.weight.dtype

    @property
    def score_width(self) -> int:
        return self.dim

    def score_projection_names(self) -> list[str]:
        return [f"transformer_blocks.{i}.attn.add_{p}_proj" for i in range(self.config.num_layers) for p in "qkv"]

    def with_score_tokens(
        self, text: torch.Tensor, mask: torch.Tensor, mask_task_tokens: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score tokens before those of the text, and the mask of both."""
        score = self.score_rows(text)
        return torch.cat([score, text], dim=1), F.pad(mask.bool(), (score.shape[1], 0), value=not mask_task_tokens)

    def outputs(
        self, video: torch.Tensor, text: torch.Tensor, temb: torch.Tensor, size: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The velocity of latents of a size, and the logits, from the tokens after the last block."""
        patch = (self.config.patch_size_t, self.config.patch_size, self.config.patch_size)
        patches = self.proj_out(self.norm_out(video, temb))
        grid = [length // side for length, side in zip(size, patch, strict=True)]
        patches = patches.unflatten(1, grid).unflatten(-1, (-1, *patch))
        velocity = torch.einsum("nfhwctpq->ncfthpwq", patches).reshape(len(video), -1, *size)
        return velocity, self.score_head(text[:, : self.task_tokens.shape[1]])


class HunyuanVideoScoreTransformer3DModel(HunyuanScoreMixin, HunyuanVideoTransformer3DModel):
    """
    HunyuanVideo's transformer with learnable score tokens before the prompt's. It returns the velocity, which the score tokens
    influence, and one logit per sample. In single blocks the score tokens come behind the video's.
    """

    base_class = HunyuanVideoTransformer3DModel
    interface_fields = ("in_channels", "text_embed_dim", "pooled_projection_dim", "guidance_embeds")

    def score_projection_names(self) -> list[str]:
        single = [f"single_transformer_blocks.{i}.attn.to_" for i in range(self.config.num_single_layers)]
        return super().score_projection_names() + [name + p for name in single for p in "qkv"]

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        pooled_projections: torch.Tensor,
        guidance: torch.Tensor | None = None,
        mask_task_tokens: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            mask_task_tokens (`bool`, *optional*, defaults to `False`):
                hide the score tokens from all tokens, so that the velocity is the base transformer's.

        The others are those of [`~diffusers.HunyuanVideoTransformer3DModel`].

        Returns:
            `tuple`: velocity, shaped as `hidden_states`, and logits of shape `(batch_size,)`, float32.
        """
        rotary_emb, size = self.rope(hidden_states), hidden_states.shape[2:]
        temb, _ = self.time_text_embed(timestep, pooled_projections, guidance)
        video = self.x_embedder(hidden_states)
        text = self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask)
        text, mask = self.with_score_tokens(text, encoder_attention_mask, mask_task_tokens)
        mask = F.pad(mask, (video.shape[1], 0), value=True)[:, None, None]
        for block in self.single_transformer_blocks:
            for projection in (block.attn.to_q, block.attn.to_k, block.attn.to_v):
                getattr(projection, "base_layer", projection).start = video.shape[1]
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            video, text = self.run_block(block, video, text, temb, mask, rotary_emb)
        return self.outputs(video, text, temb, size)


class HunyuanVideo15ScoreTransformer3DModel(HunyuanScoreMixin, HunyuanVideo15Transformer3DModel):
    """
    HunyuanVideo-1.5's transformer with learnable score tokens before the prompt's. It returns the velocity, which the score tokens
    influence, and one logit per sample. The tokens of an image, which text to video masks, are left out.
    """

    base_class = HunyuanVideo15Transformer3DModel
    interface_fields = ("in_channels", "text_embed_dim", "text_embed_2_dim")

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        encoder_hidden_states_2: torch.Tensor,
        encoder_attention_mask_2: torch.Tensor,
        image_embeds: torch.Tensor | None = None,
        mask_task_tokens: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            mask_task_tokens (`bool`, *optional*, defaults to `False`):
                hide the score tokens from all tokens, so that the velocity is the base transformer's.

        The others are those of [`~diffusers.HunyuanVideo15Transformer3DModel`]; `image_embeds` is not read.

        Returns:
            `tuple`: velocity, of the latents' shape, and logits of shape `(batch_size,)`, float32.
        """
        rotary_emb, size = self.rope(hidden_states), hidden_states.shape[2:]
        temb, kinds = self.time_embed(timestep), self.cond_type_embed.weight
        video = self.x_embedder(hidden_states)
        text = self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask) + kinds[0]
        glyphs = self.context_embedder_2(encoder_hidden_states_2) + kinds[1]
        mask = torch.cat([encoder_attention_mask_2, encoder_attention_mask], dim=1)
        text, mask = self.with_score_tokens(torch.cat([glyphs, text], dim=1), mask, mask_task_tokens)
        for block in self.transformer_blocks:
            video, text = self.run_block(block, video, text, temb, mask, rotary_emb)
        return self.outputs(video, text, temb, size)
