# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Configurations of the pipelines in the recipes, so that a dry run needs neither the Hub nor a licence click."""

from dataclasses import dataclass
from typing import Any

from ..policies.families import known_pipelines


# Pipeline class, and class and configuration of its components
KNOWN_PIPELINES = known_pipelines()
_SD3_VAE = KNOWN_PIPELINES["stabilityai/stable-diffusion-3.5-medium"][1]["vae"][1]
_WAN_TRANSFORMER = KNOWN_PIPELINES["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"][1]["transformer"][1]
_WAN_SCHEDULER = KNOWN_PIPELINES["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"][1]["scheduler"][1]


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
