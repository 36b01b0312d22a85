# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""What HPSv3 and VideoReward share: a Qwen2-VL that reads pictures and an instruction, and scores at special tokens."""

import itertools
from abc import abstractmethod

import torch
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from .base import PretrainedReward
from .preprocessing import CLIP_MEAN, CLIP_STD, normalize, resize


TOKENIZER_FILES = '--include "*.json" merges.txt'
PATCH, MERGE, FACTOR = 14, 2, 28
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{media}<|vision_end|>{text}"
    "<|im_end|>\n<|im_start|>assistant\n"
)


class Qwen2VLReward(PretrainedReward):
    """
    A Qwen2-VL with a head that reads its last hidden state at special tokens of the instruction.

    The originals give the language model no position ids, and the transformers of their time then counted all tokens, those of
    pictures too, one after the other. M-RoPE, which Qwen2-VL was trained with and which later versions compute, gives other
    scores.

    Args:
        model ([`~transformers.Qwen2VLModel`]): vision tower and language model.
        head (`nn.Module`): scores of a hidden state, in float32.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): tokenizer of the base model; the reward tokens are added to it.
        instruction (`str`): text around `{text_prompt}`, with the reward tokens.
        kwargs: arguments of [`PretrainedReward`].

    Attributes:
        reward_tokens (`tuple[str, ...]`): special tokens at which the head reads.
        media_token (`str`): token of the base model that stands for a patch.
    """

    reward_tokens: tuple[str, ...]
    media_token: str
    default_dtype = torch.bfloat16
    default_batch_size = 4

    def __init__(self, model: Qwen2VLModel, head: nn.Module, tokenizer, instruction: str, **kwargs):
        super().__init__(**kwargs)
        for token in self.reward_tokens:
            if instruction.count(token) != 1:
                raise ValueError(
                    f"The instruction of the reward `{self.name}` must have `{token}` once: {instruction!r}."
                )
        tokenizer.add_tokens(list(self.reward_tokens), special_tokens=True)
        self.model, self.head, self.tokenizer, self.instruction = model, head, tokenizer, instruction
        self.media_id, *self.reward_ids = tokenizer.convert_tokens_to_ids([self.media_token, *self.reward_tokens])

    @abstractmethod
    def read(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures in [0, 1] as the vision tower reads them: `(N, 3, T, height, width)`, an even number of frames."""

    def rewards(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """What the head says at each reward token, float32, of shape `(N, num_reward_tokens, outputs)`."""
        patches, grid = patchify(self.read(images))
        features = self.model.visual(patches.to(self.model.dtype), grid_thw=grid).pooler_output
        tokens = self.tokenize(prompts, len(features) // len(prompts)).to(images.device)
        language = self.model.language_model
        embeds = language.embed_tokens(tokens.input_ids)
        is_media = (tokens.input_ids == self.media_id).unsqueeze(-1)
        embeds = embeds.masked_scatter(is_media, features.to(embeds.dtype))
        hidden_states = language(
            inputs_embeds=embeds,
            attention_mask=tokens.attention_mask,
            position_ids=torch.arange(embeds.shape[1], device=embeds.device).expand(3, len(embeds), -1),
            use_cache=False,
        ).last_hidden_state
        is_reward = torch.isin(tokens.input_ids, torch.tensor(self.reward_ids, device=images.device))
        return self.head(hidden_states[is_reward].float()).unflatten(0, (len(prompts), -1))

    def tokenize(self, prompts: list[str], num_media_tokens: int):
        """
        Token ids and attention mask of the conversations, padded on the right.

        Args:
            prompts (`list[str]`): prompts.
            num_media_tokens (`int`): tokens of each picture or video.
        """
        media = self.media_token * num_media_tokens
        texts = [CHAT.format(media=media, text=self.instruction.format(text_prompt=prompt)) for prompt in prompts]
        return self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")

    @classmethod
    def check_prompts(cls, prompts, **columns):
        for prompt, token in itertools.product(prompts, (cls.media_token, *cls.reward_tokens)):
            if token in prompt:
                raise ValueError(
                    f"The prompt {prompt!r} has `{token}`, which the reward `{cls.name}` adds itself: remove it."
                )


def language_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the vision tower and of the language model in the names of [`~transformers.Qwen2VLModel`]."""
    model = {}
    for name, tensor in state.items():
        if name.startswith("model."):
            model[f"language_model.{name.removeprefix('model.')}"] = tensor
        elif name.startswith("visual."):
            model[name] = tensor
    return model


def resized_config(config: Qwen2VLConfig, model: dict[str, torch.Tensor]) -> Qwen2VLConfig:
    """The configuration with as many tokens as the checkpoint has embeddings."""
    config.text_config.vocab_size = len(model["language_model.embed_tokens.weight"])
    return config


def read_frames(frames: torch.Tensor, min_pixels: int, max_pixels: int) -> torch.Tensor:
    """
    Frames scaled and normalised as Qwen2-VL reads them: to multiples of 28 pixels, with nearly their aspect ratio.

    Args:
        frames (`torch.Tensor` of shape `(N, 3, height, width)`): float, in [0, 1].
        min_pixels (`int`): fewest pixels.
        max_pixels (`int`): most pixels.
    """
    size = smart_resize(*frames.shape[-2:], FACTOR, min_pixels, max_pixels)
    return normalize(resize(frames.clamp(0, 1), size), CLIP_MEAN, CLIP_STD)


def patchify(videos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Patches of two frames and 14 x 14 pixels, in the order of Qwen2-VL: the four that it merges are neighbours.

    Args:
        videos (`torch.Tensor` of shape `(N, 3, T, height, width)`): T even, height and width multiples of 28.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: patches of shape `(N * num_patches, 3 * 2 * 14 * 14)`, and the grid (frames, rows,
        columns of patches) of each video, of shape `(N, 3)`.
    """
    number, channels, frames, height, width = videos.shape
    grid = (frames // 2, height // PATCH, width // PATCH)
    blocks = videos.reshape(
        number, channels, grid[0], 2, grid[1] // MERGE, MERGE, PATCH, grid[2] // MERGE, MERGE, PATCH
    )
    patches = blocks.permute(0, 2, 4, 7, 5, 8, 1, 3, 6, 9).reshape(-1, channels * 2 * PATCH * PATCH)
    return patches, torch.tensor([grid] * number, device=videos.device)
