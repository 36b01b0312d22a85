# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""Step-aware preference model (SPM) of SPO: a CLIP that is told the noise level rates the decoded one-step estimate."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.image_processing_base import ImageProcessingMixin

from ..method_card import MethodCard
from ..networks.sharing import base_fingerprint
from ..policies import FlowPolicy, PromptEmbeddings
from ..policies.loading import only
from .clip_modulation import NoiseModulation, modulated_image_features
from .pretrained.clip import cast_clip
from .pretrained.preprocessing import CLIP_MEAN, CLIP_STD, clip_pixel_values
from .step_reward import (
    DEFAULT_MAX_SEQUENCE_LENGTH,
    DEFAULT_RESOLUTION,
    HUB_ARGUMENTS,
    RewardOutput,
    StepRewardModel,
)


DEFAULT_CLIP_MODEL = "yuvalkirstain/PickScore_v1"
TOKENIZER_FOLDER = "tokenizer"


class SPMModel(StepRewardModel):
    r"""
    Step-aware preference model of SPO (Liang et al., 2024): a CLIP scores the one-step prediction of the image from
    the noisy latents \\( x_\sigma \\), that is \\( \hat{x}_0 = x_\sigma - \sigma v(x_\sigma) \\) decoded by the
    policy's VAE. Adaptive layer norm conditions the image tower on the noise level.

    Args:
        clip_config (`dict`): the arguments of [`~transformers.CLIPConfig`].
        clip_model_name_or_path (`str`): where the CLIP was loaded from.
        image_mean (`list[float]`, *optional*): mean of each channel, as the CLIP's image processor has it.
        image_std (`list[float]`, *optional*): standard deviation of each channel.
        transformer_class (`str`): class name of the policy's transformer, whose estimates it rates.

    The others are those of [`StepRewardModel`].
    """

    kind = "spm"
    label = "SPM"
    trained_part = "modulation"
    scores_x0_prediction = True
    card = MethodCard(
        name=label,
        tags=(kind,),
        paper="liang2024step",
        title="step-aware preference model (SPM)",
        text="The base model predicts in one step the image that the noisy latent would become, and its VAE decodes it. A CLIP "
        "whose image tower is told the noise level, by adaptive layer norm, compares it with the prompt.",
    )

    @register_to_config
    def __init__(
        self,
        clip_config: dict[str, Any],
        clip_model_name_or_path: str,
        image_mean: tuple[float, float, float] = CLIP_MEAN,
        image_std: tuple[float, float, float] = CLIP_STD,
        transformer_class: str = "",
        base_model_name_or_path: str = "",
        vae_fingerprint: str = "",
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
        self.clip = CLIPModel(CLIPConfig(**clip_config))
        vision = self.clip.config.vision_config
        self.modulation = NoiseModulation(vision.hidden_size, vision.num_hidden_layers)
        self._no_split_modules = ["CLIPEncoderLayer"]
        self.gradient_checkpointing = False
        self.tokenizer: CLIPTokenizer | None = None  # comes with the weights

    @property
    def backbone(self) -> CLIPModel:
        return self.clip

    @classmethod
    def without_weights(
        cls, policy: FlowPolicy, clip_model_name_or_path: str = DEFAULT_CLIP_MODEL, **config
    ) -> "SPMModel":
        if policy.modality != "image":
            raise ValueError(
                f"An SPM rates images, but a `{type(policy).__name__}` makes videos: its CLIP reads one image, and decoding "
                "every candidate with a VAE of videos would cost more than the policy. Choose a reward model that reads "
                "latents, such as `slrm` or `dina`."
            )
        clip_config, _ = CLIPConfig.get_config_dict(clip_model_name_or_path)
        if clip_config.get("model_type") != CLIPConfig.model_type:
            raise ValueError(
                f"`{clip_model_name_or_path}` holds a model of type {clip_config.get('model_type')!r}, but an SPM is made of "
                "a CLIP of transformers (`CLIPModel`, type 'clip')."
            )
        with torch.device("meta"):
            return cls(
                clip_config=_plain_config(CLIPConfig.from_dict(clip_config)),
                clip_model_name_or_path=str(clip_model_name_or_path),
                **cls._facts(policy) | config,
            )

    @classmethod
    def from_policy(
        cls, policy: FlowPolicy, clip_model_name_or_path: str = DEFAULT_CLIP_MODEL, **config
    ) -> "SPMModel":
        """
        Load a CLIP, with its tokenizer and image processor, to rate what a policy is about to draw.

        Args:
            policy ([`FlowPolicy`]): the policy, of images.
            clip_model_name_or_path (`str`, *optional*, defaults to `"yuvalkirstain/PickScore_v1"`):
                Hub id or folder of a [`~transformers.CLIPModel`] in safetensors.
            config: `max_sequence_length` and the size in training, see [`SPMModel`].

        Returns:
            [`SPMModel`]: in evaluation mode, on the transformer's device and in its dtype, the modulation in float32. It is
            the CLIP itself until it is trained.

        Raises:
            ValueError: if the policy makes videos, or if there is no CLIP.
        """
        model = cls.without_weights(
            policy, clip_model_name_or_path, vae_fingerprint=policy.vae_fingerprint(), **config
        )
        processor, _ = ImageProcessingMixin.get_image_processor_dict(clip_model_name_or_path)
        model.register_to_config(image_mean=list(processor["image_mean"]), image_std=list(processor["image_std"]))
        model.tokenizer = CLIPTokenizer.from_pretrained(clip_model_name_or_path)
        base = model._load_base(None, policy.transformer.dtype)
        model.register_to_config(base_fingerprint=base_fingerprint(base))
        model._attach_base(base)
        return model.to(policy.transformer.device).eval()

    def _attach_base(self, base: CLIPModel, share: bool = False) -> None:
        if share:
            raise ValueError(
                f"`share_base=True` is for reward models on a policy's transformer, but an {self.label} is on a CLIP."
            )
        self.clip = clip = base
        vision = clip.config.vision_config
        with torch.device(clip.device):
            self.modulation = NoiseModulation(vision.hidden_size, vision.num_hidden_layers)

    def _load_base(self, base_model: str | CLIPModel | None, dtype: torch.dtype, **kwargs) -> CLIPModel:
        if isinstance(base_model, CLIPModel):
            clip = copy.deepcopy(base_model)
        else:
            name = self.config.clip_model_name_or_path if base_model is None else base_model
            if name == "":
                raise ValueError(
                    f"This {self.label} was trained with LoRA on a CLIP whose name was not published: pass `base_model`, the "
                    "Hub id or folder of the CLIP, or a `CLIPModel`."
                )
            clip = CLIPModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True, **kwargs)
        expected, found = _plain_config(CLIPConfig(**self.config.clip_config)), _plain_config(clip.config)
        if expected != found:
            different = sorted(
                name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
            )
            raise ValueError(
                f"`base_model` is not the CLIP that this {self.label} was trained from: its configuration differs in "
                f"{different}."
            )
        cast_clip(clip, dtype)
        return clip

    def _cast_backbone(self, dtype: torch.dtype) -> None:
        cast_clip(self.clip, dtype)

    @classmethod
    def lora_target_modules(cls, policy: FlowPolicy) -> list[str]:
        return ["q_proj", "k_proj", "v_proj", "out_proj"]

    def trained_in_full(self) -> dict[str, torch.Tensor]:
        return dict(self.modulation.named_parameters(prefix="modulation"))

    def check_compatible(self, policy: FlowPolicy, max_sequence_length: int | None = None) -> None:
        trained_on = {
            "transformer class": self.config.transformer_class,
            "VAE (fingerprint)": self.config.vae_fingerprint,
        }
        found = {
            "transformer class": policy.transformer_class,
            "VAE (fingerprint)": policy.vae_fingerprint(),
        }
        self._check_same(policy, trained_on, found)

    # Scores

    def forward(self, pixel_values: torch.Tensor, sigma: torch.Tensor, input_ids: torch.Tensor) -> RewardOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, image_size, image_size)`): see [`~SPMModel.pixel_values`].
            sigma (`torch.Tensor` of shape `()` or `(batch_size,)`): noise levels of the latents in [0, 1].
            input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`): see [`~SPMModel.tokenize`].

        Returns:
            [`RewardOutput`]
        """
        unique_ids, rows = input_ids.unique(dim=0, return_inverse=True)  # both sides of a pair have the same prompt
        text = self.text_features(unique_ids)[rows]
        return RewardOutput(logits=self.similarity(self.image_features(pixel_values, sigma), text))

    def forward_inputs(
        self,
        policy: FlowPolicy,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        prompts: list[str],
        prompt_embeds: PromptEmbeddings,
    ) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            velocity = policy.velocity(policy.transformer, latents, sigma, prompt_embeds)
            estimate = latents - sigma.view(-1, *[1] * (latents.ndim - 1)) * velocity
            pixel_values = self.pixel_values(policy.decode(estimate))
        return {
            "pixel_values": pixel_values,
            "sigma": sigma,
            "input_ids": self.tokenize(prompts).to(latents.device),
        }

    def score(self, images: torch.Tensor, sigma: float | torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """
        Rate decoded one-step estimates. Higher is better; only differences between images of the same prompt at the same
        noise level have a meaning.

        Args:
            images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): in [0, 1], as [`~FlowPolicy.decode`] gives them.
            sigma (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`):
                noise levels of the latents that they are estimated from.
            prompts (`list[str]`): one prompt per image.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`, float32.
        """
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=images.device)
        return self(self.pixel_values(images), sigma, self.tokenize(prompts).to(images.device)).logits

    def tokenize(self, prompts: list[str]) -> torch.Tensor:
        """Token ids of the CLIP's own tokenizer, of shape `(len(prompts), sequence_length)`, on the CPU."""
        length = self.clip.config.text_config.max_position_embeddings
        return self.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids

    def pixel_values(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1] as the CLIP reads them, see [`clip_pixel_values`]."""
        image_size = self.clip.config.vision_config.image_size
        return clip_pixel_values(images, image_size, self.config.image_mean, self.config.image_std)

    def text_features(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Projected features of the prompts, of shape `(batch_size, projection_dim)`."""
        return self.clip.get_text_features(input_ids=input_ids, return_dict=True).pooler_output

    def image_features(self, pixel_values: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Projected features of the images, of shape `(batch_size, projection_dim)`."""
        checkpoints = self.gradient_checkpointing and torch.is_grad_enabled()
        run_layer = self._gradient_checkpointing_func if checkpoints else None
        sigma = sigma.expand(len(pixel_values))
        return modulated_image_features(self.clip, self.modulation, pixel_values, sigma, run_layer)

    def similarity(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        r"""\\( e^\tau \cos(f_v, f_t) \\) of features, in float32 whatever the model's precision, of shape `(batch_size,)`."""
        with torch.autocast(image.device.type, enabled=False):
            return self.clip.logit_scale.float().exp() * F.cosine_similarity(image.float(), text.float())

    # Saving and loading

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self.tokenizer.save_pretrained(Path(save_directory) / TOKENIZER_FOLDER)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs) -> "SPMModel":
        pretrained_model_name_or_path = os.path.expanduser(pretrained_model_name_or_path)
        model = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        hub_arguments = only(kwargs, HUB_ARGUMENTS)
        subfolder = "/".join(filter(None, (hub_arguments.pop("subfolder", None), TOKENIZER_FOLDER)))
        model.tokenizer = CLIPTokenizer.from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, **hub_arguments
        )
        return model


def _plain_config(config: CLIPConfig) -> dict[str, Any]:
    """The arguments that rebuild a CLIP, as JSON gives them back."""
    unread = ("architectures", "_name_or_path", "transformers_version", "dtype", "torch_dtype")

    def plain(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: plain(value) if isinstance(value, Mapping) else value
            for name, value in values.items()
            if name not in unread
        }

    return plain(config.to_dict())
