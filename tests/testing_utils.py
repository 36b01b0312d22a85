# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Tiny random pipelines, made in a second, of the same classes as the real ones."""

import json
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from tapo_trl.policies import SD3Policy, WanPolicy
from tapo_trl.policies.tiny import spread, tiny_clip
from tapo_trl.policies.tiny import tiny_clip_tokenizer as tiny_tokenizer


tiny_sd3_pipeline = SD3Policy.tiny
tiny_wan_pipeline = WanPolicy.tiny


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
