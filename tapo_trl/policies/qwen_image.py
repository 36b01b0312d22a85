# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Qwen-Image."""

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from .base import Defaults, PromptEmbeddings
from .image import ImagePolicy, linear_sigmas, pack, unpack


LONGEST_PROMPT = 1024  # tokens, which the pipeline truncates to

# Recalled from the released repository, copies of which agree, and not compared with it
QWEN_SCHEDULER = {
    "base_shift": 0.5,
    "base_image_seq_len": 256,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "use_dynamic_shifting": True,
}


class QwenImagePolicy(ImagePolicy):
    """
    [`~diffusers.QwenImagePipeline`] as a policy: Qwen-Image, for text to image.

    `guidance_scale` is what the pipeline calls `true_cfg_scale`. The guided velocity is scaled, token by token, to the norm of the
    conditional one, so it is not linear in the two. Prompts have their own length and a mask.
    """

    max_sequence_length = 512
    text_encoder_names = ["text_encoder"]
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
    licenses = {"Qwen/Qwen-Image": ("apache-2.0", None)}
    known_configs = {
        # The defaults of the classes in diffusers
        "Qwen/Qwen-Image": {
            "transformer": ("QwenImageTransformer2DModel", {}),
            "vae": ("AutoencoderKLQwenImage", {}),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", QWEN_SCHEDULER),
        },
    }

    @property
    def latent_channels(self) -> int:
        return self.vae.config.z_dim

    @property
    def defaults(self) -> Defaults:
        return Defaults(height=1024, width=1024, num_inference_steps=50, guidance_scale=4.0, negative_prompt=" ")

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], max_sequence_length: int | None = None) -> PromptEmbeddings:
        length = max_sequence_length or self.max_sequence_length
        if length > LONGEST_PROMPT:
            raise ValueError(f"`max_sequence_length` must be at most {LONGEST_PROMPT} for Qwen-Image, got {length}.")
        embeds, mask = self.pipeline.encode_prompt(prompts, self.encoder_device, max_sequence_length=length)
        if mask is None:  # all tokens count
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return PromptEmbeddings(embeds, prompt_embeds_mask=mask)

    def prompt_shapes(self, max_sequence_length):
        return {"prompt_embeds": (max_sequence_length, self.transformer.config.joint_attention_dim)}

    def sigmas(self, num_inference_steps):
        return linear_sigmas(num_inference_steps)

    @staticmethod
    def model_inputs(config, latents, sigma, prompts, guidance_scale=None):
        height, width = latents.shape[2:]
        mask = prompts.tensors.get("prompt_embeds_mask")
        return {
            "hidden_states": pack(latents),
            "timestep": sigma,
            "encoder_hidden_states": prompts.prompt_embeds,
            # As the pipeline does: some kernels of attention refuse masks, and the others round differently with one
            "encoder_hidden_states_mask": None if mask is None or mask.all() else mask,
            "img_shapes": [[(1, height // 2, width // 2)]] * len(latents),
        }

    @staticmethod
    def velocity_of(config, output, latents):
        return unpack(output, latents)

    def guide(self, conditional, unconditional, guidance_scale):
        guided = pack(super().guide(conditional, unconditional, guidance_scale))
        norm = torch.linalg.vector_norm(pack(conditional), dim=-1, keepdim=True)
        return unpack(guided * (norm / torch.linalg.vector_norm(guided, dim=-1, keepdim=True)), conditional)

    # The VAE is one of videos: an image is one frame

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().encode(pixels.unsqueeze(2))

    def decode(self, latents: torch.Tensor, with_gradient: bool = False) -> torch.Tensor:
        return super().decode(latents, with_gradient)[:, :, 0]

    def to_latents(self, encoded: torch.Tensor) -> torch.Tensor:
        mean, std = self._latent_statistics(encoded.device)
        return ((encoded - mean) / std)[:, :, 0]

    def from_latents(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = self._latent_statistics(latents.device)
        return latents.unsqueeze(2) * std + mean

    def _latent_statistics(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the VAE's latents, per channel."""
        config = self.vae.config
        return tuple(
            torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )

    @classmethod
    def tiny(cls, seed: int = 0, **transformer_config) -> QwenImagePipeline:
        """Qwen-Image's architecture: double blocks, a mask of the prompt, an autoencoder of videos."""
        from .tiny import spread, tiny_byte_tokenizer, tiny_qwen25_vl

        torch.manual_seed(seed)
        template = QwenImagePipeline(*[None] * 5)
        prefix, length = template.prompt_template_encode.split("{}")[0], template.prompt_template_encode_start_idx
        tokenizer = tiny_byte_tokenizer(prefix, length)
        transformer = QwenImageTransformer2DModel(
            **{
                "in_channels": 16,
                "out_channels": 4,
                "num_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "axes_dims_rope": (4, 6, 6),
                "joint_attention_dim": 16,
            }
            | transformer_config
        )
        spread(transformer)
        vae = AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            num_res_blocks=1,
            latents_mean=[-0.76, -0.71, 0.11, 0.97],
            latents_std=[2.82, 1.45, 2.33, 1.22],
        )
        return QwenImagePipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(**QWEN_SCHEDULER),
            vae=vae.eval(),
            text_encoder=tiny_qwen25_vl(tokenizer),
            tokenizer=tokenizer,
        )
