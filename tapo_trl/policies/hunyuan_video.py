# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""HunyuanVideo (13B)."""

import numpy as np
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from transformers import CLIPTextModel

from .base import Defaults, PromptEmbeddings
from .video import VideoPolicy


GUIDANCE_SCALE = 6.0
SHIFT = 7.0  # recalled from the released repositories, and not compared with them


def token_mask(prompts: PromptEmbeddings, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Which tokens of `name` count, as numbers: all of them if there is no mask."""
    mask = prompts.tensors.get(f"{name}_mask")
    return (
        prompts.tensors[name].new_ones(prompts.tensors[name].shape[:2], dtype=dtype)
        if mask is None
        else mask.to(dtype)
    )


class HunyuanVideoPolicy(VideoPolicy):
    """
    [`~diffusers.HunyuanVideoPipeline`] as a policy: HunyuanVideo, for text to video, and models with its architecture.

    `guidance_scale` is an input of the transformer, on one forward. The pipeline's `true_cfg_scale` is not supported, which is off by
    default. Prompts have their own length and a mask.
    """

    guidance = "embedded"
    max_sequence_length = 256
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
    licenses = dict.fromkeys(
        ("hunyuanvideo-community/", "tencent/HunyuanVideo"), ("other", "tencent-hunyuan-community")
    )
    known_configs = {
        # The defaults of the classes in diffusers
        "hunyuanvideo-community/HunyuanVideo": {
            "transformer": ("HunyuanVideoTransformer3DModel", {}),
            "vae": ("AutoencoderKLHunyuanVideo", {}),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": SHIFT}),
        },
    }

    def __init__(self, pipeline: HunyuanVideoPipeline):
        super().__init__(pipeline)
        self._check_condition(self.transformer.config.image_condition_type is not None)
        if not self.transformer.config.guidance_embeds:
            self.guidance = "none"

    def _check_condition(self, has_condition: bool) -> None:
        if has_condition:
            raise ValueError(
                f"Only text to video is supported, but the transformer of `{self.name_or_path}` is conditioned on an image. Use for "
                f"example `{next(iter(self.known_configs))}`."
            )

    @property
    def defaults(self) -> Defaults:
        return Defaults(height=720, width=1280, num_frames=129, num_inference_steps=50, guidance_scale=GUIDANCE_SCALE)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], max_sequence_length: int | None = None) -> PromptEmbeddings:
        length = max_sequence_length or self.max_sequence_length
        embeds, pooled, mask = self.pipeline.encode_prompt(
            prompts, device=self.encoder_device, max_sequence_length=length
        )
        return PromptEmbeddings(embeds * mask[..., None], pooled, prompt_embeds_mask=mask)

    def prompt_shapes(self, max_sequence_length):
        config = self.transformer.config
        return {
            "prompt_embeds": (max_sequence_length, config.text_embed_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def sigmas(self, num_inference_steps):
        return np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1]

    @staticmethod
    def model_inputs(config, latents, sigma, prompts, guidance_scale=None):
        inputs = {
            "hidden_states": latents,
            "timestep": sigma * 1000,
            "encoder_hidden_states": prompts.prompt_embeds,
            "encoder_attention_mask": token_mask(prompts, "prompt_embeds", latents.dtype),
            "pooled_projections": prompts.pooled_prompt_embeds,
        }
        if config["guidance_embeds"]:
            scale = GUIDANCE_SCALE if guidance_scale is None else guidance_scale
            inputs["guidance"] = torch.full_like(sigma, 1000 * scale)
        return inputs

    def to_latents(self, encoded: torch.Tensor) -> torch.Tensor:
        return encoded * self.vae.config.scaling_factor

    def from_latents(self, latents: torch.Tensor) -> torch.Tensor:
        return latents / self.vae.config.scaling_factor

    @classmethod
    def tiny(cls, seed: int = 0, **transformer_config) -> HunyuanVideoPipeline:
        """HunyuanVideo's architecture: a refiner of the prompt, double and single blocks, embedded guidance."""
        from .tiny import spread, tiny_byte_tokenizer, tiny_clip, tiny_clip_tokenizer, tiny_llama

        torch.manual_seed(seed)
        prefix, length = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")[0], DEFAULT_PROMPT_TEMPLATE["crop_start"]
        tokenizer, tokenizer_2 = tiny_byte_tokenizer(prefix, length), tiny_clip_tokenizer(77)
        tokenizer.padding_side = "right"
        transformer = HunyuanVideoTransformer3DModel(
            **{
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 1,
                "num_single_layers": 1,
                "num_refiner_layers": 1,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "rope_axes_dim": (4, 6, 6),
                "text_embed_dim": 16,
                "pooled_projection_dim": 8,
            }
            | transformer_config
        )
        spread(transformer)
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=4,
            block_out_channels=(4,) * 4,
            layers_per_block=1,
            norm_num_groups=2,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        )
        return HunyuanVideoPipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            vae=vae.eval(),
            text_encoder=tiny_llama(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModel(tiny_clip(tokenizer_2, 8).config).eval(),
            tokenizer_2=tokenizer_2,
        )
