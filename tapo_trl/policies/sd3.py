# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Stable Diffusion 3 and 3.5."""

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from .base import Defaults, FlowPolicy, PromptEmbeddings


# `scripts/convert_sd3_to_diffusers.py` of diffusers: 64 channels per head, as many heads as layers; medium has positions of 384, a second
# attention in the first 13 blocks and the normalisation of "sd3.5 2b"; the autoencoder on SDXL's. Positions of large: recalled.
_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}
_LARGE = _MEDIUM | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [],
}
_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}


class SD3Policy(FlowPolicy):
    """
    [`~diffusers.StableDiffusion3Pipeline`] as a policy. Any of its three text encoders may be absent (`None`): zeros
    then stand in for its embeddings, as diffusers does for T5.
    """

    modality = "image"
    comfyui_knows_layers = True
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
    licenses = {"stabilityai/stable-diffusion-3": ("other", "stabilityai-ai-community")}
    known_configs = {
        f"stabilityai/stable-diffusion-3.5-{size}": {
            "transformer": ("SD3Transformer2DModel", transformer),
            "vae": ("AutoencoderKL", _VAE),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        }
        for size, transformer in (("medium", _MEDIUM), ("large", _LARGE))
    }

    def __init__(self, pipeline: StableDiffusion3Pipeline):
        super().__init__(pipeline)
        if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"The pipeline's scheduler is a `{type(pipeline.scheduler).__name__}`; a "
                "`FlowMatchEulerDiscreteScheduler` is needed, since steps of a multistep method have no density."
            )

    @property
    def defaults(self) -> Defaults:
        size = self.transformer.config.sample_size * self.pipeline.vae_scale_factor
        return Defaults(height=size, width=size, num_inference_steps=40, guidance_scale=4.5)  # of SD3.5-medium

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

    def num_tokens(self, latent_shape, max_sequence_length: int = 0) -> tuple[int, int]:
        return super().num_tokens(latent_shape, self.pipeline.tokenizer_max_length + max_sequence_length)

    def prompt_shapes(self, max_sequence_length):
        config, length = self.transformer.config, self.pipeline.tokenizer_max_length + max_sequence_length
        return {
            "prompt_embeds": (length, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    @staticmethod
    def model_inputs(config, latents, sigma, prompts, guidance_scale=None):
        return {
            "hidden_states": latents,
            "timestep": sigma * 1000,
            "encoder_hidden_states": prompts.prompt_embeds,
            "pooled_projections": prompts.pooled_prompt_embeds,
        }

    @classmethod
    def tiny(cls, seed: int = 0, **transformer_config) -> StableDiffusion3Pipeline:
        """SD3.5's architecture (qk-norm, dual attention layers, a context-only last block) at 32 x 32 pixels."""
        from .tiny import spread, tiny_clip, tiny_clip_tokenizer

        torch.manual_seed(seed)
        tokenizer = tiny_clip_tokenizer()
        transformer = SD3Transformer2DModel(
            **{
                "sample_size": 8,
                "patch_size": 2,
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 3,
                "attention_head_dim": 8,
                "num_attention_heads": 2,
                "joint_attention_dim": 24,
                "caption_projection_dim": 16,
                "pooled_projection_dim": 20,
                "pos_embed_max_size": 8,
                "dual_attention_layers": (0,),
                "qk_norm": "rms_norm",
            }
            | transformer_config
        )
        spread(transformer)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            sample_size=32,
            scaling_factor=1.5,
            shift_factor=0.06,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        return StableDiffusion3Pipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae.eval(),
            text_encoder=tiny_clip(tokenizer, 8),
            tokenizer=tokenizer,
            text_encoder_2=tiny_clip(tokenizer, 12),
            tokenizer_2=tiny_clip_tokenizer(),
            text_encoder_3=None,
            tokenizer_3=None,
        )
