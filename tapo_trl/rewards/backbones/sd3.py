# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""SD3 and SD3.5 as backbones of reward models."""

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import FeedForward, JointTransformerBlock
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

from .base import RewardBackboneMixin
from .features import SteppedFeatureTransformerMixin
from .score_stream import ScoreProjections, ScoreTransformerMixin
from .similarity import SimilarityTransformerMixin


class SD3Backbone(RewardBackboneMixin):
    """What the backbones on SD3 share."""

    base_class = SD3Transformer2DModel
    interface_fields = ("in_channels", "patch_size", "joint_attention_dim", "pooled_projection_dim")

    @property
    def backbone_dtype(self) -> torch.dtype:
        return self.pos_embed.proj.weight.dtype

    def embed(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens of the image and the text, and the embedding of the noise level and the pooled text."""
        image = self.pos_embed(hidden_states).contiguous()
        temb = self.time_text_embed(timestep, pooled_projections)
        return image, self.context_embedder(encoder_hidden_states), temb


class SD3FeatureTransformer2DModel(SD3Backbone, SteppedFeatureTransformerMixin, SD3Transformer2DModel):
    """The joint blocks of SD3 up to the last tapped one, see [`FeatureTransformerMixin`]."""

    unused_layers = ("norm_out", "proj_out")
    text_output_layers = ("attn.to_add_out", "ff_context")

    @classmethod
    def last_layer_with_text(cls, num_layers: int) -> int:
        return num_layers - 1

    def step(self, block, visual, text, time):
        text, visual = self.run_block(block, visual, text, time)
        return visual, text


class ScoreOutputPath(nn.Module):
    """
    What the score tokens need after the attention of the last block, where SD3's text stream has nothing: adaLN
    modulation, output projection and feed-forward. Starts as a copy of the previous block's text stream.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.modulation = nn.Linear(dim, 4 * dim)
        self.to_out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim=dim, dim_out=dim, activation_fn="gelu-approximate")

    def init_from_text_stream(self, block: JointTransformerBlock) -> None:
        # `AdaLayerNormZero` predicts (shift, scale, gate) of attention, then (shift, scale, gate) of the feed-forward.
        attention_shift_and_scale = 2 * self.to_out.in_features
        self.modulation.weight.copy_(block.norm1_context.linear.weight[attention_shift_and_scale:])
        self.modulation.bias.copy_(block.norm1_context.linear.bias[attention_shift_and_scale:])
        self.to_out.load_state_dict(block.attn.to_add_out.state_dict())
        self.ff.load_state_dict(block.ff_context.state_dict())


