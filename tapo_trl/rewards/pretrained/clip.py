# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""Scorers on CLIP's embeddings: CLIP score, PickScore and the aesthetic predictor."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModelWithProjection
from transformers.image_processing_base import ImageProcessingMixin

from .base import PretrainedReward
from .checkpoints import load_converted
from .preprocessing import CLIP_MEAN, CLIP_STD, clip_pixel_values


OPENAI_CLIP = "openai/clip-vit-large-patch14"


class CLIPReward(PretrainedReward):
    r"""
    CLIP score (Hessel et al., 2021) as most papers print it: \( 100 \max(\cos(f_v, f_t), 0) \) of the embeddings of image and
    prompt. It depends on the CLIP: name it with the number.

    Args:
        clip ([`~transformers.CLIPModel`]): the CLIP.
        tokenizer (`Callable`): its tokenizer.
        image_mean (`Sequence[float]`, *optional*): mean of each channel. Defaults to OpenAI's.
        image_std (`Sequence[float]`, *optional*): standard deviation of each channel. Defaults to OpenAI's.
        kwargs: arguments of [`PretrainedReward`].
    """

    name = "clip"
    weights = OPENAI_CLIP
    license = "MIT"
    score_range = (15.0, 35.0)
    num_parameters = 427_616_513
    citation = "Hessel et al., 2021, arXiv:2104.08718"

    def __init__(self, clip: CLIPModel, tokenizer, image_mean=CLIP_MEAN, image_std=CLIP_STD, **kwargs):
        super().__init__(**kwargs)
        self.clip = clip
        self.tokenizer = tokenizer
        self.image_mean, self.image_std = image_mean, image_std

    @classmethod
    def load(cls, weights, torch_dtype, revision, **kwargs):
        clip = CLIPModel.from_pretrained(weights, dtype=torch.float32, revision=revision)
        cast_clip(clip, torch_dtype)
        tokenizer = AutoTokenizer.from_pretrained(weights, revision=revision)
        processor, _ = ImageProcessingMixin.get_image_processor_dict(weights, revision=revision)
        return cls(clip, tokenizer, processor["image_mean"], processor["image_std"], **kwargs)

    def pixel_values(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1] as the image tower reads them."""
        size = self.clip.config.vision_config.image_size
        return clip_pixel_values(images, size, self.image_mean, self.image_std)

    def tokenize(self, prompts: list[str]) -> torch.Tensor:
        """Token ids on the CPU, padded and cut to the length of the text tower."""
        length = self.clip.config.text_config.max_position_embeddings
        return self.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids

    def similarity(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Cosine of the embeddings of each image and its prompt, of shape `(N,)`, float32."""
        pixel_values = self.pixel_values(images).to(self.clip.visual_projection.weight.dtype)
        unique = list(dict.fromkeys(prompts))  # candidates share a prompt
        input_ids = self.tokenize(unique).to(images.device)
        image = self.clip.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
        text = self.clip.get_text_features(input_ids=input_ids, return_dict=True).pooler_output
        text = text[[unique.index(prompt) for prompt in prompts]]
        return F.cosine_similarity(image.float(), text.float())

    def raw_scores(self, images, prompts):
        return 100 * self.similarity(images, prompts).clamp(min=0)


class PickScoreReward(CLIPReward):
    r"""
    PickScore (Kirstain et al., 2023): \( e^\tau \cos(f_v, f_t) \) of a CLIP that was trained on Pick-a-Pic. Arguments are those
    of [`CLIPReward`].
    """

    name = "pickscore"
    weights = "yuvalkirstain/PickScore_v1"
    license = "MIT (code; the weights state none)"
    score_range = (16.0, 26.0)
    num_parameters = 986_109_441
    citation = "Kirstain et al., 2023, arXiv:2305.01569"

    def raw_scores(self, images, prompts):
        return self.clip.logit_scale.float().exp() * self.similarity(images, prompts)


class AestheticReward(PretrainedReward):
    """
    LAION's aesthetic predictor V2 (`sac+logos+ava1-l14-linearMSE`): a head on the normalised image embedding of OpenAI's CLIP
    ViT-L/14. It does not read the prompt.

    Args:
        clip ([`~transformers.CLIPVisionModelWithProjection`]): image tower.
        head ([`~torch.nn.Sequential`]): see [`linear_head`].
        kwargs: arguments of [`PretrainedReward`].
    """

    name = "aesthetic"
    weights = "trl-lib/ddpo-aesthetic-predictor"
    weights_file = "aesthetic-model.pth"
    needs = (OPENAI_CLIP,)
    license = "Apache-2.0, MIT (CLIP)"
    score_range = (1.0, 10.0)
    num_parameters = 304_894_177
    citation = "Schuhmann, 2022, improved-aesthetic-predictor"

    def __init__(self, clip: CLIPVisionModelWithProjection, head: nn.Sequential, **kwargs):
        super().__init__(**kwargs)
        self.clip = clip
        self.head = head

    @classmethod
    def load(cls, weights, torch_dtype, revision, clip: str = OPENAI_CLIP, **kwargs):
        """`clip` is the Hub id or folder of the CLIP, see also [`PretrainedReward.load`]."""
        tower = CLIPVisionModelWithProjection.from_pretrained(clip, dtype=torch_dtype)
        head = linear_head(tower.config.projection_dim)
        state = cls.read_weights(weights, revision)
        state = {name.removeprefix("layers."): tensor for name, tensor in state.items()}
        return cls(tower, load_converted(head, state, weights, torch.float32), **kwargs)

    def raw_scores(self, images, prompts):
        pixel_values = clip_pixel_values(images, self.clip.config.image_size)
        embeds = self.clip(pixel_values.to(self.clip.visual_projection.weight.dtype)).image_embeds
        return self.head(F.normalize(embeds.float(), dim=-1)).squeeze(-1)


def linear_head(dim: int) -> nn.Sequential:
    """Linear layers of LAION's predictor and of ImageReward. Between them is nothing but dropout: frozen, they are one affine map."""
    widths = (dim, 1024, 128, 64, 16, 1)
    layers = [nn.Linear(*pair) for pair in zip(widths[:-1], widths[1:], strict=True)]
    first, second, third, fourth, last = layers
    return nn.Sequential(first, nn.Identity(), second, nn.Identity(), third, nn.Identity(), fourth, last)


def cast_clip(clip: CLIPModel, dtype: torch.dtype) -> None:
    """Cast all but the scale of the similarity, which half precision would change by more than a percent."""
    scale = clip.logit_scale.detach().clone()
    clip.to(dtype)
    clip.logit_scale.data = scale.float()
