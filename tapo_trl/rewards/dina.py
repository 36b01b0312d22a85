# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""DiNa-LRM: a reward model that reads several early blocks of the diffusion transformer with a head of its own."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..method_card import MethodCard
from ..networks.float32 import Readout
from ..policies import PromptEmbeddings
from .backbones.features import Features, check_layers, proportional_layers
from .base import LatentRewardModel
from .step_reward import DEFAULT_MAX_SEQUENCE_LENGTH, DEFAULT_RESOLUTION, RewardOutput


DEFAULT_DEPTHS = (1 / 6, 1 / 3, 1 / 2)  # blocks 4, 8 and 12 of the 24 of SD3
DEFAULT_NUM_QUERIES = 4
MAX_HEADS = 8


class FiLMAdapter(nn.Module):
    """
    Brings the tokens of one block to the width of the head's input: scaled and shifted by the noise level, an embedding of
    the block added, then projected. At the start the noise level has no influence.

    Args:
        dim (`int`): width of the tokens.
        out_dim (`int`): width of the result.
        time_dim (`int`, *optional*): width of the embedding of the noise level. Defaults to that of the tokens.
    """

    def __init__(self, dim: int, out_dim: int, time_dim: int | None = None):
        super().__init__()
        self.modulation = nn.Sequential(nn.Linear(time_dim or dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, 2 * dim))
        self.layer_embedding = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.projection = nn.Linear(dim, out_dim)
        nn.init.zeros_(self.modulation[-1].weight)
        nn.init.zeros_(self.modulation[-1].bias)

    def forward(self, tokens: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulation(time).unsqueeze(1).chunk(2, dim=2)
        return self.projection(tokens * (1 + scale) + shift + self.layer_embedding)


class MultiLayerAdapter(nn.Module):
    """One [`FiLMAdapter`] for each tapped block, to a quarter of the width, then a linear layer over all of them."""

    def __init__(self, dim: int, num_layers: int, time_dim: int | None = None):
        super().__init__()
        self.adapters = nn.ModuleList(FiLMAdapter(dim, dim // 4, time_dim) for _ in range(num_layers))
        self.merge = nn.Linear(num_layers * (dim // 4), dim)

    def forward(self, tokens: Sequence[torch.Tensor], time: torch.Tensor) -> torch.Tensor:
        adapted = [adapter(layer, time) for adapter, layer in zip(self.adapters, tokens, strict=True)]
        return self.merge(torch.cat(adapted, dim=2))


class ContextProjections(nn.Module):
    """
    Keys and values of the tokens that queries look at. With `gated`, each token's value is scaled by a number in (0, 1) that
    the token itself decides, one half at the start.
    """

    def __init__(self, dim: int, gated: bool):
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.gate = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 1)) if gated else None
        if gated:
            nn.init.zeros_(self.gate[-1].weight)
            nn.init.zeros_(self.gate[-1].bias)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.norm(tokens)
        value = self.value(tokens)
        return self.key(tokens), value if self.gate is None else value * self.gate(tokens).sigmoid()


class CrossAttention(nn.Module):
    """
    Queries attend to one or more sets of tokens, to each on its own; the results are added. `masks` says for each set which of
    its tokens count, by default all.
    """

    def __init__(self, dim: int, num_contexts: int, gated: bool):
        super().__init__()
        self.num_heads = math.gcd(dim, MAX_HEADS)
        self.norm = nn.RMSNorm(dim)
        self.query, self.output = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.contexts = nn.ModuleList(ContextProjections(dim, gated) for _ in range(num_contexts))

    def forward(
        self, queries: torch.Tensor, *contexts: torch.Tensor, masks: Sequence[torch.Tensor | None] | None = None
    ) -> torch.Tensor:
        query = self._heads(self.query(self.norm(queries)))
        attended = 0
        masks = masks or [None] * len(contexts)
        for projections, tokens, mask in zip(self.contexts, contexts, masks, strict=True):
            key, value = map(self._heads, projections(tokens))
            mask = None if mask is None else mask[:, None, None]
            attended = attended + F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return queries + self.output(attended.transpose(1, 2).flatten(2))

    def _heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class DiNaHead(nn.Module):
    """
    Learned queries look at the visual and the text tokens, then at the visual ones again; a feed-forward and a linear layer
    make a score of each, whose mean is the logit.

    Args:
        dim (`int`): width of the features.
        num_layers (`int`): number of tapped blocks.
        num_queries (`int`): number of queries.
        time_dim (`int`, *optional*): width of the embedding of the noise level. Defaults to that of the features.
    """

    def __init__(self, dim: int, num_layers: int, num_queries: int, time_dim: int | None = None):
        super().__init__()
        self.visual_adapter = MultiLayerAdapter(dim, num_layers, time_dim)
        self.text_adapter = MultiLayerAdapter(dim, num_layers, time_dim)
        self.queries = nn.Parameter(0.02 * torch.randn(1, num_queries, dim))
        self.joint_attention = CrossAttention(dim, num_contexts=2, gated=True)
        self.visual_attention = CrossAttention(dim, num_contexts=1, gated=False)
        self.ff_norm = nn.RMSNorm(dim)
        self.ff = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.readout = Readout(dim)

    def forward(self, features: Features) -> torch.Tensor:
        """
        Args:
            features ([`Features`]): hidden states after the tapped blocks.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`, float32.
        """
        dtype = self.queries.dtype
        time = features.time.to(dtype)
        visual = self.visual_adapter([tokens.to(dtype) for tokens in features.visual], time)
        text = self.text_adapter([tokens.to(dtype) for tokens in features.text], time)
        queries = self.queries.expand(len(visual), -1, -1)
        queries = self.joint_attention(queries, visual, text, masks=[None, features.text_mask])
        queries = self.visual_attention(queries, visual)
        queries = queries + self.ff(self.ff_norm(queries))
        return self.readout(queries.float().mean(dim=1))  # linear, so that the mean may come first


class DiNaModel(LatentRewardModel):
    """
    DiNa-LRM (Liu et al., 2026), a diffusion-native latent reward model: the first half of the transformer, from which
    [`DiNaHead`] reads the score.

    Args:
        layers (`list[int]`, *optional*):
            blocks that are read, counted from 1, in ascending order; those behind the last are left out. Defaults to those at
            a sixth, a third and a half of the depth, 4, 8 and 12 of 24.
        num_queries (`int`, *optional*, defaults to `4`): number of learned queries.

    The others are those of [`LatentRewardModel`].
    """

    kind = "dina"
    label = "DiNa-LRM"
    trained_part = "head"
    unsupported = "A DiNa-LRM cannot read a `{}`"
    card = MethodCard(
        name=label,
        tags=(kind,),
        paper="liu2026beyond",
        title="latent reward model (DiNa-LRM)",
        text="The first blocks of the base model's transformer read the noisy latent and the prompt. A head with learned queries "
        "reads the score out of several of them.",
    )

    @register_to_config
    def __init__(
        self,
        transformer_class: str,
        transformer_config: dict[str, Any],
        base_model_name_or_path: str = "",
        vae_fingerprint: str = "",
        layers: list[int] | None = None,
        num_queries: int = DEFAULT_NUM_QUERIES,
        max_sequence_length: int = DEFAULT_MAX_SEQUENCE_LENGTH,
        resolution: int = DEFAULT_RESOLUTION,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        lora: bool = False,
        base_revision: str | None = None,
        base_variant: str | None = None,
        base_fingerprint: str = "",
        trained: bool = True,
        base_subfolder: str = "transformer",
    ):
        super().__init__()
        backbone_class = self.backbone_class(transformer_class)
        num_layers = backbone_class.num_blocks(transformer_config)
        layers = proportional_layers(DEFAULT_DEPTHS, num_layers) if layers is None else layers
        layers = check_layers(layers, backbone_class.last_layer_with_text(num_layers), "layers")
        self.register_to_config(layers=layers)
        self.transformer = backbone_class(layers, **transformer_config)
        self._no_split_modules = backbone_class._no_split_modules
        self.head = self._make_head()

    def _make_head(self) -> DiNaHead:
        features = self.transformer
        return DiNaHead(features.feature_dim, len(self.config.layers), self.config.num_queries, features.time_dim)

    def _attach_base(self, transformer: ModelMixin, share: bool = False) -> None:
        self.transformer = type(self.transformer).from_base(transformer, self.config.layers, share)
        with torch.device(transformer.device):
            self.head = self._make_head()

    def trained_in_full(self) -> dict[str, torch.Tensor]:
        return dict(self.head.named_parameters(prefix="head"))

    def forward(
        self,
        latents: torch.Tensor,
        sigma: float | torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor | None = None,
        **prompts: torch.Tensor,
    ) -> RewardOutput:
        """The logits of noisy latents. Arguments are those of [`~LatentRewardModel.score`]."""
        prompts = PromptEmbeddings(prompt_embeds, pooled_prompt_embeds, **prompts)
        return RewardOutput(logits=self.head(self._run_backbone(latents, sigma, prompts)))
