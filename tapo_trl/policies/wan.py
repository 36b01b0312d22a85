# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Wan2.1 text-to-video."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

from ..schedulers import FlowMatchSDEScheduler
from .base import FlowPolicy, PromptEmbeddings


class WanPolicy(FlowPolicy):
    """
    [`~diffusers.WanPipeline`] of Wan2.1 (1.3B and 14B) as a policy.

    It samples with flow-matching Euler steps, whatever the pipeline's own scheduler: the UniPC solver that Wan ships
    with is multistep and has no transition density. For the same videos from a pipeline, give it
    `pipeline.scheduler = policy.build_scheduler(num_inference_steps, latent_shape)`.
    """

    modality = "video"
    max_sequence_length = 512
    lora_target_modules = ["to_q", "to_k", "to_v", "to_out.0"]
    text_encoder_names = ["text_encoder"]

    def __init__(self, pipeline: WanPipeline):
        super().__init__(pipeline)
        transformer, vae = pipeline.transformer, pipeline.vae
        found = {
            "a second transformer": pipeline.transformer_2 is not None or transformer is None,
            "`boundary_ratio`": pipeline.config.boundary_ratio is not None,
            "`expand_timesteps`": pipeline.config.expand_timesteps,
            "an image condition": transformer is not None and transformer.config.in_channels != vae.config.z_dim,
        }
        if any(found.values()):
            raise ValueError(
                "Only Wan2.1 text-to-video is supported, but this pipeline, of Wan2.2 or image-to-video, has "
                f"{', '.join(name for name, value in found.items() if value)}. Use for example "
                "`Wan-AI/Wan2.1-T2V-1.3B-Diffusers`."
            )
        scheduler = pipeline.scheduler
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not scheduler.config.get("use_flow_sigmas"):
            raise ValueError(
                f"The pipeline's scheduler, a `{type(scheduler).__name__}`, is not one of flow matching: it needs "
                "`use_flow_sigmas=True` and a `flow_shift`, or must be a `FlowMatchEulerDiscreteScheduler`."
            )

    def build_scheduler(
        self, num_inference_steps: int, latent_shape: tuple[int, ...], device: torch.device | str = "cpu", **overrides
    ) -> FlowMatchSDEScheduler:
        config = self.pipeline.scheduler.config
        if isinstance(self.pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            scheduler = FlowMatchSDEScheduler.from_config(config, **overrides)
        else:
            # `from_config` would drop `flow_shift`.
            scheduler = FlowMatchSDEScheduler(config.num_train_timesteps, shift=config.flow_shift, **overrides)
        scheduler.set_timesteps(num_inference_steps, device=device)
        return scheduler

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], max_sequence_length: int | None = None) -> PromptEmbeddings:
        if self.pipeline.text_encoder is None:
            raise ValueError("The pipeline has no text encoder (any more): encode prompts before it is unloaded.")
        prompt_embeds = self.pipeline._get_t5_prompt_embeds(
            prompts,
            max_sequence_length=max_sequence_length or self.max_sequence_length,
            device=self.pipeline.text_encoder.device,
        )
        return PromptEmbeddings(prompt_embeds)

    def latent_shape(self, height: int, width: int, num_frames: int | None = None) -> tuple[int, ...]:
        if num_frames is None:
            raise ValueError("`num_frames` is missing: Wan makes videos, for example of 81 frames.")
        space, time = self.pipeline.vae_scale_factor_spatial, self.pipeline.vae_scale_factor_temporal
        _, *patch_size = self.transformer.config.patch_size
        multiples = [space * patch for patch in patch_size]

        nearest = [max(round(size / m), 1) * m for size, m in zip((height, width), multiples, strict=True)]
        nearest.append(max(round((num_frames - 1) / time), 0) * time + 1)
        if [height, width, num_frames] != nearest:
            raise ValueError(
                f"`height` and `width` must be multiples of {multiples[0]} and {multiples[1]} pixels, and `num_frames` "
                f"one more than a multiple of {time}, but they are {height}, {width} and {num_frames}. The nearest that "
                f"fit are {nearest[0]}, {nearest[1]} and {nearest[2]}."
            )
        return (self.transformer.config.in_channels, (num_frames - 1) // time + 1, height // space, width // space)

    def forward(
        self, model: torch.nn.Module, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: PromptEmbeddings
    ) -> torch.Tensor:
        dtype = self.transformer.dtype
        return model(
            hidden_states=latents.to(dtype),
            timestep=timestep,
            encoder_hidden_states=prompt_embeds.prompt_embeds.to(dtype),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        _, _, num_frames, height, width = pixels.shape
        self.latent_shape(height, width, num_frames)  # the VAE would drop frames that are too many
        pixels = (pixels * 2 - 1).to(self.vae.device, self.vae.dtype)
        with self._vae_precision():
            latents = self.vae.encode(pixels).latent_dist.mode().float()
        mean, std = self._latent_statistics(latents.device)
        return (latents - mean) / std

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = self._latent_statistics(latents.device)
        latents = latents * std + mean
        with self._vae_precision():
            pixels = self.vae.decode(latents.to(self.vae.device, self.vae.dtype), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def _latent_statistics(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the VAE's latents, per channel."""
        config = self.vae.config
        return tuple(
            torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
