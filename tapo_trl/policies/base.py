# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What every model family offers to rollouts, losses and trainers: [`FlowPolicy`]."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils.torch_utils import randn_tensor
from peft import PeftModel
from peft.utils import get_peft_model_state_dict

from ..schedulers import FlowMatchSDEScheduler


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def update_with_weights(digest: "hashlib._Hash", model: torch.nn.Module) -> None:
    """
    Feed a hash with the shape of every parameter, its start and the sum of its bits as an integer, which is exact in any order
    and moves with any of its values, such as the embedding of a single token.
    """
    for parameter in model.parameters():
        parameter = parameter.detach()
        bits = parameter.view(_INTEGERS[parameter.element_size()]).sum(dtype=torch.int64).item()
        digest.update(f"{tuple(parameter.shape)} {bits}".encode())
        digest.update(parameter.flatten()[:16].float().cpu().numpy().tobytes())


@dataclass
class PromptEmbeddings:
    """
    Encoded prompts, as the transformer takes them.

    Args:
        prompt_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, dim)`):
            Embeddings of the tokens.
        pooled_prompt_embeds (`torch.Tensor` of shape `(batch_size, pooled_dim)`, *optional*):
            Pooled embeddings, for the families that have them.
    """

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor | None = None

    def _map(self, function) -> "PromptEmbeddings":
        pooled = self.pooled_prompt_embeds
        return PromptEmbeddings(function(self.prompt_embeds), None if pooled is None else function(pooled))

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, index: slice | list[int] | torch.Tensor) -> "PromptEmbeddings":
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "PromptEmbeddings":
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype))

    def repeat(self, times: int) -> "PromptEmbeddings":
        """`[a, b] -> [a, b, a, b]`."""
        return self._map(lambda tensor: tensor.repeat(times, *[1] * (tensor.ndim - 1)))

    def repeat_interleave(self, times: int) -> "PromptEmbeddings":
        """`[a, b] -> [a, a, b, b]`."""
        return self._map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def expand(self, batch_size: int) -> "PromptEmbeddings":
        """One prompt, as a view of `batch_size` of them."""
        return self._map(lambda tensor: tensor.expand(batch_size, *tensor.shape[1:]))

    @staticmethod
    def cat(parts: Sequence["PromptEmbeddings"]) -> "PromptEmbeddings":
        pooled = [part.pooled_prompt_embeds for part in parts]
        return PromptEmbeddings(
            torch.cat([part.prompt_embeds for part in parts]), None if pooled[0] is None else torch.cat(pooled)
        )