class JointScoreBlock(JointTransformerBlock):
    """
    A [`JointTransformerBlock`] whose joint attention has a third stream. The score tokens have projections of their
    own and share every other weight with the text stream.
    """

    def __init__(self, *, dim: int, context_pre_only: bool, task_projection_rank: int | None, **block_config):
        super().__init__(dim=dim, context_pre_only=context_pre_only, **block_config)
        self.score_projections = ScoreProjections(dim, task_projection_rank)
        self.score_output = ScoreOutputPath(dim) if context_pre_only else None
        self.attn.processor._attention_backend = None  # which `set_attention_backend` sets

    @property
    def score_sources(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The text stream's projections, at which those of the score tokens start."""
        return self.attn.add_q_proj, self.attn.add_k_proj, self.attn.add_v_proj

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        score_tokens: torch.Tensor,
        temb: torch.Tensor,
        mask_task_tokens: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        if self.use_dual_attention:
            image, gate_msa, shift_mlp, scale_mlp, gate_mlp, image2, gate_msa2 = self.norm1(hidden_states, emb=temb)
        else:
            image, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, emb=temb)
        if self.context_pre_only:
            text = self.norm1_context(encoder_hidden_states, temb)
            score = self.norm1_context(score_tokens, temb)
        else:
            text, *text_modulation = self.norm1_context(encoder_hidden_states, emb=temb)
            score, *score_modulation = self.norm1_context(score_tokens, emb=temb)

        image, text, score = self._joint_attention(image, text, score, mask_task_tokens)

        hidden_states = hidden_states + gate_msa.unsqueeze(1) * self.attn.to_out[1](self.attn.to_out[0](image))
        if self.use_dual_attention:
            hidden_states = hidden_states + gate_msa2.unsqueeze(1) * self.attn2(hidden_states=image2)
        image = self.norm2(hidden_states) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        hidden_states = hidden_states + gate_mlp.unsqueeze(1) * self.ff(image)

        if self.context_pre_only:
            path = self.score_output
            modulation = path.modulation(F.silu(temb)).chunk(4, dim=1)
            score_tokens = _residual_update(score_tokens, score, modulation, path.to_out, path.norm, path.ff)
            return hidden_states, None, score_tokens

        text_path = (self.attn.to_add_out, self.norm2_context, self.ff_context)
        encoder_hidden_states = _residual_update(encoder_hidden_states, text, text_modulation, *text_path)
        score_tokens = _residual_update(score_tokens, score, score_modulation, *text_path)
        return hidden_states, encoder_hidden_states, score_tokens

    def _joint_attention(
        self, image: torch.Tensor, text: torch.Tensor, score: torch.Tensor, mask_task_tokens: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Attention over [image, text, score], Eq. 5, before the output projections."""
        attn = self.attn

        # Heads before tokens in memory, as SD3's own processor has them: attention kernels may round by layout.
        def heads(tokens: torch.Tensor) -> torch.Tensor:
            return tokens.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        def qk_norm(query, key, norm_query, norm_key):
            return (query, key) if norm_query is None else (norm_query(query), norm_key(key))

        def attention(query, key, value):
            tokens_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
            output = dispatch_attention_fn(*tokens_first, backend=attn.processor._attention_backend)
            return output.flatten(2).to(query.dtype)

        query, key, value = heads(attn.to_q(image)), heads(attn.to_k(image)), heads(attn.to_v(image))
        query, key = qk_norm(query, key, attn.norm_q, attn.norm_k)
        text_query, text_key = heads(attn.add_q_proj(text)), heads(attn.add_k_proj(text))
        text_query, text_key = qk_norm(text_query, text_key, attn.norm_added_q, attn.norm_added_k)
        score_query, score_key, score_value = map(heads, self.score_projections(score, self.score_sources))
        score_query, score_key = qk_norm(score_query, score_key, attn.norm_added_q, attn.norm_added_k)

        query = torch.cat([query, text_query], dim=2)
        key = torch.cat([key, text_key], dim=2)
        value = torch.cat([value, heads(attn.add_v_proj(text))], dim=2)
        all_keys, all_values = torch.cat([key, score_key], dim=2), torch.cat([value, score_value], dim=2)
        if mask_task_tokens:
            output = torch.cat([attention(query, key, value), attention(score_query, all_keys, all_values)], dim=1)
        else:
            output = attention(torch.cat([query, score_query], dim=2), all_keys, all_values)
        return output.split([image.shape[1], text.shape[1], score.shape[1]], dim=1)


def _residual_update(tokens, attention, modulation, to_out, norm, ff):
    """The rest of an adaLN block after its attention."""
    gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
    tokens = tokens + gate_msa.unsqueeze(1) * to_out(attention)
    normed = norm(tokens) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
    return tokens + gate_mlp.unsqueeze(1) * ff(normed)


class SD3SimilarityTransformer2DModel(SD3Backbone, SimilarityTransformerMixin, SD3Transformer2DModel):
    """SD3's transformer with a logit but without score tokens, see [`SimilarityTransformerMixin`]."""

    _supports_gradient_checkpointing = True


class SD3ScoreTransformer2DModel(SD3Backbone, ScoreTransformerMixin, SD3Transformer2DModel):
    """
    SD3's transformer with learnable score tokens as a third stream in every joint attention. It returns the velocity,
    which the score tokens influence, and one logit per sample.

    Args:
        num_task_tokens (`int`): number of score tokens n_s, learned in the width of the text embeddings.
        task_projection_rank (`int`, *optional*): see [`ScoreProjections`].
        transformer_config: arguments of [`~diffusers.SD3Transformer2DModel`].
    """

    _no_split_modules = ["JointScoreBlock"]
    _supports_gradient_checkpointing = True
    without_tokens = SD3SimilarityTransformer2DModel

    def __init__(self, num_task_tokens: int, task_projection_rank: int | None = None, **transformer_config):
        super().__init__(**transformer_config)
        config = self.config
        if config.num_layers < 2:
            raise ValueError("SLRM needs a transformer of at least 2 blocks: the last one has no text output path.")
        self._add_score_stream(
            num_task_tokens,
            config.joint_attention_dim,
            lambda index: JointScoreBlock(
                dim=self.dim,
                num_attention_heads=config.num_attention_heads,
                attention_head_dim=config.attention_head_dim,
                context_pre_only=index == config.num_layers - 1,
                qk_norm=config.qk_norm,
                use_dual_attention=index in config.dual_attention_layers,
                task_projection_rank=task_projection_rank,
            ),
        )

    def init_score_stream(self) -> None:
        super().init_score_stream()
        self.transformer_blocks[-1].score_output.init_from_text_stream(self.transformer_blocks[-2])

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        mask_task_tokens: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            mask_task_tokens (`bool`, *optional*, defaults to `False`):
                hide the score tokens from the image and the text, so that the velocity is the base transformer's.

        The others are those of [`~diffusers.SD3Transformer2DModel`].

        Returns:
            `tuple`: velocity, shaped as `hidden_states`, and logits of shape `(batch_size,)`, float32.
        """
        batch_size, _, height, width = hidden_states.shape
        image, text, temb = self.embed(hidden_states, timestep, encoder_hidden_states, pooled_projections)
        score = self.context_embedder(self.task_tokens).expand(batch_size, -1, -1)
        for block in self.transformer_blocks:
            image, text, score = self.run_block(block, image, text, score, temb, mask_task_tokens)

        patches = self.proj_out(self.norm_out(image, temb))
        patch_size = self.config.patch_size
        patches = patches.unflatten(1, (height // patch_size, width // patch_size))
        patches = patches.unflatten(-1, (patch_size, patch_size, self.out_channels))
        velocity = torch.einsum("nhwpqc->nchpwq", patches).reshape(batch_size, self.out_channels, height, width)
        return velocity, self.score_head(score)
