# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""HPSv3: a Qwen2-VL-7B that says how much people would like an image."""

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, Qwen2VLModel

from .checkpoints import load_converted, pretrained_from_state_dict, under
from .instructions import read_instruction
from .qwen2_vl import TOKENIZER_FILES, Qwen2VLReward, language_names, read_frames, resized_config


BASE = "Qwen/Qwen2-VL-7B-Instruct"
PIXELS = 256 * 28 * 28


class HPSv3Reward(Qwen2VLReward):
    r"""
    HPSv3: the mean \( \mu \) of the Gaussian that the model gives an image. It reads about 448 x 448 pixels of it. The
    standard deviation \( \sigma \) that the model gives, too, is not used.
    """

    name = "hpsv3"
    weights = "MizzenAI/HPSv3"
    weights_file = "HPSv3.safetensors"
    needs = (f"{BASE} {TOKENIZER_FILES}",)
    license = "MIT"
    score_range = (-5.0, 15.0)
    num_parameters = 7_748_610_610
    citation = "Ma et al., 2025, arXiv:2508.03789"
    reward_tokens = ("<|Reward|>",)
    media_token = "<|image_pad|>"

    @classmethod
    def load(cls, weights, torch_dtype, revision, base_model: str = BASE, instruction_file=None, **kwargs):
        instruction = read_instruction(cls.name, instruction_file)
        state = cls.read_weights(weights, revision)
        model = language_names(state)
        config = resized_config(AutoConfig.from_pretrained(base_model), model)
        return cls(
            pretrained_from_state_dict(Qwen2VLModel, config, model, weights, torch_dtype),
            load_converted(
                make_head(config.text_config.hidden_size), under(state, "rm_head."), weights, torch.float32
            ),
            AutoTokenizer.from_pretrained(base_model),
            instruction,
            **kwargs,
        )

    def read(self, images: torch.Tensor) -> torch.Tensor:
        return read_frames(images, PIXELS, PIXELS).unsqueeze(2).expand(-1, -1, 2, -1, -1)

    def raw_scores(self, images, prompts):
        return self.rewards(images, prompts)[:, 0, 0]


def make_head(width: int) -> nn.Sequential:
    """From a hidden state to mean and standard deviation."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
