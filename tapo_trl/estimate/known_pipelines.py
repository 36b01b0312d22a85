# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Configurations of the pipelines in the recipes, so that a dry run needs neither the Hub nor a licence click."""

from dataclasses import dataclass
from typing import Any


# The autoencoder of SD3 and SD3.5: `scripts/convert_sd3_to_diffusers.py` of diffusers, on SDXL's architecture.
_SD3_VAE = {
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

# `scripts/convert_wan_to_diffusers.py` of diffusers: `get_transformer_config("Wan-T2V-1.3B")` and `("Wan-T2V-14B")`, whose
# autoencoder is `AutoencoderKLWan` with its defaults.
_WAN_TRANSFORMER = {
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
_WAN_SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def _wan(**transformer: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    return {
        "transformer": ("WanTransformer3DModel", _WAN_TRANSFORMER | transformer),
        "vae": ("AutoencoderKLWan", {}),
        "scheduler": ("UniPCMultistepScheduler", _WAN_SCHEDULER),
    }


# Pipeline class, and class and configuration of its components
KNOWN_PIPELINES: dict[str, tuple[str, dict[str, tuple[str, dict[str, Any]]]]] = {
    # `scripts/convert_sd3_to_diffusers.py`: 64 channels per head, as many heads as layers, positions of 384, a second
    # attention in the first 13 blocks and the normalisation of "sd3.5 2b".
    "stabilityai/stable-diffusion-3.5-medium": (
        "StableDiffusion3Pipeline",
        {
            "transformer": (
                "SD3Transformer2DModel",
                {
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
                },
            ),
            "vae": ("AutoencoderKL", _SD3_VAE),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        },
    ),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (
        "WanPipeline",
        _wan(num_attention_heads=12, num_layers=30, ffn_dim=8960),
    ),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": (
        "WanPipeline",
        _wan(num_attention_heads=40, num_layers=40, ffn_dim=13824),
    ),
}


@dataclass(frozen=True)
class Size:
    """
    What `tapo-trl bench` measures under one word.

    Args:
        pipeline (`tuple`): Pipeline class and components, as in `KNOWN_PIPELINES`.
        height, width, num_frames (`int`): Size of a sample.
        max_sequence_length (`int`): Tokens of the T5 or UMT5 text encoder.
        num_inference_steps (`int`): Sampling steps.
    """

    pipeline: tuple[str, dict[str, tuple[str, dict[str, Any]]]]
    height: int
    width: int
    num_frames: int | None
    max_sequence_length: int
    num_inference_steps: int


_TINY_SD3 = {
    "sample_size": 16,
    "num_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "caption_projection_dim": 128,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 16,
    "dual_attention_layers": [0, 1],
    "qk_norm": "rms_norm",
}
_TINY_WAN = {"num_attention_heads": 4, "attention_head_dim": 24, "num_layers": 4, "ffn_dim": 256, "text_dim": 64}

SIZES = {
    "tiny": Size(
        (
            "StableDiffusion3Pipeline",
            {
                "transformer": ("SD3Transformer2DModel", _TINY_SD3),
                "vae": ("AutoencoderKL", _SD3_VAE | {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 2}),
                "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
            },
        ),
        128,
        128,
        None,
        16,
        20,
    ),
    "tiny_wan": Size(
        (
            "WanPipeline",
            {
                "transformer": ("WanTransformer3DModel", _WAN_TRANSFORMER | _TINY_WAN),
                "vae": ("AutoencoderKLWan", {"base_dim": 4, "num_res_blocks": 1}),
                "scheduler": ("UniPCMultistepScheduler", _WAN_SCHEDULER),
            },
        ),
        64,
        64,
        9,
        16,
        20,
    ),
    "sd35": Size(KNOWN_PIPELINES["stabilityai/stable-diffusion-3.5-medium"], 512, 512, None, 256, 20),
    "wan21": Size(KNOWN_PIPELINES["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"], 480, 832, 17, 512, 40),
}
