# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""A family of one's own, made like FLUX.1: packed latents, embedded guidance and score tokens."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from tapo_trl.policies import Defaults, FlowPolicy, PromptEmbeddings
from tapo_trl.policies.tiny import spread, tiny_clip, tiny_clip_tokenizer, tiny_t5_tokenizer, tiny_umt5
from tapo_trl.rewards.backbones.score_stream import TextScoreTransformerMixin


class OwnPipeline(FluxPipeline):
    """A class that the package does not know."""


class OwnTransformer(FluxTransformer2DModel):
    """A class that the package does not know."""


class OwnPolicy(FlowPolicy):
    modality, guidance, max_sequence_length = "image", "embedded", 512
    text_encoder_names = ["text_encoder", "text_encoder_2"]
    lora_target_modules = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]

    @property
    def defaults(self):
        return Defaults(height=1024, width=1024, num_inference_steps=28, guidance_scale=3.5)

    @torch.no_grad()
    def encode_prompts(self, prompts, max_sequence_length=None):
        length = max_sequence_length or self.max_sequence_length
        return PromptEmbeddings(*self.pipeline.encode_prompt(prompts, None, max_sequence_length=length)[:2])

    def latent_shape(self, height, width, num_frames=None):
        if height % 16 or width % 16 or num_frames is not None:
            raise ValueError(f"An image of multiples of 16 pixels, not {height} x {width} x {num_frames}.")
        return self.transformer.config.in_channels // 4, height // 8, width // 8

    def num_tokens(self, latent_shape, max_sequence_length=0):
        return math.prod(latent_shape[1:]) // 4, max_sequence_length

    def prompt_shapes(self, max_sequence_length):
        text, pooled = (self.transformer.config[n] for n in ("joint_attention_dim", "pooled_projection_dim"))
        return {"prompt_embeds": (max_sequence_length, text), "pooled_prompt_embeds": (pooled,)}

    def sigmas(self, num_inference_steps):
        return np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)

    @staticmethod
    def model_inputs(config, latents, sigma, prompts, guidance_scale=None):
        rows, columns = (torch.arange(side // 2, device=latents.device) for side in latents.shape[2:])
        ids = torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns).float()
        return {
            "hidden_states": F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2),
            "timestep": sigma,
            "guidance": torch.full_like(sigma, 3.5 if guidance_scale is None else guidance_scale),
            "encoder_hidden_states": prompts.prompt_embeds,
            "pooled_projections": prompts.pooled_prompt_embeds,
            "img_ids": ids,
            "txt_ids": ids.new_zeros(prompts.prompt_embeds.shape[1], 3),
        }

    @staticmethod
    def velocity_of(config, output, latents):
        return F.pixel_shuffle(output.transpose(1, 2).unflatten(2, [side // 2 for side in latents.shape[2:]]), 2)

    @classmethod
    def tiny(cls, seed=0):
        torch.manual_seed(seed)
        clip_tokenizer, tokenizer = tiny_clip_tokenizer(), tiny_t5_tokenizer()
        sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6), "in_channels": 16}
        sizes |= {"num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 24, "pooled_projection_dim": 8}
        transformer = OwnTransformer(**sizes, guidance_embeds=True)
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        blocks |= {"block_out_channels": [4] * 4, "norm_num_groups": 2, "layers_per_block": 1}
        vae = AutoencoderKL(**blocks, latent_channels=4, scaling_factor=0.36, shift_factor=0.12)
        spread(transformer)
        return OwnPipeline(
            FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            *(vae.eval(), CLIPTextModel(tiny_clip(clip_tokenizer, 8).config).eval(), clip_tokenizer),
            *(tiny_umt5(tokenizer, 24), tokenizer, transformer.eval()),
        )


class OwnScoreTransformer(TextScoreTransformerMixin, OwnTransformer):
    base_class = OwnTransformer
    interface_fields = ("in_channels", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds")
    backbone_dtype = property(lambda self: self.x_embedder.weight.dtype)
    score_width = property(lambda self: self.config.joint_attention_dim)

    def score_projection_names(self):
        double = [f"transformer_blocks.{i}.attn.add_{p}_proj" for i in range(self.config.num_layers) for p in "qkv"]
        single = range(self.config.num_single_layers)
        return double + [f"single_transformer_blocks.{i}.attn.to_{p}" for i in single for p in "qkv"]

    def forward(self, hidden_states, encoder_hidden_states, txt_ids, mask_task_tokens=False, **inputs):
        score, kwargs = self.score_rows(encoder_hidden_states), {}
        if mask_task_tokens:  # nobody looks at them
            tokens = torch.arange(score.shape[1] + len(txt_ids) + hidden_states.shape[1], device=score.device)
            kwargs["attention_mask"] = (tokens >= score.shape[1]).view(1, 1, 1, -1)
        inputs |= {"encoder_hidden_states": torch.cat([score, encoder_hidden_states], 1), "return_dict": False}
        inputs |= {"txt_ids": F.pad(txt_ids, (0, 0, score.shape[1], 0)), "joint_attention_kwargs": kwargs}
        with self.score_states(self.single_transformer_blocks[-1]) as states:
            velocity = super().forward(hidden_states, **inputs)[0]
        return velocity, self.score_head(states[0])
