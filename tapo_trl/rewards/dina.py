# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""DiNa-LRM: a reward model that reads several early blocks of the diffusion transformer with a head of its own."""

from typing import Any

import torch
from diffusers import ModelMixin, SD3Transformer2DModel, WanTransformer3DModel
from diffusers.configuration_utils import register_to_config

from .backbones.features import FeatureTransformerMixin, check_layers, proportional_layers
from .backbones.sd3 import SD3FeatureTransformer2DModel
from .backbones.wan import WanFeatureTransformer3DModel
from .base import DEFAULT_MAX_SEQUENCE_LENGTH, DEFAULT_RESOLUTION, LatentRewardModel
from .dina_head import DiNaHead
from .step_reward import RewardOutput


DEFAULT_DEPTHS = (1 / 6, 1 / 3, 1 / 2)  # blocks 4, 8 and 12 of the 24 of SD3
DEFAULT_NUM_QUERIES = 4


class DiNaModel(LatentRewardModel):
    """
    DiNa-LRM (Liu et al., 2026), a diffusion-native latent reward model: the first half of the transformer, from which
    [`DiNaHead`] reads the score.

    Args:
        transformer_class (`str`): class name of the backbone in diffusers.
        transformer_config (`dict`): arguments that rebuild the whole backbone.
        base_model_name_or_path (`str`): where the pipeline of the backbone was loaded from, `""` if from memory.
        vae_fingerprint (`str`): [`~FlowPolicy.vae_fingerprint`] of the VAE whose latents it rates.
        layers (`list[int]`, *optional*):
            blocks that are read, counted from 1, in ascending order; those behind the last are left out. Defaults to those at
            a sixth, a third and a half of the depth, 4, 8 and 12 of 24.
        num_queries (`int`, *optional*, defaults to `4`): number of learned queries.
        max_sequence_length (`int`, *optional*, defaults to `256`): length at which prompts were encoded.
        resolution (`int`, *optional*, defaults to `512`): size of the images in training, in pixels.
        height, width, num_frames (`int`, *optional*): size of the videos in training, kept as a record.
        lora (`bool`, *optional*, defaults to `False`): whether the backbone was trained with LoRA.
        base_revision, base_variant (`str`, *optional*): revision and variant of the base that were asked for.
        base_fingerprint (`str`, *optional*): hash of the backbone's weights before the training, `""` if it is not known.
        trained (`bool`, *optional*, defaults to `True`): whether the values above are those of a training.
    """

    kind = "dina"
    label = "DiNa-LRM"
    trained_part = "head"

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
    ):
        super().__init__()
        backbone_class, num_layers = self.backbone_class(transformer_class), transformer_config["num_layers"]
        layers = proportional_layers(DEFAULT_DEPTHS, num_layers) if layers is None else layers
        layers = check_layers(layers, backbone_class.last_layer_with_text(num_layers), "layers")
        self.register_to_config(layers=layers)
        self.transformer = backbone_class(layers, **transformer_config)
        self._no_split_modules = backbone_class._no_split_modules
        self.head = self._make_head()

    @classmethod
    def backbone_class(cls, transformer_class: str) -> type[FeatureTransformerMixin]:
        if transformer_class == SD3Transformer2DModel.__name__:
            return SD3FeatureTransformer2DModel
        if transformer_class == WanTransformer3DModel.__name__:
            return WanFeatureTransformer3DModel
        raise ValueError(
            f"A DiNa-LRM cannot read a `{transformer_class}`. Supported backbones: `{SD3Transformer2DModel.__name__}` and "
            f"`{WanTransformer3DModel.__name__}`."
        )

    def _make_head(self) -> DiNaHead:
        return DiNaHead(self.transformer.feature_dim, len(self.config.layers), self.config.num_queries)

    def _take_base(self, transformer: ModelMixin, share: bool = False) -> None:
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
    ) -> RewardOutput:
        """
        Args:
            latents (`torch.Tensor` of shape `(batch_size, *latent_shape)`): noisy latents x_sigma.
            sigma (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`): their noise levels in [0, 1].
            prompt_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, dim)`): see [`PromptEmbeddings`].
            pooled_prompt_embeds (`torch.Tensor` of shape `(batch_size, pooled_dim)`, *optional*):
                pooled embeddings, for the families that have them.

        Returns:
            [`RewardOutput`]
        """
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device).expand(len(latents))
        features = self.transformer(
            hidden_states=latents.to(self.transformer.backbone_dtype),
            timestep=sigma * 1000,
            **self._prompt_arguments(prompt_embeds, pooled_prompt_embeds),
        )
        return RewardOutput(logits=self.head(features))
