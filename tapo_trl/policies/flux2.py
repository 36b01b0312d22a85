# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""FLUX.2."""

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from transformers import Qwen3ForCausalLM

from .base import Defaults, PromptEmbeddings
from .image import ImagePolicy, linear_sigmas


GUIDANCE_SCALE = 4.0

# As in `diffusers/FLUX.2-dev-bnb-4bit`, a repository of the authors of diffusers
_SCHEDULER = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True})
_VAE = ("AutoencoderKLFlux2", {})  # the defaults of its class in diffusers


class Flux2Policy(ImagePolicy):
    """
    [`~diffusers.Flux2Pipeline`] as a policy: FLUX.2-dev, for text to image.

    `guidance_scale` is an input of the transformer, on one forward. Prompts are padded to `max_sequence_length`, and the padding
    is attended to: another length is another model. Latents are the VAE's in patches of 2 x 2, normalised by its running
    statistics. The shift of the noise levels depends on their number and on the size.
    """

    guidance = "embedded"
    max_sequence_length = 512
    text_encoder_names = ["text_encoder"]
    licenses = {"black-forest-labs/FLUX.2-dev": ("other", "flux-dev-non-commercial-license")}
    known_configs = {
        "black-forest-labs/FLUX.2-dev": {
            "transformer": ("Flux2Transformer2DModel", {}),  # the defaults of its class in diffusers
            "vae": _VAE,
            "scheduler": _SCHEDULER,
        },
    }

    @property
    def lora_target_modules(self) -> list[str]:
        """Attention projections. Those behind single blocks have the name of a `ModuleList` elsewhere: they go by number."""
        double = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
        count = self.transformer.config.num_single_layers
        return [
            *double,
            "to_qkv_mlp_proj",
            *(f"single_transformer_blocks.{index}.attn.to_out" for index in range(count)),
        ]

    @property
    def defaults(self) -> Defaults:
        return Defaults(height=1024, width=1024, num_inference_steps=50, guidance_scale=GUIDANCE_SCALE)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], max_sequence_length: int | None = None) -> PromptEmbeddings:
        length = max_sequence_length or self.max_sequence_length
        embeds, _ = self.pipeline.encode_prompt(prompts, self.encoder_device, max_sequence_length=length)
        return PromptEmbeddings(embeds)

    def prompt_shapes(self, max_sequence_length):
        return {"prompt_embeds": (max_sequence_length, self.transformer.config.joint_attention_dim)}

    def latent_shape(self, height, width, num_frames=None):
        channels, rows, columns = super().latent_shape(height, width, num_frames)
        return 4 * channels, rows // 2, columns // 2

    def num_tokens(self, latent_shape, max_sequence_length=0):
        _, rows, columns = latent_shape
        return rows * columns, max_sequence_length

    def sigmas(self, num_inference_steps):
        return linear_sigmas(num_inference_steps)

    def mu(self, num_inference_steps, latent_shape):
        if not self.pipeline.scheduler.config.use_dynamic_shifting:
            return None
        return compute_empirical_mu(self.num_tokens(latent_shape)[0], num_inference_steps)

    @staticmethod
    def model_inputs(config, latents, sigma, prompts, guidance_scale=None):
        rows, columns = (torch.arange(side, device=latents.device) for side in latents.shape[2:])
        zero, tokens = rows[:1] * 0, torch.arange(prompts.prompt_embeds.shape[1], device=latents.device)
        inputs = {
            "hidden_states": latents.flatten(2).transpose(1, 2),
            "timestep": sigma,
            "encoder_hidden_states": prompts.prompt_embeds,
            "img_ids": torch.cartesian_prod(zero, rows, columns, zero).float(),
            "txt_ids": torch.cartesian_prod(zero, zero, zero, tokens).float(),
        }
        if config["guidance_embeds"]:
            inputs["guidance"] = torch.full_like(sigma, GUIDANCE_SCALE if guidance_scale is None else guidance_scale)
        return inputs

    @staticmethod
    def velocity_of(config, output, latents):
        return output.transpose(1, 2).unflatten(2, latents.shape[2:])

    def to_latents(self, encoded: torch.Tensor) -> torch.Tensor:
        mean, std = self._latent_statistics()
        return (F.pixel_unshuffle(encoded, 2) - mean) / std

    def from_latents(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = self._latent_statistics()
        return F.pixel_shuffle(latents * std + mean, 2)

    def _latent_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the VAE's latents, per channel of a patch."""
        norm, eps = self.vae.bn, self.vae.config.batch_norm_eps
        mean, std = norm.running_mean.float(), (norm.running_var.float() + eps).sqrt()
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    @classmethod
    def tiny(cls, seed: int = 0, **transformer_config) -> Flux2Pipeline:
        """FLUX.2-dev's architecture: double and single blocks, embedded guidance, three states of a Mistral side by side."""
        from .tiny import tiny_byte_tokenizer, tiny_mistral3

        torch.manual_seed(seed)
        system_message = Flux2Pipeline(*[None] * 5).system_message
        tokenizer = tiny_byte_tokenizer(f"<|im_start|>system\n{system_message}", 10)
        return cls._tiny(Flux2Pipeline, tiny_mistral3(tokenizer, 31), tokenizer, transformer_config)

    @staticmethod
    def _tiny(
        pipeline_class: type[DiffusionPipeline], text_encoder, tokenizer, transformer_config: dict
    ) -> DiffusionPipeline:
        from .tiny import spread

        transformer = Flux2Transformer2DModel(
            **{
                "in_channels": 16,
                "num_layers": 2,
                "num_single_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 3 * text_encoder.config.get_text_config().hidden_size,
                "timestep_guidance_channels": 32,
                "axes_dims_rope": (4, 4, 4, 4),
            }
            | transformer_config
        )
        spread(transformer)
        vae = AutoencoderKLFlux2(
            block_out_channels=(4,) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=32
        )
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
        return pipeline_class(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=vae.eval(),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )


class Flux2KleinPolicy(Flux2Policy):
    """
    [`~diffusers.Flux2KleinPipeline`] as a policy: FLUX.2-klein-base (4B, 9B). As [`Flux2Policy`], but for classifier-free guidance.

    The pipeline's own negative prompt is always `""`. Distilled models (FLUX.2-klein without "base") load, too: they have no
    guidance.
    """

    guidance = "classifier_free"
    licenses = {
        "black-forest-labs/FLUX.2-klein-base-4B": ("apache-2.0", None),
        "black-forest-labs/FLUX.2-klein-4B": ("apache-2.0", None),
        "black-forest-labs/FLUX.2-klein-base-9B": ("other", "flux-non-commercial-license"),
        "black-forest-labs/FLUX.2-klein-9B": ("other", "flux-non-commercial-license"),
    }
    # Sizes: `flux2.model.Klein4BParams` and `Klein9BParams` of the authors' code
    known_configs = {
        f"black-forest-labs/FLUX.2-klein-base-{name}": {
            "transformer": ("Flux2Transformer2DModel", {"guidance_embeds": False} | sizes),
            "vae": _VAE,
            "scheduler": _SCHEDULER,
        }
        for name, sizes in {
            "4B": {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
            "9B": {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
        }.items()
    }

    def __init__(self, pipeline: Flux2KleinPipeline):
        super().__init__(pipeline)
        if pipeline.config.is_distilled:
            self.guidance = "none"

    @classmethod
    def tiny(cls, seed: int = 0, **transformer_config) -> Flux2KleinPipeline:
        """FLUX.2-klein-base's architecture: as FLUX.2-dev's without embedded guidance, and a Qwen3."""
        from .tiny import tiny_byte_tokenizer, tiny_qwen3

        torch.manual_seed(seed)
        tokenizer = tiny_byte_tokenizer()
        text_encoder = tiny_qwen3(tokenizer, 28, Qwen3ForCausalLM)
        return cls._tiny(Flux2KleinPipeline, text_encoder, tokenizer, {"guidance_embeds": False} | transformer_config)