class FlowPolicy(ABC):
    """
    A text-to-image or text-to-video flow-matching pipeline, seen as a policy.

    A policy holds what differs between model families and nothing of an algorithm. The network is always passed to
    [`~FlowPolicy.velocity`], because the trainer wraps it (PEFT, accelerate); `policy.transformer` is the bare one.
    Latents are the normalised ones that the transformer sees, in float32.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Pipeline with all of its components.
    """

    modality: Literal["image", "video"]
    max_sequence_length: int  # tokens of a prompt, unless told otherwise
    lora_target_modules: list[str]
    revision: str | None = None  # of the repository, and variant of its files, that were asked for
    variant: str | None = None

    def __init__(self, pipeline: DiffusionPipeline):
        self.pipeline = pipeline
        self.name_or_path = str(pipeline.config["_name_or_path"] or "") if "_name_or_path" in pipeline.config else ""

    @property
    def transformer(self) -> ModelMixin:
        return self.pipeline.transformer

    @property
    def vae(self) -> ModelMixin:
        return self.pipeline.vae

    @property
    @abstractmethod
    def text_encoder_names(self) -> list[str]:
        """Components that encode text."""

    @abstractmethod
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

    @abstractmethod
    def encode_prompts(self, prompts: list[str], max_sequence_length: int | None = None) -> PromptEmbeddings:
        """
        Run the text encoders on `prompts`. Needs them loaded, see [`~FlowPolicy.unload_text_encoders`].

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

    @abstractmethod
    def forward(
        self, model: torch.nn.Module, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: PromptEmbeddings
    ) -> torch.Tensor:
        """Call `model` once, without guidance. `timestep` is float32 in [0, 1000]."""

    @abstractmethod
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

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents to pixels, the other way round: the shapes and ranges are those of [`~FlowPolicy.encode`]."""

    def velocity(
        self,
        model: torch.nn.Module,
        latents: torch.Tensor,
        sigma: float | torch.Tensor,
        prompt_embeds: PromptEmbeddings,
        negative_prompt_embeds: PromptEmbeddings | None = None,
        guidance_scale: float = 1.0,
    ) -> torch.Tensor:
        """
        Velocity x1 - x0 that `model` predicts, with classifier-free guidance in one batched forward.

        Args:
            model (`torch.nn.Module`): the family's transformer, wrapped or not.
            latents (`torch.Tensor` of shape `(batch_size, *latent_shape)`): noisy latents, float32.
            sigma (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`): their noise levels in [0, 1].
            prompt_embeds ([`PromptEmbeddings`]): one prompt per latent.
            negative_prompt_embeds ([`PromptEmbeddings`], *optional*):
                one per latent, or a single one for all; needed if `guidance_scale > 1`.
            guidance_scale (`float`, *optional*, defaults to `1.0`): no guidance if at most 1.

        Returns:
            `torch.Tensor`: velocity, float32, shaped as `latents`.
        """
        batch_size = len(latents)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device)
        timestep = (sigma * 1000).expand(batch_size)
        if guidance_scale <= 1:
            return self.forward(model, latents, timestep, prompt_embeds).float()
        if negative_prompt_embeds is None:
            raise ValueError(f"`guidance_scale={guidance_scale}` needs `negative_prompt_embeds`.")
        if len(negative_prompt_embeds) == 1:
            negative_prompt_embeds = negative_prompt_embeds.expand(batch_size)
        both = PromptEmbeddings.cat([negative_prompt_embeds, prompt_embeds])
        output = self.forward(model, torch.cat([latents] * 2), timestep.repeat(2), both).float()
        unconditional, conditional = output.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    @torch.no_grad()
    def sample(
        self,
        model: torch.nn.Module,
        prompt_embeds: PromptEmbeddings,
        negative_prompt_embeds: PromptEmbeddings | None = None,
        *,
        latent_shape: tuple[int, ...],
        num_inference_steps: int,
        guidance_scale: float,
        generators: list[torch.Generator],
    ) -> torch.Tensor:
        """
        Deterministic sampling, the same as the diffusers pipeline's with `output_type="latent"`.

        Args:
            latent_shape (`tuple[int, ...]`): shape of one latent.
            num_inference_steps (`int`): number of sampling steps.
            guidance_scale (`float`): scale of classifier-free guidance, none if at most 1.
            generators (`list[torch.Generator]`): one per prompt, for its initial noise.

        Returns:
            `torch.Tensor` of shape `(batch_size, *latent_shape)`, float32.
        """
        device = prompt_embeds.prompt_embeds.device
        scheduler = self.build_scheduler(num_inference_steps, latent_shape, device)
        latents = randn_tensor((len(prompt_embeds), *latent_shape), generator=generators, device=device)
        for index in range(num_inference_steps):
            velocity = self.velocity(
                model, latents, scheduler.sigma(index), prompt_embeds, negative_prompt_embeds, guidance_scale
            )
            latents = scheduler.ode_step(latents, velocity, index)
        return latents

    @torch.no_grad()
    def invert(
        self,
        model: torch.nn.Module,
        latents: torch.Tensor,
        prompt_embeds: PromptEmbeddings,
        *,
        num_inference_steps: int,
        first_index: int = 0,
    ) -> torch.Tensor:
        """
        The way back of [`~FlowPolicy.sample`], from clean latents to the noise that they would come from: Euler steps of
        the ODE without guidance, each with the velocity at its clean end.

        Args:
            model (`torch.nn.Module`): the family's transformer, wrapped or not.
            latents (`torch.Tensor` of shape `(batch_size, *latent_shape)`): clean latents, float32.
            prompt_embeds ([`PromptEmbeddings`]): one prompt per latent.
            num_inference_steps (`int`): number of sampling steps.
            first_index (`int`, *optional*, defaults to `0`): where to stop. 0 is pure noise.

        Returns:
            `torch.Tensor` of shape `(num_inference_steps - first_index, batch_size, *latent_shape)`: latents at the noise
            levels `sigmas[first_index]`, ..., `sigmas[num_inference_steps - 1]` of the scheduler, float32.
        """
        scheduler = self.build_scheduler(num_inference_steps, tuple(latents.shape[1:]), latents.device)
        trajectory = []
        for index in reversed(range(first_index, num_inference_steps)):
            sigma = scheduler.sigma(index + 1)
            velocity = self.velocity(model, latents, sigma, prompt_embeds)
            latents = latents + (scheduler.sigma(index) - sigma) * velocity
            trajectory.append(latents)
        return torch.stack(trajectory[::-1])

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
        config = {key: value for key, value in self.transformer.config.items() if not key.startswith("_")}
        digest = hashlib.sha256(f"{json.dumps(config, sort_keys=True, default=str)} {self.transformer.dtype}".encode())
        update_with_weights(digest, self.transformer)
        return digest.hexdigest()[:16]

    def vae_fingerprint(self) -> str:
        """Short hash of the VAE: its configuration and the signs of its weights, which no change of dtype moves."""
        config = {key: value for key, value in self.vae.config.items() if not key.startswith("_")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().signbit().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save_lora_weights(
        self, save_directory: str | Path, model: PeftModel, state_dict: dict[str, torch.Tensor] | None = None
    ) -> None:
        """
        Write `pytorch_lora_weights.safetensors` for the pipeline's `load_lora_weights`, with the adapter's metadata,
        without which `lora_alpha` is lost.

        Args:
            save_directory (`str` or `Path`): where to.
            model ([`~peft.PeftModel`]): the network.
            state_dict (`dict[str, torch.Tensor]`, *optional*): its weights, where each process has a part of them only.
        """
        if state_dict is not None:
            state_dict = {name.removeprefix("base_model.model."): tensor for name, tensor in state_dict.items()}
        self.pipeline.save_lora_weights(
            save_directory,
            transformer_lora_layers=get_peft_model_state_dict(
                model.get_base_model(), state_dict=state_dict, adapter_name="default"
            ),
            **_collate_lora_metadata({"transformer": model}),
        )
