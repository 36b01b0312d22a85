# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Wan2.1 and Wan2.2, text-to-video."""

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from .base import Defaults, PromptEmbeddings
from .video import VideoPolicy


# `scripts/convert_wan_to_diffusers.py` of diffusers: `get_transformer_config("Wan-T2V-1.3B")` and `("Wan-T2V-14B")`, whose
# autoencoder is `AutoencoderKLWan` with its defaults.
_TRANSFORMER = {
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "freq_dim": 256,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "text_dim": 4096,
}
_SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


# Recalled from the released repository, and not compared with it. Means and deviations of latents, which no dry run reads, are
# left out.
_WAN22_TI2V_VAE = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}


_14B = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}


def _wan21(**transformer: int) -> dict:
    return {
        "transformer": ("WanTransformer3DModel", _TRANSFORMER | transformer),
        "vae": ("AutoencoderKLWan", {}),
        "scheduler": ("UniPCMultistepScheduler", _SCHEDULER),
    }


class WanPolicy(VideoPolicy):
    """
    [`~diffusers.WanPipeline`] of Wan2.1 (1.3B and 14B) and Wan2.2, for text to video, as a policy. Of Wan2.2-T2V-A14B, which has
    two transformers, [`~FlowPolicy.from_pipeline`] makes a [`WanExpertsPolicy`].

    It samples with flow-matching Euler steps, whatever the pipeline's own scheduler: the UniPC solver that Wan ships
    with is multistep and has no transition density. For the same videos from a pipeline, give it
    `pipeline.scheduler = policy.build_scheduler(num_inference_steps, latent_shape)`.

    Wan2.2-TI2V-5B gives each token a timestep, which for text to video are all the same: the network gets one per video here.
    """

    max_sequence_length = 512
    lora_target_modules = ["to_q", "to_k", "to_v", "to_out.0"]
    text_encoder_names = ["text_encoder"]
    joint_text = False
    component_dtypes = {"vae": torch.float32}
    licenses = {"Wan-AI/": ("apache-2.0", None)}
    known_configs = {
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _wan21(num_attention_heads=12, num_layers=30, ffn_dim=8960),
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": _wan21(**_14B),
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers": {
            "transformer": (
                "WanTransformer3DModel",
                _TRANSFORMER
                | {
                    "in_channels": 48,
                    "out_channels": 48,
                    "num_attention_heads": 24,
                    "num_layers": 30,
                    "ffn_dim": 14336,
                },
            ),
            "vae": ("AutoencoderKLWan", _WAN22_TI2V_VAE),
            "scheduler": ("UniPCMultistepScheduler", _SCHEDULER | {"flow_shift": 5.0}),
        },
        # Two transformers of Wan2.1's size. Boundary and shift are recalled, and not compared with the repository.
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _wan21(**_14B)
        | {
            "transformer_2": ("WanTransformer3DModel", _TRANSFORMER | _14B),
            "pipeline": ("WanPipeline", {"boundary_ratio": 0.875}),
        },
    }

    def __init__(self, pipeline: WanPipeline):
        super().__init__(pipeline)
        transformer, vae = pipeline.transformer, pipeline.vae
        experts = (transformer, pipeline.transformer_2, pipeline.config.boundary_ratio)
        given = sum(part is not None for part in experts)
        if transformer is None or given == 2:
            raise ValueError(
                "A Wan pipeline has `transformer`, or all of `transformer`, `transformer_2` and `boundary_ratio`, but this one "
                "has some of them only. To train one of two experts, load both and set `expert`."
            )
        if transformer.config.in_channels != vae.config.z_dim:
            raise ValueError(
                "Only Wan2.1 and Wan2.2, text to video, are supported, but this pipeline has an image condition. Use for example "
                "`Wan-AI/Wan2.1-T2V-1.3B-Diffusers`."
            )
        scheduler = pipeline.scheduler
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not scheduler.config.get("use_flow_sigmas"):
            raise ValueError(
                f"The pipeline's scheduler, a `{type(scheduler).__name__}`, is not one of flow matching: it needs "
                "`use_flow_sigmas=True` and a `flow_shift`, or must be a `FlowMatchEulerDiscreteScheduler`."
            )

    @property
    def patch_sizes(self) -> tuple[int, int, int]:
        return self.transformer.config.patch_size

    @classmethod
    def from_pipeline(cls, pipeline: WanPipeline) -> "WanPolicy":
        if pipeline.transformer_2 is None:
            return cls(pipeline)
        from .wan_experts import WanExpertsPolicy

        return WanExpertsPolicy(pipeline)

    @property
    def defaults(self) -> Defaults:
        if self.vae.config.z_dim == _WAN22_TI2V_VAE["z_dim"]:
            return Defaults(height=704, width=1280, num_frames=121, num_inference_steps=50, guidance_scale=5.0)
        return Defaults(height=480, width=832, num_frames=81, num_inference_steps=50, guidance_scale=5.0)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], max_sequence_length: int | None = None) -> PromptEmbeddings:
        prompt_embeds = self.pipeline._get_t5_prompt_embeds(
            prompts,
            max_sequence_length=max_sequence_length or self.max_sequence_length,
            device=self.encoder_device,
        )
        return PromptEmbeddings(prompt_embeds)

    def prompt_shapes(self, max_sequence_length):
        return {"prompt_embeds": (max_sequence_length, self.transformer.config.text_dim)}

    @staticmethod
    def model_inputs(config, latents, sigma, prompts, guidance_scale=None):
        return {
            "hidden_states": latents,
            "timestep": sigma * 1000,
            "encoder_hidden_states": prompts.prompt_embeds,
        }

    def to_latents(self, encoded: torch.Tensor) -> torch.Tensor:
        mean, std = self._latent_statistics(encoded.device)
        return (encoded - mean) / std

    def from_latents(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = self._latent_statistics(latents.device)
        return latents * std + mean

    def _latent_statistics(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the VAE's latents, per channel."""
        config = self.vae.config
        return tuple(
            torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )

    @classmethod
    def tiny(cls, seed: int = 0, experts: int = 1, **transformer_config) -> WanPipeline:
        """Wan2.1's architecture and its UniPC scheduler, for example at 5 frames of 32 x 32 pixels; or Wan2.2-A14B's."""
        from .tiny import spread, tiny_t5_tokenizer, tiny_umt5

        torch.manual_seed(seed)
        tokenizer = tiny_t5_tokenizer()
        config = {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 3,
            "rope_max_seq_len": 32,
        } | transformer_config
        transformers = [WanTransformer3DModel(**config).eval() for _ in range(experts)]
        for transformer in transformers:
            spread(transformer)
        vae = AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            num_res_blocks=1,
            latents_mean=[-0.76, -0.71, 0.11, 0.97],
            latents_std=[2.82, 1.45, 2.33, 1.22],
        )
        return WanPipeline(
            tokenizer=tokenizer,
            text_encoder=tiny_umt5(tokenizer, config["text_dim"]),
            vae=vae.eval(),
            scheduler=UniPCMultistepScheduler(num_train_timesteps=1000, **_SCHEDULER),
            transformer=transformers[0],
            transformer_2=transformers[1] if experts == 2 else None,
            boundary_ratio=0.875 if experts == 2 else None,
        )
