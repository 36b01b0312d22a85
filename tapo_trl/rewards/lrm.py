# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""Latent Reward Model (LRM) of LPO: how well the features of a noisy latent fit the text, as in CLIP."""

from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config

from ..method_card import MethodCard
from ..policies import FlowPolicy, PromptEmbeddings
from ..policies.loading import family_of_transformer
from .backbones.features import FeatureTransformerMixin, check_layers, proportional_layers
from .backbones.similarity import LRMHead
from .base import LatentRewardModel
from .step_reward import DEFAULT_MAX_SEQUENCE_LENGTH, DEFAULT_RESOLUTION, RewardOutput


DEFAULT_DEPTH = 0.75  # block 18 of the 24 of SD3
DEFAULT_GUIDANCE_SCALE = 7.5


def enhanced_feature(unconditional: torch.Tensor, conditional: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    r"""
    Visual feature enhancement: classifier-free guidance of a feature, \\( f_\varnothing + w (f_c - f_\varnothing) \\).

    Args:
        unconditional (`torch.Tensor` of shape `(batch_size, dim)`): feature of the latents with the empty prompt.
        conditional (`torch.Tensor` of shape `(batch_size, dim)`): feature of the latents with their prompts.
        guidance_scale (`float`): w. 1 is no enhancement.

    Returns:
        `torch.Tensor` of shape `(batch_size, dim)`.
    """
    return unconditional + guidance_scale * (conditional - unconditional)


class LRMModel(LatentRewardModel):
    """
    Latent Reward Model of LPO (Zhang et al., 2025), for families with pooled prompt embeddings: the mean over the image tokens
    after an intermediate joint block, enhanced by classifier-free guidance, is compared to the pooled embedding. Blocks behind
    that one are left out.

    Args:
        layer (`int`, *optional*):
            the joint block whose image tokens are read, counted from 1. Defaults to that at three quarters of the depth, 18
            of 24.
        guidance_scale (`float`, *optional*, defaults to `7.5`):
            w of [`enhanced_feature`]. 1 is no enhancement, and half of the cost.
        null_prompt_length (`int`, *optional*, defaults to `0`): tokens of the empty prompt, whose embeddings are kept.

    The others are those of [`LatentRewardModel`].
    """

    kind = "lrm"
    label = "LRM"
    trained_part = "head"
    card = MethodCard(
        name=label,
        tags=(kind,),
        paper="zhang2025diffusion",
        title="latent reward model (LRM)",
        text="The first blocks of the base model's transformer read the noisy latent and the prompt. The mean over their image "
        "tokens, enhanced by classifier-free guidance, is compared with the pooled prompt embedding, as in CLIP.",
    )

    @register_to_config
    def __init__(
        self,
        transformer_class: str,
        transformer_config: dict[str, Any],
        base_model_name_or_path: str = "",
        vae_fingerprint: str = "",
        layer: int | None = None,
        guidance_scale: float = DEFAULT_GUIDANCE_SCALE,
        null_prompt_length: int = 0,
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
        layers = proportional_layers([DEFAULT_DEPTH], num_layers) if layer is None else [layer]
        self.register_to_config(layer=check_layers(layers, num_layers, "layer")[0])
        self.transformer = backbone_class(layers, **transformer_config)
        self._no_split_modules = backbone_class._no_split_modules
        text_dim, token_dim = (transformer_config[name] for name in ("pooled_projection_dim", "joint_attention_dim"))
        self.head = LRMHead(self.transformer.feature_dim, text_dim)
        self.register_buffer("null_prompt_embeds", torch.zeros(1, null_prompt_length, token_dim))
        self.register_buffer("null_pooled_prompt_embeds", torch.zeros(1, text_dim))

    @classmethod
    def backbone_class(cls, transformer_class: str) -> type[FeatureTransformerMixin]:
        family = family_of_transformer(transformer_class)
        backbone_class = None if family is None else family.backbone_class("features")
        fields = () if backbone_class is None else backbone_class.interface_fields
        if not {"pooled_projection_dim", "joint_attention_dim"} <= set(fields):
            raise ValueError(
                "An LRM needs pooled prompt embeddings, as text encoders of CLIP give them, and prompts of one length, both of which "
                f"a `{transformer_class}` does not have: choose another kind of reward model, such as `slrm` or `dina`."
            )
        return backbone_class

    @classmethod
    def without_weights(cls, policy: FlowPolicy, **config) -> "LRMModel":
        if "null_prompt_length" not in config:
            length = config.get("max_sequence_length", DEFAULT_MAX_SEQUENCE_LENGTH)
            config["null_prompt_length"] = policy.prompt_shapes(length)["prompt_embeds"][0]
        return super().without_weights(policy, **config)

    @classmethod
    def from_policy(cls, policy: FlowPolicy, **config) -> "LRMModel":
        """
        Copy the first blocks of the policy's transformer, and encode the empty prompt with its text encoders.

        Args:
            policy ([`FlowPolicy`]): the policy whose latents will be rated, with its text encoders.
            config: `layer`, `guidance_scale`, `max_sequence_length` and the size in training, see [`LRMModel`].

        Returns:
            [`LRMModel`]: in evaluation mode, on the transformer's device and in its dtype, the head in float32.

        Raises:
            ValueError: if the policy's transformer has no pooled prompt embeddings.
        """
        cls.backbone_class(type(policy.transformer).__name__)
        null = policy.encode_prompts([""], config.get("max_sequence_length", DEFAULT_MAX_SEQUENCE_LENGTH))
        model = super().from_policy(policy, null_prompt_length=null.prompt_embeds.shape[1], **config)
        model.null_prompt_embeds.copy_(null.prompt_embeds)
        model.null_pooled_prompt_embeds.copy_(null.pooled_prompt_embeds)
        return model

    def _attach_base(self, transformer: ModelMixin, share: bool = False) -> None:
        self.transformer = type(self.transformer).from_base(transformer, [self.config.layer], share)
        with torch.device(transformer.device):
            self.head = LRMHead(self.transformer.feature_dim, transformer.config.pooled_projection_dim)
            for name, buffer in self.named_buffers(recurse=False):
                self.register_buffer(name, torch.zeros(buffer.shape))

    def trained_in_full(self) -> dict[str, torch.Tensor]:
        return dict(self.head.named_parameters(prefix="head")) | dict(self.named_buffers(recurse=False))

    def _freeze_unused(self) -> None:
        for name, parameter in self.transformer.block_list[-1].named_parameters():
            if name.startswith(self.transformer.text_output_layers):
                parameter.requires_grad_(False)

    @property
    def is_enhanced(self) -> bool:
        return self.config.guidance_scale != 1

    @property
    def latents_per_score(self) -> int:
        return 2 if self.is_enhanced else 1

    def forward(
        self,
        latents: torch.Tensor,
        sigma: float | torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor,
    ) -> RewardOutput:
        """The logits of noisy latents. Arguments are those of [`~LatentRewardModel.score`]."""
        feature = self.visual_feature(latents, sigma, prompt_embeds, pooled_prompt_embeds)
        return RewardOutput(logits=self.head(feature, pooled_prompt_embeds))

    def visual_feature(
        self,
        latents: torch.Tensor,
        sigma: float | torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor,
    ) -> torch.Tensor:
        """The pooled visual feature before its projection, of shape `(batch_size, dim)`, see [`~LRMModel.forward`]."""
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device).expand(len(latents))
        prompts = PromptEmbeddings(prompt_embeds, pooled_prompt_embeds)
        if not self.is_enhanced:
            return self._pooled_feature(latents, sigma, prompts)
        if prompt_embeds.shape[1:] != self.null_prompt_embeds.shape[1:]:
            raise ValueError(
                f"The prompt embeddings have shape {tuple(prompt_embeds.shape[1:])}, but those of the empty prompt, which "
                f"this LRM has since it was made, have {tuple(self.null_prompt_embeds.shape[1:])}: encode prompts with the "
                "same `max_sequence_length`."
            )
        null = PromptEmbeddings(self.null_prompt_embeds, self.null_pooled_prompt_embeds)
        both = PromptEmbeddings.cat([null.to(dtype=prompt_embeds.dtype).expand(len(prompts)), prompts])
        features = self._pooled_feature(torch.cat([latents, latents]), sigma.repeat(2), both)
        return enhanced_feature(*features.chunk(2), self.config.guidance_scale)

    def _pooled_feature(self, latents: torch.Tensor, sigma: torch.Tensor, prompts: PromptEmbeddings) -> torch.Tensor:
        return self._run_backbone(latents, sigma, prompts).visual[0].float().mean(dim=1)
