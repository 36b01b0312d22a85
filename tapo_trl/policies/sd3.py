# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Stable Diffusion 3 and 3.5."""

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

from ..schedulers import FlowMatchSDEScheduler
from .base import FlowPolicy, PromptEmbeddings


class SD3Policy(FlowPolicy):
    """
    [`~diffusers.StableDiffusion3Pipeline`] as a policy. Any of its three text encoders may be absent (`None`): zeros
    then stand in for its embeddings, as diffusers does for T5.
    """

    modality = "image"
    max_sequence_length = 256
    lora_target_modules = [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    ]
    text_encoder_names = ["text_encoder", "text_encoder_2", "text_encoder_3"]

    def __init__(self, pipeline: StableDiffusion3Pipeline):
        super().__init__(pipeline)
        if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"The pipeline's scheduler is a `{type(pipeline.scheduler).__name__}`; a "
                "`FlowMatchEulerDiscreteScheduler` is needed, since steps of a multistep method have no density."
            )

    def build_scheduler(
        self, num_inference_steps: int, latent_shape: tuple[int, ...], device: torch.device | str = "cpu", **overrides
    ) -> FlowMatchSDEScheduler:
        config = self.pipeline.scheduler.config
        scheduler = FlowMatchSDEScheduler.from_config(config, **overrides)
        mu = None
        if config.use_dynamic_shifting:
            patch_size = self.transformer.config.patch_size
            _, height, width = latent_shape
            mu = calculate_shift(
                (height // patch_size) * (width // patch_size),
                config.base_image_seq_len,
                config.max_image_seq_len,
                config.base_shift,
                config.max_shift,
            )
        scheduler.set_timesteps(num_inference_steps, device=device, mu=mu)
        return scheduler

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], max_sequence_length: int | None = None) -> PromptEmbeddings:
        max_sequence_length = max_sequence_length or self.max_sequence_length
        encoders = [self.pipeline.components[name] for name in self.text_encoder_names]
        if encoders == [None, None, None]:
            raise ValueError("The pipeline has no text encoders (any more): encode prompts before they are unloaded.")
        reference = next(encoder for encoder in encoders if encoder is not None)

        clip = [self._encode_clip(prompts, encoder, index) for index, encoder in enumerate(encoders[:2])]
        pooled_dim = self.transformer.config.pooled_projection_dim
        present = [embeds for embeds in clip if embeds is not None]
        for index, embeds in enumerate(clip):
            if embeds is None:
                width = pooled_dim - present[0][1].shape[-1] if present else pooled_dim // 2
                clip[index] = (
                    torch.zeros(len(prompts), self.pipeline.tokenizer_max_length, width),
                    torch.zeros(len(prompts), width),
                )
        clip = [[part.to(reference.device, reference.dtype) for part in embeds] for embeds in clip]
        (prompt_embeds_1, pooled_1), (prompt_embeds_2, pooled_2) = clip
        clip_embeds = torch.cat([prompt_embeds_1, prompt_embeds_2], dim=-1)

        t5_embeds = self.pipeline._get_t5_prompt_embeds(
            prompts, max_sequence_length=max_sequence_length, device=reference.device, dtype=reference.dtype
        )
        clip_embeds = F.pad(clip_embeds, (0, t5_embeds.shape[-1] - clip_embeds.shape[-1]))
        return PromptEmbeddings(torch.cat([clip_embeds, t5_embeds], dim=-2), torch.cat([pooled_1, pooled_2], dim=-1))

    def _encode_clip(self, prompts: list[str], encoder, index: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        if encoder is None:
            return None
        tokenizer = (self.pipeline.tokenizer, self.pipeline.tokenizer_2)[index]
        tokens = tokenizer(
            prompts,
            padding="max_length",
            max_length=self.pipeline.tokenizer_max_length,
            truncation=True,
            return_tensors="pt",
        )
        output = encoder(tokens.input_ids.to(encoder.device), output_hidden_states=True)
        return output.hidden_states[-2], output[0]

    def latent_shape(self, height: int, width: int, num_frames: int | None = None) -> tuple[int, ...]:
        if num_frames is not None:
            raise ValueError(f"`num_frames={num_frames}` was given, but `{self.name_or_path}` makes images.")
        scale, patch_size = self.pipeline.vae_scale_factor, self.transformer.config.patch_size
        multiple = scale * patch_size
        if height % multiple or width % multiple or height <= 0 or width <= 0:
            raise ValueError(
                f"The resolution must be a multiple of {multiple} pixels (VAE factor {scale} x patch size "
                f"{patch_size}), got {height} x {width}."
            )
        largest = self.transformer.config.pos_embed_max_size * multiple
        if max(height, width) > largest:
            raise ValueError(f"The transformer has positions for at most {largest} pixels, got {height} x {width}.")
        return (self.transformer.config.in_channels, height // scale, width // scale)

    def forward(
        self, model: torch.nn.Module, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: PromptEmbeddings
    ) -> torch.Tensor:
        dtype = self.transformer.dtype
        return model(
            hidden_states=latents.to(dtype),
            timestep=timestep,
            encoder_hidden_states=prompt_embeds.prompt_embeds.to(dtype),
            pooled_projections=prompt_embeds.pooled_prompt_embeds.to(dtype),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = (pixels * 2 - 1).to(self.vae.device, self.vae.dtype)
        with self._vae_precision():
            latents = self.vae.encode(pixels).latent_dist.mode().float()
        return (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        with self._vae_precision():
            pixels = self.vae.decode(latents.to(self.vae.device, self.vae.dtype), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)
