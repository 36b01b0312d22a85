# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""HunyuanVideo-1.5."""

import inspect
from types import MethodType

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.loaders import HunyuanVideoLoraLoaderMixin
from diffusers.training_utils import _collate_lora_metadata

from .base import Defaults, PromptEmbeddings
from .hunyuan_video import SHIFT, HunyuanVideoPolicy, token_mask
from .lora_files import lora_layers


IMAGE_TOKENS = 729  # of a condition, which text to video masks
GLYPH_TOKENS = 256  # of the quoted text in a prompt
LORA_FILE = "pytorch_lora_weights.safetensors"


def forward_of_shapes(
    transformer: HunyuanVideo15Transformer3DModel,
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor,
    encoder_hidden_states_2: torch.Tensor,
    encoder_attention_mask_2: torch.Tensor,
    image_embeds: torch.Tensor,
    return_dict: bool = False,
) -> tuple[torch.Tensor]:
    """
    The forward of a transformer without values, for dry runs. The same up to rounding, but that the tokens of texts stay where they
    are: the transformer moves those that count to the front.
    """
    rotary_emb, size = transformer.rope(hidden_states), hidden_states.shape[2:]
    temb, video = transformer.time_embed(timestep), transformer.x_embedder(hidden_states)
    texts = [
        transformer.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask),
        transformer.context_embedder_2(encoder_hidden_states_2),
        transformer.image_embedder(image_embeds),
    ]
    kinds = transformer.cond_type_embed.weight
    text = torch.cat([part + kind for part, kind in zip(texts, kinds, strict=True)], dim=1)
    mask = torch.cat([encoder_attention_mask, encoder_attention_mask_2, image_embeds[..., 0]], dim=1)
    for block in transformer.transformer_blocks:
        video, text = block(video, text, temb, mask, rotary_emb)
    output = transformer.proj_out(transformer.norm_out(video, temb))
    return (output.transpose(1, 2).reshape(len(video), -1, *size),)


