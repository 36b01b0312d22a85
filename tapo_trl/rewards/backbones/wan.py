# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Wan2.1 as backbone of reward models."""

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn

from .base import RewardBackboneMixin
from .features import SteppedFeatureTransformerMixin
from .score_stream import ScoreProjections, ScoreTransformerMixin


class WanBackbone(RewardBackboneMixin):
    """What the backbones on Wan share."""

    base_class = WanTransformer3DModel
    interface_fields = ("in_channels", "patch_size", "text_dim")
    blocks_names = ("blocks",)

    @property
    def backbone_dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def embed(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Tokens of the video and the text, embeddings of the noise level for the output and the blocks, and rotations."""
        rotary_emb = self.rope(hidden_states)
        video = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        temb, block_temb, text, _ = self.condition_embedder(timestep, encoder_hidden_states)
        return video, text, temb, block_temb.unflatten(1, (6, -1)), rotary_emb


class WanFeatureTransformer3DModel(WanBackbone, SteppedFeatureTransformerMixin, WanTransformer3DModel):
    """
    The blocks of Wan up to the last tapped one, see [`FeatureTransformerMixin`]. They look at the prompt and do not change it:
    its features are the same at all of them.
    """

    unused_layers = ("norm_out", "proj_out", "scale_shift_table")

    def step(self, block, visual, text, time, block_temb, rotary_emb):
        return self.run_block(block, visual, text, block_temb, rotary_emb), text


class WanScoreBlock(WanTransformerBlock):
    """
    A [`WanTransformerBlock`] whose self-attention has score tokens beside the video's. They have projections of their
    own and are not rotated, and share every other weight with the video: modulation, cross-attention and feed-forward.
    """

    def __init__(self, *, dim: int, task_projection_rank: int | None, **block_config):
        super().__init__(dim=dim, **block_config)
        self.score_projections = ScoreProjections(dim, task_projection_rank)

    @property
    def score_sources(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The video's projections, at which those of the score tokens start."""
        return self.attn1.to_q, self.attn1.to_k, self.attn1.to_v

    def forward(
        self,
        hidden_states: torch.Tensor,
        score_tokens: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor],
        mask_task_tokens: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shift_msa, scale_msa, *modulation = (self.scale_shift_table + temb.float()).chunk(6, dim=1)
        video = (self.norm1(hidden_states.float()) * (1 + scale_msa) + shift_msa).type_as(hidden_states)
        score = (self.norm1(score_tokens.float()) * (1 + scale_msa) + shift_msa).type_as(score_tokens)
        video, score = self._self_attention(video, score, rotary_emb, mask_task_tokens)
        hidden_states = self._after_self_attention(hidden_states, video, encoder_hidden_states, modulation)
        score_tokens = self._after_self_attention(score_tokens, score, encoder_hidden_states, modulation)
        return hidden_states, score_tokens

    def _self_attention(
        self,
        video: torch.Tensor,
        score: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor],
        mask_task_tokens: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over [video, score], Eq. 5."""
        attn = self.attn1

        def heads(query, key, value):
            return (tokens.unflatten(2, (attn.heads, -1)) for tokens in (attn.norm_q(query), attn.norm_k(key), value))

        def attention(query, key, value):
            output = dispatch_attention_fn(query, key, value, backend=attn.processor._attention_backend)
            return attn.to_out[1](attn.to_out[0](output.flatten(2, 3).type_as(query)))

        query, key, value = heads(attn.to_q(video), attn.to_k(video), attn.to_v(video))
        query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
        score_query, score_key, score_value = heads(*self.score_projections(score, self.score_sources))
        all_keys, all_values = torch.cat([key, score_key], dim=1), torch.cat([value, score_value], dim=1)
        score = attention(score_query, all_keys, all_values)
        if mask_task_tokens:
            return attention(query, key, value), score
        return attention(query, all_keys, all_values), score

    def _after_self_attention(
        self,
        tokens: torch.Tensor,
        attention: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        modulation: list[torch.Tensor],
    ) -> torch.Tensor:
        """The rest of the block, which no token shares with another."""
        gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        tokens = (tokens.float() + attention * gate_msa).type_as(tokens)
        tokens = tokens + self.attn2(self.norm2(tokens.float()).type_as(tokens), encoder_hidden_states, None, None)
        normed = (self.norm3(tokens.float()) * (1 + scale_mlp) + shift_mlp).type_as(tokens)
        return (tokens.float() + self.ffn(normed).float() * gate_mlp).type_as(tokens)


def _rotate(tokens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding as in `WanAttnProcessor`."""
    first, second = tokens.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    rotated = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return rotated.flatten(-2).type_as(tokens)


class WanScoreTransformer3DModel(WanBackbone, ScoreTransformerMixin, WanTransformer3DModel):
    """
    Wan's text-to-video transformer with learnable score tokens in every self-attention. It returns the velocity, which
    the score tokens influence, and one logit per sample.

    Args:
        num_task_tokens (`int`): number of score tokens n_s, learned in the width of the text embeddings.
        task_projection_rank (`int`, *optional*): see [`ScoreProjections`].
        transformer_config: arguments of [`~diffusers.WanTransformer3DModel`].
    """

    _no_split_modules = ["WanScoreBlock"]
    _repeated_blocks = ["WanScoreBlock"]

    def __init__(self, num_task_tokens: int, task_projection_rank: int | None = None, **transformer_config):
        super().__init__(**transformer_config)
        config = self.config
        self._add_score_stream(
            num_task_tokens,
            config.text_dim,
            lambda index: WanScoreBlock(
                dim=self.dim,
                ffn_dim=config.ffn_dim,
                num_heads=config.num_attention_heads,
                qk_norm=config.qk_norm,
                cross_attn_norm=config.cross_attn_norm,
                eps=config.eps,
                task_projection_rank=task_projection_rank,
            ),
        )

    def init_score_stream(self) -> None:
        """
        The score tokens are as large as texts are to the model: its text projection, trained on those, gets inputs of
        variance 1 in its hidden layer. Larger tokens would drown what the blocks add to them, smaller ones would all be its bias.
        """
        super().init_score_stream()
        to_hidden = self.condition_embedder.text_embedder.linear_1.weight.float()
        self.task_tokens.div_(to_hidden.square().sum(dim=1).mean().sqrt())

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        mask_task_tokens: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            mask_task_tokens (`bool`, *optional*, defaults to `False`):
                hide the score tokens from the video, so that the velocity is the base transformer's.

        The others are those of [`~diffusers.WanTransformer3DModel`].

        Returns:
            `tuple`: velocity, shaped as `hidden_states`, and logits of shape `(batch_size,)`, float32.
        """
        batch_size, _, *size = hidden_states.shape
        patch_size = self.config.patch_size
        video, text, temb, block_temb, rotary_emb = self.embed(hidden_states, timestep, encoder_hidden_states)
        score = self.condition_embedder.text_embedder(self.task_tokens).expand(batch_size, -1, -1)
        for block in self.blocks:
            video, score = self.run_block(block, video, score, text, block_temb, rotary_emb, mask_task_tokens)

        shift, scale = (self.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        patches = self.proj_out((self.norm_out(video.float()) * (1 + scale) + shift).type_as(video))
        grid = [length // patch for length, patch in zip(size, patch_size, strict=True)]
        patches = patches.unflatten(1, grid).unflatten(-1, (*patch_size, -1))
        velocity = torch.einsum("nfhwtpqc->ncfthpwq", patches).reshape(batch_size, -1, *size)
        return velocity, self.score_head(score)
