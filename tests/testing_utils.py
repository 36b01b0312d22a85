# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Tiny random pipelines, made in a second, of the same classes as the real ones."""

import json
import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)


def tiny_tokenizer(model_max_length: int = 8) -> CLIPTokenizer:
    letters = list(string.ascii_lowercase + string.digits)
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=model_max_length)


def tiny_clip(tokenizer: CLIPTokenizer, hidden_size: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=hidden_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()


def save_tiny_clip(folder: Path, seed: int = 0, **vision_kwargs) -> str:
    """A random CLIP of images of 24 x 24 pixels, with tokenizer and image processor."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 8,
    }
    text_config = tiny_clip(tokenizer, 12).config.to_dict()
    clip = CLIPModel(
        CLIPConfig(
            text_config=text_config,
            vision_config=CLIPVisionConfig(**vision | vision_kwargs).to_dict(),
            projection_dim=10,
            logit_scale_init_value=1.5,
        )
    )
    spread(clip)
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.25]}
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


@torch.no_grad()
def spread(transformer: torch.nn.Module) -> None:
    """adaLN starts at values that make a random transformer nearly linear in its input; spread it out."""
    for parameter in transformer.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))


def tiny_sd3_pipeline(seed: int = 0, **transformer_kwargs) -> StableDiffusion3Pipeline:
    """SD3.5's architecture (qk-norm, dual attention layers, a context-only last block) at 32 x 32 pixels."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    transformer = SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 20,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        }
        | transformer_kwargs
    )
    spread(transformer)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=tiny_clip(tokenizer, 8),
        tokenizer=tokenizer,
        text_encoder_2=tiny_clip(tokenizer, 12),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def tiny_umt5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_letters, *string.digits, *string.punctuation]
    return T5Tokenizer(vocab=[(piece, 0.0 if index < 3 else -2.0) for index, piece in enumerate(pieces)], extra_ids=0)


def tiny_umt5(tokenizer: T5Tokenizer, hidden_size: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=hidden_size,
        d_kv=hidden_size // 2,
        d_ff=2 * hidden_size,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return UMT5EncoderModel(config).eval()


def tiny_wan_pipeline(seed: int = 0, **transformer_kwargs) -> WanPipeline:
    """Wan2.1's architecture and its UniPC scheduler, for example at 5 frames of 32 x 32 pixels."""
    torch.manual_seed(seed)
    tokenizer = tiny_umt5_tokenizer()
    transformer = WanTransformer3DModel(
        **{
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
        }
        | transformer_kwargs
    )
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
        text_encoder=tiny_umt5(tokenizer, transformer.config.text_dim),
        vae=vae.eval(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        transformer=transformer.eval(),
    )
