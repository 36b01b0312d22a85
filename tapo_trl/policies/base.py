# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Interface of model families: [`FlowPolicy`]."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

from ..files import signs_fingerprint, update_with_weights, weights_fingerprint  # noqa: F401
from ..schedulers import FlowMatchSDEScheduler
from .embeddings import PromptEmbeddings
from .lora_files import LoraFilesMixin
from .ode import OdeMixin


# Times, guidance and positions, which most transformers read in float32
FLOAT32_INPUTS = ("timestep", "t", "guidance", "img_ids", "txt_ids")


def cast_inputs(
    inputs: Mapping[str, Any], dtype: torch.dtype, float32_inputs: Sequence[str] = FLOAT32_INPUTS
) -> dict[str, Any]:
    """Cast the floating-point arguments of a transformer, and lists of them, but for `float32_inputs`."""

    def cast(value: Any) -> Any:
        if isinstance(value, list):
            return [cast(part) for part in value]
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return {name: value if name in float32_inputs else cast(value) for name, value in inputs.items()}


@dataclass(frozen=True)
class Defaults:
    """
    What a pipeline samples with unless told otherwise.

    Args:
        height, width (`int`): size in pixels.
        num_inference_steps (`int`): sampling steps.
        guidance_scale (`float`): the pipeline's own number.
        num_frames (`int`, *optional*): frames of a video.
        negative_prompt (`str`, *optional*, defaults to `""`): prompt of the unconditional half of the guidance.
    """

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    num_frames: int | None = None
    negative_prompt: str = ""


