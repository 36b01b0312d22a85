# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""Scorers that compare CLIP's embeddings of image and prompt: CLIP score and PickScore."""

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, CLIPModel

from .base import PretrainedReward
from .preprocessing import clip_pixel_values


class CLIPReward(PretrainedReward):
    r"""
    CLIP score: \( 100 \max(\cos(f_v, f_t), 0) \) of CLIP's image and text embeddings.

    Args:
        clip ([`~transformers.CLIPModel`]): the CLIP.
        tokenizer (`Callable`): its tokenizer.
        kwargs: arguments of [`PretrainedReward`].
    """

    name = "clip"
    weights = "openai/clip-vit-large-patch14"
    license = "MIT"
    score_range = (15.0, 35.0)
    num_parameters = 427_616_513
    citation = "Hessel et al., 2021, arXiv:2104.08718"

    def __init__(self, clip: CLIPModel, tokenizer, **kwargs):
        super().__init__(**kwargs)
        self.clip = clip
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, weights, torch_dtype, revision, **kwargs):
        clip = CLIPModel.from_pretrained(weights, dtype=torch_dtype, revision=revision)
        return cls(clip, AutoTokenizer.from_pretrained(weights, revision=revision), **kwargs)

    def pixel_values(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1] as the image tower reads them."""
        return clip_pixel_values(images, self.clip.config.vision_config.image_size)

    def tokenize(self, prompts: list[str]) -> torch.Tensor:
        """Token ids, padded and cut to the length of the text tower."""
        length = self.clip.config.text_config.max_position_embeddings
        return self.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids

    def similarity(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Cosine of the embeddings of each image and its prompt, float32, of shape `(N,)`."""
        pixel_values = self.pixel_values(images).to(self.clip.dtype)
        input_ids = self.tokenize(prompts).to(images.device)
        image = self.clip.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
        text = self.clip.get_text_features(input_ids=input_ids, return_dict=True).pooler_output
        return F.cosine_similarity(image.float(), text.float())

    def raw_scores(self, images, prompts):
        return 100 * self.similarity(images, prompts).clamp(min=0)
