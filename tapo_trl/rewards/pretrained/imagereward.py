# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""ImageReward: a BLIP whose text encoder attends to the image, and a head on its first token."""

import json

import torch
from torch import nn
from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from .base import PretrainedReward
from .checkpoints import load_converted, pretrained_from_state_dict, renamed, under, weights_file
from .clip import linear_head
from .preprocessing import CLIP_MEAN, CLIP_STD, center_crop, normalize, resize_shortest_edge


BERT = "google-bert/bert-base-uncased"
MAX_LENGTH = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
HEAD_DIM = 64
VISION_NAMES = (
    (r"^cls_token", "embeddings.class_embedding"),
    (r"^pos_embed", "embeddings.position_embedding"),
    (r"^patch_embed\.proj", "embeddings.patch_embedding"),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.attn\.qkv", ".self_attn.qkv"),
    (r"\.attn\.proj", ".self_attn.projection"),
)


class ImageReward(PretrainedReward):
    """
    ImageReward v1.0: what people prefer, trained on 137 thousand comparisons; normalised, so that the mean of its training
    data is 0 and their standard deviation 1. It reads 35 tokens of the prompt and a square of 224 pixels from the middle.

    Args:
        vision ([`~transformers.BlipVisionModel`]): image encoder.
        text (`BlipTextModel`): text encoder with cross-attention.
        head (`nn.Module`): score of the first token.
        tokenizer (`Callable`): BERT's tokenizer.
        kwargs: arguments of [`PretrainedReward`].
    """

    name = "imagereward"
    weights = "zai-org/ImageReward"
    weights_file = "ImageReward.pt"
    needs = (f'{BERT} --include "*.json" vocab.txt',)
    license = "Apache-2.0"
    score_range = (-2.3, 2.0)
    num_parameters = 446_206_689
    citation = "Xu et al., 2023, arXiv:2304.05977"

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel, head: nn.Module, tokenizer, **kwargs):
        super().__init__(**kwargs)
        self.vision, self.text, self.head, self.tokenizer = vision, text, head, tokenizer

    @classmethod
    def load(cls, weights, torch_dtype, revision, tokenizer: str = BERT, **kwargs):
        vision, text, head = convert_state_dict(cls.read_weights(weights, revision))
        facts = json.loads(weights_file(weights, "med_config.json", revision).read_text())
        of_vision = vision_config(vision)
        text_model = BlipTextModel(text_config(facts, of_vision.hidden_size), add_pooling_layer=False)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        return cls(
            pretrained_from_state_dict(BlipVisionModel, of_vision, vision, weights, torch_dtype),
            load_converted(text_model, text, weights, torch_dtype),
            load_converted(linear_head(facts["hidden_size"]), head, weights, torch.float32),
            tokenizer,
            **kwargs,
        )

    def pixel_values(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1] as the image encoder reads them."""
        size = self.vision.config.image_size
        images = resize_shortest_edge(images.clamp(0, 1), size)
        return normalize(center_crop(images, size, rounding="nearest"), CLIP_MEAN, CLIP_STD)

    def tokenize(self, prompts: list[str]):
        """Token ids and attention mask, padded and cut to 35 tokens."""
        return self.tokenizer(
            prompts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
        )

    def raw_scores(self, images, prompts):
        inputs = self.tokenize(prompts).to(images.device)
        image = self.vision(self.pixel_values(images).to(self.vision.dtype)).last_hidden_state
        tokens = self.text(
            inputs.input_ids,
            attention_mask=inputs.attention_mask,
            encoder_hidden_states=image,
            is_decoder=False,  # the text attends in both directions; the configuration says `True` for the cross-attention
        ).last_hidden_state
        return (self.head(tokens[:, 0].float()).squeeze(1) - MEAN) / STD


def convert_state_dict(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], ...]:
    """Tensors of the image encoder, the text encoder and the head, in transformers' names, from the original's names."""
    text = under(state, "blip.text_encoder.")
    text.pop("embeddings.position_ids", None)
    return renamed(under(state, "blip.visual_encoder."), VISION_NAMES), text, under(state, "mlp.layers.")


def vision_config(vision: dict[str, torch.Tensor]) -> BlipVisionConfig:
    """The configuration of the image encoder, from the shapes of its converted tensors."""
    width, _, patch_size, _ = vision["embeddings.patch_embedding.weight"].shape
    side = round((vision["embeddings.position_embedding"].shape[1] - 1) ** 0.5)
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(vision["encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=sum(name.endswith("mlp.fc1.bias") for name in vision),
        num_attention_heads=width // HEAD_DIM,
        image_size=side * patch_size,
        patch_size=patch_size,
        layer_norm_eps=1e-6,
    )


def text_config(facts: dict, image_width: int) -> BlipTextConfig:
    """
    The configuration of the text encoder, from the original's `med_config.json`, whose own `encoder_width` does not count: the
    original overwrites it with the width of the image encoder.
    """
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return BlipTextConfig(
        **{name: facts[name] for name in (*names, "max_position_embeddings", "hidden_act", "layer_norm_eps")},
        encoder_hidden_size=image_width,
        is_decoder=True,
    )