class FlowPolicy(OdeMixin, LoraFilesMixin, ABC):
    """
    A text-to-image or text-to-video flow-matching pipeline as a policy.

    A policy contains everything that differs between model families, and nothing that belongs to an algorithm. The
    network is always passed to [`~FlowPolicy.velocity`], because the trainer wraps it (PEFT, accelerate);
    `policy.transformer` is the bare one. Latents are unpacked, normalised and float32. A family is a subclass and a
    line in `policies/loading.py`.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Pipeline with all of its components.

    Attributes:
        modality (`str`): `"image"` or `"video"`.
        text_encoder_names (`list[str]`): components that encode text.
        max_sequence_length (`int`): tokens of a prompt, unless told otherwise.
        lora_target_modules (`list[str]`): layers that get a LoRA, unless told otherwise.
        guidance (`str`):
            What `guidance_scale` is. `"classifier_free"`: a second forward with the negative prompt. `"embedded"`: an input
            of the network. `"none"`: it has no effect.
        guidance_off (`float`): largest `guidance_scale` that turns classifier-free guidance off.
        joint_text (`bool`): whether blocks transform the prompt's tokens beside those of the latents.
        float32_inputs (`tuple[str, ...]`): arguments of the transformer that stay in float32 when it is in half precision.
        component_dtypes (`dict[str, torch.dtype]`): precision of components that lose detail in half precision.
        comfyui_knows_layers (`bool`): whether ComfyUI finds the layers of a LoRA by their names in diffusers.
        known_configs (`dict[str, dict]`): for released repositories, class and configuration of each component.
        licenses (`dict[str, tuple]`): `license` and `license_name` of released weights, by the start of their repository.
    """

    modality: Literal["image", "video"]
    text_encoder_names: list[str]
    max_sequence_length: int
    lora_target_modules: list[str]
    guidance: Literal["classifier_free", "embedded", "none"] = "classifier_free"
    guidance_off: float = 1.0
    joint_text: bool = True
    comfyui_knows_layers: bool = False
    float32_inputs: tuple[str, ...] = FLOAT32_INPUTS
    component_dtypes: ClassVar[dict[str, torch.dtype]] = {}
    known_configs: ClassVar[dict[str, dict[str, tuple[str, dict[str, Any]]]]] = {}
    licenses: ClassVar[dict[str, tuple[str, str | None]]] = {}
    revision: str | None = None  # of the repository, and variant of its files, that were asked for
    variant: str | None = None
    subfolder: str = "transformer"  # of the saved pipeline, where the transformer is

    def __init__(self, pipeline: DiffusionPipeline):
        self.pipeline = pipeline
        self.name_or_path = str(pipeline.config["_name_or_path"] or "") if "_name_or_path" in pipeline.config else ""

    @classmethod
    def from_pipeline(cls, pipeline: DiffusionPipeline) -> "FlowPolicy":
        """The policy for a pipeline of this family, which may have variants."""
        return cls(pipeline)

    @property
    def transformer(self) -> ModelMixin:
        return self.pipeline.transformer

    @transformer.setter
    def transformer(self, network: ModelMixin) -> None:
        self.pipeline.transformer = network

    @property
    def transformer_class(self) -> str:
        """Name of the transformer's class in diffusers."""
        return type(self.transformer).__name__

    @property
    def vae(self) -> ModelMixin:
        return self.pipeline.vae

    # What a family says

    @property
    @abstractmethod
    def defaults(self) -> Defaults:
        """What the pipeline samples with unless told otherwise."""

    @classmethod
    def tiny(cls, seed: int = 0, **transformer_config) -> DiffusionPipeline:
        """
        A pipeline with random weights that runs on a CPU in milliseconds. Seeds PyTorch.

        Args:
            seed (`int`, *optional*, defaults to `0`): seed of the weights.
            transformer_config: fields of the transformer's configuration.
        """
        raise NotImplementedError(f"`{cls.__name__}` has no tiny pipeline.")

    @classmethod
    def placeholders(cls) -> dict[str, Any]:
        """Components that the constructor of the pipeline reads, for dry runs, which have no others than networks."""
        return {}

    @abstractmethod
    def encode_prompts(self, prompts: list[str], max_sequence_length: int | None = None) -> PromptEmbeddings:
        """
        Run the text encoders on `prompts`, without gradients. Needs them loaded, see [`~FlowPolicy.unload_text_encoders`].

        Args:
            prompts (`list[str]`): texts.
            max_sequence_length (`int`, *optional*): tokens per prompt. Defaults to the family's `max_sequence_length`.
        """

    @abstractmethod
    def latent_shape(self, height: int, width: int, num_frames: int | None = None) -> tuple[int, ...]:
        """
        Shape of one latent, without the batch dimension.

        Args:
            height (`int`): height of the image or video in pixels.
            width (`int`): its width in pixels.
            num_frames (`int`, *optional*): number of frames of a video; not given for an image.

        Raises:
            ValueError: if the model cannot make that size.
        """

    def num_tokens(self, latent_shape: Sequence[int], max_sequence_length: int = 0) -> tuple[int, int]:
        """
        Tokens of a sample and of a prompt in the transformer.

        Args:
            latent_shape (`Sequence[int]`): shape of one latent.
            max_sequence_length (`int`, *optional*, defaults to `0`): see [`~FlowPolicy.encode_prompts`].
        """
        _, *sides = latent_shape
        patch = self.transformer.config.patch_size
        patches = [patch] * len(sides) if isinstance(patch, int) else patch
        return math.prod(side // size for side, size in zip(sides, patches, strict=True)), max_sequence_length

    def prompt_shapes(self, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of a prompt of full length, without the batch dimension. Masks are left out: all tokens count."""
        raise NotImplementedError(f"`{type(self).__name__}` does not say which shapes its prompts have.")

    def sigmas(self, num_inference_steps: int) -> Sequence[float] | None:
        """Noise levels that the pipeline gives to its scheduler, before the shift. `None`: the scheduler's own."""
        return None

    def mu(self, num_inference_steps: int, latent_shape: Sequence[int]) -> float | None:
        """Shift of the noise levels that depends on the size, if the scheduler has one."""
        config = self.pipeline.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return None
        bounds = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
        return calculate_shift(self.num_tokens(latent_shape)[0], *bounds)

    @staticmethod
    @abstractmethod
    def model_inputs(
        config: Mapping[str, Any],
        latents: torch.Tensor,
        sigma: torch.Tensor,
        prompts: PromptEmbeddings,
        guidance_scale: float | None = None,
    ) -> dict[str, Any]:
        """
        Arguments of the transformer's forward.

        Args:
            config (`Mapping`): the transformer's configuration.
            latents (`torch.Tensor` of shape `(batch_size, *latent_shape)`): noisy latents, float32.
            sigma (`torch.Tensor` of shape `(batch_size,)`): their noise levels in [0, 1], float32.
            prompts ([`PromptEmbeddings`]): one per latent.
            guidance_scale (`float`, *optional*): of embedded guidance. Defaults to the family's.
        """

    @staticmethod
    def velocity_of(config: Mapping[str, Any], output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The velocity x1 - x0 at `latents`, in their shape, from the transformer's output."""
        return output

    def guide(self, conditional: torch.Tensor, unconditional: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        """Classifier-free guidance of velocities."""
        return unconditional + guidance_scale * (conditional - unconditional)

    def to_latents(self, encoded: torch.Tensor) -> torch.Tensor:
        """Normalise what the VAE encodes."""
        return (encoded - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def from_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """The way back of [`~FlowPolicy.to_latents`]."""
        return latents / self.vae.config.scaling_factor + self.vae.config.shift_factor

    # Experts: transformers of which each sample goes through one, by its noise level

    @property
    def experts(self) -> dict[str, ModelMixin]:
        """The transformers, by their folder in the saved pipeline. Most families have one."""
        return {self.subfolder: self.transformer}

    @property
    def trained_experts(self) -> list[str]:
        """Those that a training changes."""
        return list(self.experts)

    def configure_experts(
        self, expert: str | None = None, guidance_scale_2: float | None = None, guidance_scale: float | None = None
    ) -> None:
        """
        Choose what is done with two experts.

        Args:
            expert (`str`, *optional*): train this one alone, `"high"` or `"low"`, by the noise levels that it is for.
            guidance_scale_2 (`float`, *optional*): guidance scale of that for low noise levels.
            guidance_scale (`float`, *optional*): the other one, if it is known. Without guidance, there is no second scale either.

        Raises:
            ValueError: if there are no two, or if `guidance_scale_2` would have no effect.
        """
        for name, value in (("expert", expert), ("guidance_scale_2", guidance_scale_2)):
            if value is not None:
                raise ValueError(
                    f"`{name}={value!r}` is for models with two experts, such as Wan2.2-T2V-A14B, but `{self.name_or_path}` has "
                    "one transformer: leave it unset."
                )

    def only(self, expert: str) -> "FlowPolicy":
        """The policy of one of two experts, `"high"` or `"low"`, at all noise levels."""
        raise ValueError(f"`{self.name_or_path}` has one transformer, so there is no expert `{expert}` to choose.")

    def uses_expert(self, name: str, sigma: torch.Tensor) -> torch.Tensor:
        """At which of the noise levels, of shape `(num_levels,)`, the transformer of this name predicts."""
        return torch.ones_like(sigma, dtype=torch.bool)

    def guidance_at(self, sigma: torch.Tensor, guidance_scale: float) -> float | torch.Tensor:
        """Scale of classifier-free guidance at noise levels of shape `(batch_size,)`."""
        return guidance_scale

    # What follows from it

    def build_scheduler(
        self, num_inference_steps: int, latent_shape: tuple[int, ...], device: torch.device | str = "cpu", **overrides
    ) -> FlowMatchSDEScheduler:
        """
        A scheduler on the grid that the pipeline itself uses for `num_inference_steps` and `latent_shape`.

        Args:
            num_inference_steps (`int`): number of sampling steps T.
            latent_shape (`tuple[int, ...]`): shape of one latent, see [`~FlowPolicy.latent_shape`].
            device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where the grid lies.
            overrides: fields of [`FlowMatchSDEScheduler`], such as `noise_level` or `sde_type`.
        """
        config = self.pipeline.scheduler.config
        if isinstance(self.pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            scheduler = FlowMatchSDEScheduler.from_config(config, **overrides)
        else:  # `from_config` would drop the `flow_shift` of a multistep solver
            scheduler = FlowMatchSDEScheduler(config.num_train_timesteps, shift=config.flow_shift, **overrides)
        sigmas, mu = self.sigmas(num_inference_steps), self.mu(num_inference_steps, latent_shape)
        scheduler.set_timesteps(num_inference_steps, device=device, sigmas=sigmas, mu=mu)
        return scheduler

    def forward(
        self,
        model: torch.nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        prompt_embeds: PromptEmbeddings,
        guidance_scale: float | None = None,
    ) -> torch.Tensor:
        """Call `model` once. Arguments are those of [`~FlowPolicy.model_inputs`]."""
        config = self.transformer.config
        inputs = self.model_inputs(config, latents, sigma, prompt_embeds, guidance_scale)
        inputs = cast_inputs(inputs, self.transformer.dtype, self.float32_inputs)
        output = model(**inputs, return_dict=False)[0]
        return self.velocity_of(config, output, latents).float()

    def is_guided(self, guidance_scale: float | None) -> bool:
        """Whether `guidance_scale` takes a second forward, with the negative prompt."""
        return self.guidance == "classifier_free" and guidance_scale is not None and guidance_scale > self.guidance_off

    def unguided(self, guidance_scale: float | None) -> float | None:
        """The same scale without classifier-free guidance: embedded guidance is part of the network, and stays."""
        return guidance_scale if self.guidance == "embedded" else None

    def velocity(
        self,
        model: torch.nn.Module,
        latents: torch.Tensor,
        sigma: float | torch.Tensor,
        prompt_embeds: PromptEmbeddings,
        negative_prompt_embeds: PromptEmbeddings | None = None,
        guidance_scale: float | None = None,
    ) -> torch.Tensor:
        """
        Velocity x1 - x0 that `model` predicts, with classifier-free guidance in one batched forward.

        Args:
            model (`torch.nn.Module`): the family's transformer, wrapped or not.
            latents (`torch.Tensor` of shape `(batch_size, *latent_shape)`): noisy latents, float32.
            sigma (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`): their noise levels in [0, 1].
            prompt_embeds ([`PromptEmbeddings`]): one prompt per latent.
            negative_prompt_embeds ([`PromptEmbeddings`], *optional*):
                one per latent, or a single one for all; needed if [`~FlowPolicy.is_guided`].
            guidance_scale (`float`, *optional*):
                the pipeline's own number. By default no classifier-free guidance, or the family's embedded guidance.

        Returns:
            `torch.Tensor`: velocity, float32, shaped as `latents`.
        """
        batch_size = len(latents)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device).expand(batch_size)
        if not self.is_guided(guidance_scale):
            return self.forward(model, latents, sigma, prompt_embeds, self.unguided(guidance_scale))
        if negative_prompt_embeds is None:
            raise ValueError(f"`guidance_scale={guidance_scale}` needs `negative_prompt_embeds`.")
        if len(negative_prompt_embeds) == 1:
            negative_prompt_embeds = negative_prompt_embeds.expand(batch_size)
        both = PromptEmbeddings.cat([negative_prompt_embeds, prompt_embeds])
        output = self.forward(model, torch.cat([latents] * 2), sigma.repeat(2), both)
        unconditional, conditional = output.chunk(2)
        return self.guide(conditional, unconditional, self.guidance_at(sigma, guidance_scale))

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """
        Pixels to latents, the mode of the VAE's posterior.

        Args:
            pixels (`torch.Tensor`):
                float32 in [0, 1], of shape `(batch_size, 3, height, width)`, or `(batch_size, 3, num_frames, height,
                width)` for video.

        Returns:
            `torch.Tensor` of shape `(batch_size, *latent_shape)`, float32.
        """
        if self.modality == "video":  # the VAE would drop frames that are too many
            self.latent_shape(*pixels.shape[3:], pixels.shape[2])
        pixels = (pixels * 2 - 1).to(self.vae.device, self.vae.dtype)
        with self._vae_precision():
            encoded = self.vae.encode(pixels).latent_dist.mode().float()
        return self.to_latents(encoded)

    def decode(self, latents: torch.Tensor, with_gradient: bool = False) -> torch.Tensor:
        """Latents to pixels, shaped as for [`~FlowPolicy.encode`]; `with_gradient` lets gradients flow back to the latents."""
        with torch.set_grad_enabled(with_gradient), self._vae_precision():
            latents = self.from_latents(latents).to(self.vae.device, self.vae.dtype)
            pixels = self.vae.decode(latents, return_dict=False)[0]
            return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def _vae_precision(self) -> AbstractContextManager:
        """The VAE computes in the precision of its weights, even inside of a trainer's autocast."""
        return torch.autocast(self.vae.device.type, enabled=False)

    def move_text_encoders(self, device: torch.device | str) -> None:
        for name in self.text_encoder_names:
            if self.pipeline.components[name] is not None:
                self.pipeline.components[name].to(device)

    @property
    def has_text_encoders(self) -> bool:
        """Whether prompts can be encoded."""
        return any(self.pipeline.components[name] is not None for name in self.text_encoder_names)

    def unload_text_encoders(self) -> None:
        """Drop the text encoders, so that their memory is free for training."""
        for name in self.text_encoder_names:
            self.pipeline.register_modules(**{name: None})

    def transformer_fingerprint(self) -> str:
        """Short hash of the transformer: its configuration, its precision and its weights."""
        return weights_fingerprint(self.transformer)

    def vae_fingerprint(self) -> str:
        """Short hash of the VAE: its configuration and the signs of its weights, which no change of dtype moves."""
        return signs_fingerprint(self.vae)