class HunyuanVideo15Policy(HunyuanVideoPolicy):
    """
    [`~diffusers.HunyuanVideo15Pipeline`] as a policy: HunyuanVideo-1.5, for text to video.

    `guidance_scale` is that of the pipeline's `guider`, classifier-free guidance with a negative prompt. A prompt is encoded twice: by
    Qwen2.5-VL, and by ByT5 the text in quotation marks. Both have their own length and a mask.
    """

    guidance = "classifier_free"
    max_sequence_length = 1000
    float32_inputs = ()  # the embedding of the timestep takes the timestep's precision
    known_configs = {
        # The defaults of the classes in diffusers, with which the transformer would be for image to video
        f"hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-{name}": {
            "transformer": ("HunyuanVideo15Transformer3DModel", {"task_type": "t2v", "target_size": size}),
            "vae": ("AutoencoderKLHunyuanVideo15", {}),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": SHIFT}),
        }
        for name, size in (("480p_t2v", 640), ("720p_t2v", 960))
    }

    def __init__(self, pipeline: HunyuanVideo15Pipeline):
        super(HunyuanVideoPolicy, self).__init__(pipeline)
        self._check_condition(self.transformer.config.task_type != "t2v")
        guider = pipeline.guider
        if guider is not None and (
            type(guider) is not ClassifierFreeGuidance
            or guider.config.use_original_formulation
            or guider.config.guidance_rescale
            or (guider.config.start, guider.config.stop) != (0.0, 1.0)
        ):
            raise ValueError(
                "Only classifier-free guidance of all steps is supported: the pipeline's `guider` must be a "
                "`ClassifierFreeGuidance` whose options are the defaults, but for `guidance_scale`."
            )
        self.vae.enable_slicing()  # its attention takes one video at a time
        if self.transformer.device.type == "meta":
            self.transformer.forward = MethodType(forward_of_shapes, self.transformer)

    @property
    def latent_channels(self) -> int:
        return self.transformer.config.out_channels

    @property
    def defaults(self) -> Defaults:
        height, width = (720, 1280) if self.transformer.config.target_size == 960 else (480, 832)
        return Defaults(height=height, width=width, num_frames=121, num_inference_steps=50, guidance_scale=6.0)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], max_sequence_length: int | None = None) -> PromptEmbeddings:
        pipeline, device = self.pipeline, self.encoder_device
        embeds, mask = pipeline._get_mllm_prompt_embeds(
            pipeline.text_encoder,
            pipeline.tokenizer,
            prompts,
            device,
            tokenizer_max_length=max_sequence_length or self.max_sequence_length,
            system_message=pipeline.system_message,
            crop_start=pipeline.prompt_template_encode_start_idx,
        )
        glyphs, glyph_mask = pipeline._get_byt5_prompt_embeds(
            pipeline.tokenizer_2, pipeline.text_encoder_2, prompts, device, pipeline.tokenizer_2_max_length
        )
        return PromptEmbeddings(
            embeds * mask[..., None],
            prompt_embeds_mask=mask,
            prompt_embeds_2=glyphs * glyph_mask[..., None],
            prompt_embeds_2_mask=glyph_mask,
        )

    def prompt_shapes(self, max_sequence_length):
        config = self.transformer.config
        return {
            "prompt_embeds": (max_sequence_length, config.text_embed_dim),
            "prompt_embeds_2": (GLYPH_TOKENS, config.text_embed_2_dim),
        }

    def num_tokens(self, latent_shape, max_sequence_length: int = 0) -> tuple[int, int]:
        tokens, _ = super().num_tokens(latent_shape)
        return tokens, max_sequence_length + GLYPH_TOKENS + IMAGE_TOKENS

    @staticmethod
    def model_inputs(config, latents, sigma, prompts, guidance_scale=None):
        batch_size, channels, *size = latents.shape
        # Of a condition, which there is none of: its latents and a mask, and tokens of an image
        condition = latents.new_zeros(batch_size, config["in_channels"] - channels, *size)
        return {
            "hidden_states": torch.cat([latents, condition], dim=1),
            "timestep": sigma * 1000,
            "encoder_hidden_states": prompts.prompt_embeds,
            "encoder_attention_mask": token_mask(prompts, "prompt_embeds", latents.dtype),
            "encoder_hidden_states_2": prompts.tensors["prompt_embeds_2"],
            "encoder_attention_mask_2": token_mask(prompts, "prompt_embeds_2", latents.dtype),
            "image_embeds": latents.new_zeros(batch_size, IMAGE_TOKENS, config["image_embed_dim"]),
        }

    # The pipeline has no methods for LoRA: its transformer has

    def save_lora_weights(self, save_directory, model, state_dict=None):
        layers, metadata = lora_layers(model, state_dict), _collate_lora_metadata({"transformer": model})
        HunyuanVideoLoraLoaderMixin.save_lora_weights(save_directory, layers, **metadata)

    def load_lora_weights(self, name_or_path: str) -> None:
        self.pipeline.transformer.load_lora_adapter(name_or_path, weight_name=LORA_FILE, use_safetensors=True)

    @property
    def lora_calls(self) -> list[str]:
        return [f'pipeline.transformer.load_lora_adapter("{{model}}", weight_name="{LORA_FILE}")']

    @classmethod
    def tiny(cls, seed: int = 0, **transformer_config) -> HunyuanVideo15Pipeline:
        """HunyuanVideo-1.5's architecture: double blocks, latents beside a condition, two texts with masks."""
        from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

        from .tiny import spread, tiny_byte_tokenizer, tiny_qwen25_text

        torch.manual_seed(seed)
        encode = inspect.signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters
        system = encode["system_message"].default
        tokenizer = tiny_byte_tokenizer(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n", 108)
        transformer = HunyuanVideo15Transformer3DModel(
            **{
                "in_channels": 9,
                "out_channels": 4,
                "num_layers": 2,
                "num_refiner_layers": 1,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "mlp_ratio": 2.0,
                "rope_axes_dim": (4, 6, 6),
                "text_embed_dim": 16,
                "text_embed_2_dim": 16,
                "image_embed_dim": 12,
                "target_size": 640,
                "task_type": "t2v",
            }
            | transformer_config
        )
        spread(transformer)
        vae = AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(16,) * 5,
            layers_per_block=1,
            downsample_match_channel=False,
            upsample_match_channel=False,
        )
        glyphs = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        return HunyuanVideo15Pipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            vae=vae.eval(),
            text_encoder=tiny_qwen25_text(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=T5EncoderModel(T5Config(vocab_size=384, feed_forward_proj="gated-gelu", **glyphs)).eval(),
            tokenizer_2=ByT5Tokenizer(),
            guider=ClassifierFreeGuidance(guidance_scale=6.0),
        )
