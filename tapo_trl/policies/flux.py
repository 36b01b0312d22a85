# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""FLUX.1."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from .base import Defaults, PromptEmbeddings
from .image import ImagePolicy, linear_sigmas, pack, unpack


GUIDANCE_SCALE = 3.5

# What FLUX.1's autoencoder is, which other families use, too. Scaling and shift: `scripts/convert_flux_to_diffusers.py` of
# diffusers says nothing of them; recalled from the released repository, and not compared with it.
FLUX_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}


class FluxPolicy(ImagePolicy):
    """
    [`~diffusers.FluxPipeline`] as a policy: FLUX.1-dev, and models with its architecture.

    `guidance_scale` is an input of the transformer, on one forward. Prompts are padded to `max_sequence_length`, and the padding
    is attended to: another length is another model.
    """

    guidance = "embedded"
    max_sequence_length = 512
    text_encoder_names = ["text_encoder", "text_encoder_2"]
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
    licenses = {
        "black-forest-labs/FLUX.1-dev": ("other", "flux-1-dev-non-commercial-license"),
        "black-forest-labs/FLUX.1-Krea-dev": ("other", "flux-1-dev-non-commercial-license"),
        "black-forest-labs/FLUX.1-schnell": ("apache-2.0", None),
    }
    known_configs = {
        # `scripts/convert_flux_to_diffusers.py` of diffusers makes the transformer with the defaults of its class. That dev
        # has embedded guidance is what its pipeline reads. The scheduler is recalled from the released repository.
        "black-forest-labs/FLUX.1-dev": {
            "transformer": ("FluxTransformer2DModel", {"guidance_embeds": True}),
            "vae": ("AutoencoderKL", FLUX_VAE),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
        },
    }

    def __init__(self, pipeline: FluxPipeline):
        super().__init__(pipeline)
        if not self.transformer.config.guidance_embeds:  # FLUX.1-schnell
            self.guidance = "none"

    @property
    def defaults(self) -> Defaults:
        return Defaults(height=1024, width=1024, num_inference_steps=28, guidance_scale=GUIDANCE_SCALE)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], max_sequence_length: int | None = None) -> PromptEmbeddings:
        length = max_sequence_length or self.max_sequence_length
        prompt_embeds, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, None, device=self.encoder_device, max_sequence_length=length
        )
        return PromptEmbeddings(prompt_embeds, pooled_prompt_embeds)

    def prompt_shapes(self, max_sequence_length):
        config = self.transformer.config
        return {
            "prompt_embeds": (max_sequence_length, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def sigmas(self, num_inference_steps):
        return linear_sigmas(num_inference_steps)

    @staticmethod
    def model_inputs(config, latents, sigma, prompts, guidance_scale=None):
        rows, columns = (torch.arange(side // 2, device=latents.device) for side in latents.shape[2:])
        image_ids = torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns).float()
        inputs = {
            "hidden_states": pack(latents),
            "timestep": sigma,
            "encoder_hidden_states": prompts.prompt_embeds,
            "pooled_projections": prompts.pooled_prompt_embeds,
            "img_ids": image_ids,
            "txt_ids": image_ids.new_zeros(prompts.prompt_embeds.shape[1], 3),
        }
        if config["guidance_embeds"]:
            inputs["guidance"] = torch.full_like(sigma, GUIDANCE_SCALE if guidance_scale is None else guidance_scale)
        return inputs

    @staticmethod
    def velocity_of(config, output, latents):
        return unpack(output, latents)

    @classmethod
    def tiny(cls, seed: int = 0, **transformer_config) -> FluxPipeline:
        """FLUX.1-dev's architecture: double and single blocks, embedded guidance, latents that are packed."""
        from .tiny import spread, tiny_clip, tiny_clip_tokenizer, tiny_flux_vae, tiny_t5_tokenizer, tiny_umt5

        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = tiny_clip_tokenizer(), tiny_t5_tokenizer()
        transformer = FluxTransformer2DModel(
            **{
                "in_channels": 16,
                "num_layers": 2,
                "num_single_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "axes_dims_rope": (4, 6, 6),
                "joint_attention_dim": 24,
                "pooled_projection_dim": 8,
                "guidance_embeds": True,
            }
            | transformer_config
        )
        spread(transformer)
        return FluxPipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=tiny_flux_vae(),
            text_encoder=CLIPTextModel(tiny_clip(tokenizer, 8).config).eval(),
            tokenizer=tokenizer,
            text_encoder_2=tiny_umt5(tokenizer_2, 24),
            tokenizer_2=tokenizer_2,
        )
