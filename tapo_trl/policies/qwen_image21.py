# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Qwen-Image-2.1."""

from collections.abc import Sequence
from types import MethodType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21AttnProcessor

from .base import Defaults, PromptEmbeddings
from .image import ImagePolicy, linear_sigmas
from .qwen_image import QWEN_SCHEDULER, QwenImagePolicy


class RotationsOfRows:
    """Rotations of `(batch_size, sequence_length, dim)`, where the attention broadcasts those of one sample over the batch."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows

    def unsqueeze(self, dim: int) -> torch.Tensor:
        return self.rows.unsqueeze(2)


class RowAttnProcessor(QwenImage21AttnProcessor):
    """
    Attention in which an image comes right behind its own prompt. That of diffusers puts all images of a batch behind the longest
    prompt, so that a sample would depend on the others. Text and image only, without a cache.

    Args:
        frame_channels (`int`): rotated pairs of channels of the axis on which an image has one position.
    """

    def __init__(self, frame_channels: int):
        self.frame_channels = frame_channels

    def __call__(self, attn, hidden_states, rotary_emb=None, segments=None, key_valid=None, **kwargs) -> torch.Tensor:
        cached = kwargs.get("kv_cache_mode") is not None
        if key_valid is not None and segments is not None and len(segments) == 1 and not cached:
            prefix, count = segments[0][1], self.frame_channels
            rows = rotary_emb.repeat(len(key_valid), 1, 1)
            # Row n of the sequence has position n on this axis, up to the first of the image
            frames = rotary_emb[key_valid[:, :prefix].sum(1), None, :count].expand(-1, rows.shape[1] - prefix, -1)
            image = torch.cat([frames, rows[:, prefix:, count:]], dim=2)
            rotary_emb = RotationsOfRows(torch.cat([rows[:, :prefix], image], dim=1))
        inputs = {"rotary_emb": rotary_emb, "segments": segments, "key_valid": key_valid}
        return super().__call__(attn, hidden_states, **inputs, **kwargs)


def keep_rows_apart(transformer: QwenImage21Transformer2DModel) -> None:
    """Let no sample of a batch change another one, see [`RowAttnProcessor`]."""
    transformer.set_attn_processor(RowAttnProcessor(transformer.config.axes_dims_rope[0] // 2))


def stream(
    transformer: QwenImage21Transformer2DModel,
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    img_shapes: list[list[tuple[int, int, int]]],
    encoder_hidden_states_mask: torch.Tensor | None = None,
    score_tokens: torch.Tensor | None = None,
    mask_task_tokens: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, tuple[Any, ...]]:
    """
    What the blocks read of a prompt and the image behind it, from shapes alone: the transformer's own forward looks at values.

    Args:
        transformer ([`~diffusers.QwenImage21Transformer2DModel`]): the transformer.
        score_tokens (`torch.Tensor` of shape `(batch_size, num_task_tokens, dim)`, *optional*):
            further tokens behind the image and in its segment: at its position on the first axis, and at 0 on the others.
        mask_task_tokens (`bool`, *optional*, defaults to `False`): hide them from all tokens.

    The others are those of the transformer's forward.

    Returns:
        `tuple`: tokens of prompt, image and score; the embedding of the noise levels; which tokens are modulated by it, `None` for
        all; and the arguments of a block behind the tokens.
    """
    image, text = transformer.img_in(hidden_states), transformer.txt_in(encoder_hidden_states)
    count, total, device = text.shape[1], text.shape[1] + image.shape[1], image.device
    table = transformer.pos_embed.freqs
    if table[0].is_meta:  # in a dry run
        rotations = torch.empty(total, sum(part.shape[1] for part in table), dtype=table[0].dtype, device=device)
    else:
        rotations = transformer.pos_embed(img_shapes[0], torch.arange(total, device=device) >= count, device)
    tokens, mask = [text, image], encoder_hidden_states_mask
    if mask is None and mask_task_tokens:
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=device)
    if mask is not None:
        mask = F.pad(mask, (0, image.shape[1]), value=True)
    if score_tokens is not None:
        tokens.append(score_tokens.to(image.dtype))
        frame, others = rotations[count].tensor_split([table[0].shape[1]])
        own = torch.cat([frame, torch.ones_like(others)]).expand(score_tokens.shape[1], -1)
        rotations = torch.cat([rotations, own])
        mask = mask if mask is None else F.pad(mask, (0, score_tokens.shape[1]), value=not mask_task_tokens)
    tokens, target, timestep = torch.cat(tokens, dim=1), None, timestep.to(image.dtype)
    if transformer.config.causal_condition:  # the prompt is modulated as without noise
        timestep = F.pad(timestep, (0, 1))
        target = torch.arange(tokens.shape[1], device=device) >= count
    temb = transformer.time_text_embed(timestep, image)
    segments = [(0, count, True)]
    arguments = (transformer.modulation(temb), rotations, None, target, None, None, None, segments, mask)
    return tokens, temb, target, arguments


def forward_of_shapes(
    transformer: QwenImage21Transformer2DModel,
    hidden_states: torch.Tensor,
    img_mask: torch.Tensor | None = None,
    return_dict: bool = False,
    **inputs: Any,
) -> tuple[torch.Tensor]:
    """The forward of a transformer without values, for dry runs."""
    tokens, temb, target, arguments = stream(transformer, hidden_states, **inputs)
    for block in transformer.transformer_blocks:
        tokens = block(tokens, *arguments)
    return (transformer.proj_out(transformer.norm_out(tokens, temb, target)),)


class _NoProcessor:
    """What the constructor of the pipeline asks its processor for, in the place of one."""

    tokenizer = SimpleNamespace(encode=lambda text: [0])

    def apply_chat_template(self, messages: list, **kwargs: Any) -> list[list[int]]:
        return [[]]


class QwenImage21Policy(QwenImagePolicy):
    """
    [`~diffusers.QwenImage21Pipeline`] as a policy: Qwen-Image-2.1, for text to image.

    `guidance_scale` is what the pipeline calls `true_cfg_scale`, off at 1, the pipeline's default. Prompts have their own length and a
    mask, and samples of a batch do not change each other, unlike in the pipeline. The VAE has a fourth channel, the opacity: images to
    encode are opaque, and decoded ones are laid over white.
    """

    lora_target_modules = ["to_q", "to_k", "to_v", "to_out.0"]
    comfyui_knows_layers = False  # not looked up
    licenses = {"Qwen/Qwen-Image-2.1": ("other", "qwen-research")}
    known_configs = {
        # The defaults of the classes in diffusers. The scheduler is taken to be that of Qwen-Image.
        "Qwen/Qwen-Image-2.1": {
            "transformer": ("QwenImage21Transformer2DModel", {}),
            "vae": ("AutoencoderKLQwenImage21", {}),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", QWEN_SCHEDULER),
        },
    }

    def __init__(self, pipeline: QwenImage21Pipeline):
        super().__init__(pipeline)
        keep_rows_apart(self.transformer)
        if self.transformer.device.type == "meta":
            self.transformer.forward = MethodType(forward_of_shapes, self.transformer)

    @classmethod
    def placeholders(cls) -> dict[str, Any]:
        return {"processor": _NoProcessor()}

    @property
    def defaults(self) -> Defaults:
        steps = len(self.pipeline.config.sample_sigmas or range(40))
        return Defaults(height=1024, width=1024, num_inference_steps=steps, guidance_scale=1.0)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], max_sequence_length: int | None = None) -> PromptEmbeddings:
        embeds, mask, _ = self.pipeline.encode_prompt(list(prompts), device=self.encoder_device)
        if mask is None:  # all tokens count
            mask = embeds.new_ones(embeds.shape[:2])
        length = max_sequence_length or self.max_sequence_length  # the pipeline does not truncate
        return PromptEmbeddings(embeds[:, :length], prompt_embeds_mask=mask[:, :length])

    def prompt_shapes(self, max_sequence_length):
        return {"prompt_embeds": (max_sequence_length, self.transformer.config.context_in_dim)}

    def num_tokens(self, latent_shape, max_sequence_length: int = 0):
        _, height, width = latent_shape
        return height * width, max_sequence_length

    def sigmas(self, num_inference_steps: int) -> Sequence[float]:
        own = self.pipeline.config.sample_sigmas
        if own is None:
            return linear_sigmas(num_inference_steps)
        if num_inference_steps != len(own):
            raise ValueError(
                f"`num_inference_steps={num_inference_steps}`, but the pipeline samples with {len(own)} noise levels of its own, "
                f"`sample_sigmas` of its configuration: set `num_inference_steps` to {len(own)}."
            )
        return own

    @staticmethod
    def model_inputs(config, latents, sigma, prompts, guidance_scale=None):
        batch_size, _, height, width = latents.shape
        embeds, mask = prompts.prompt_embeds, prompts.tensors.get("prompt_embeds_mask")
        slots = torch.arange(embeds.shape[1] + height * width // 4, device=latents.device) >= embeds.shape[1]
        return {
            "hidden_states": latents.flatten(2).transpose(1, 2),
            "timestep": sigma,
            "encoder_hidden_states": embeds,
            "encoder_hidden_states_mask": None if mask is None or mask.all() else mask,
            "img_shapes": [[(1, height, width)]] * batch_size,
            "img_mask": slots.expand(batch_size, -1),
        }

    @staticmethod
    def velocity_of(config, output, latents):
        size = latents.shape[2:]
        return output[:, -size.numel() :].transpose(1, 2).unflatten(2, size)

    guide = ImagePolicy.guide

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().encode(torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1))

    def decode(self, latents: torch.Tensor, with_gradient: bool = False) -> torch.Tensor:
        colors, opacity = super().decode(latents, with_gradient).split([3, 1], dim=1)
        return colors * opacity + (1 - opacity)

    @classmethod
    def tiny(cls, seed: int = 0, **transformer_config) -> QwenImage21Pipeline:
        """Qwen-Image-2.1's architecture: one stream in which the prompt does not look ahead, an autoencoder with an opacity."""
        from .tiny import TinyProcessor, spread, tiny_byte_tokenizer, tiny_qwen3_vl

        torch.manual_seed(seed)
        tokenizer = tiny_byte_tokenizer()
        transformer = QwenImage21Transformer2DModel(
            **{
                "in_channels": 8,
                "out_channels": 8,
                "num_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "axes_dims_rope": (4, 6, 6),
                "context_in_dim": 16,
                "mlp_ratio": 2,
            }
            | transformer_config
        )
        spread(transformer)
        vae = AutoencoderKLQwenImage21(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=8,
            dim_mult=[1] * 5,
            num_res_blocks=1,
            latents_mean=[0.1] * 8,
            latents_std=[1.5] * 8,
        )
        spread(vae)
        return QwenImage21Pipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(**QWEN_SCHEDULER),
            vae=vae.eval(),
            text_encoder=tiny_qwen3_vl(tokenizer),
            processor=TinyProcessor(tokenizer),
        )
