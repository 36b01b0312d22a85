# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""HPSv2.1, whose weights are in open_clip's layout."""

import html
import re
from typing import Any

import ftfy
import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from .checkpoints import pretrained_from_state_dict, renamed, under
from .clip import OPENAI_CLIP, CLIPReward, cast_clip
from .preprocessing import CLIP_MEAN, CLIP_STD, normalize, pad_to_square, resize_longest_edge


HEADS = (16, 16)  # of the image and the text tower of ViT-H/14
NAMES = (
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),  # transformers' spelling
    (r"^visual\.ln_post", "vision_model.post_layernorm"),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding", "text_model.embeddings.token_embedding"),
    (r"^positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final", "text_model.final_layer_norm"),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.attn\.in_proj_", ".self_attn.{}_proj."),
    (r"\.attn\.out_proj", ".self_attn.out_proj"),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc", ".mlp.fc1"),
    (r"\.mlp\.c_proj", ".mlp.fc2"),
)
PARTS = ("logit_scale", "vision_model.", "text_model.", "visual_projection.", "text_projection.")


class HPSv21Reward(CLIPReward):
    r"""
    Human Preference Score v2.1 (Wu et al., 2023): \( 100 \cos(f_v, f_t) \) of a CLIP ViT-H/14 that was trained on human
    rankings, as the benchmark prints it. Arguments are those of [`CLIPReward`].
    """

    name = "hpsv2.1"
    weights = "xswu/HPSv2"
    weights_file = "HPS_v2.1_compressed.pt"
    needs = (f'{OPENAI_CLIP} --include "tokenizer*" "*.json" merges.txt',)
    license = "Apache-2.0"
    score_range = (20.0, 35.0)
    num_parameters = 986_109_441
    citation = "Wu et al., 2023, arXiv:2306.09341"

    @classmethod
    def load(cls, weights, torch_dtype, revision, tokenizer: str = OPENAI_CLIP, heads=HEADS, **kwargs):
        """`tokenizer` is the Hub id or folder of CLIP's tokenizer, see also [`PretrainedReward.load`]."""
        state = cls.read_weights(weights, revision)
        clip = clip_from_open_clip(state.get("state_dict", state), weights, *heads)
        cast_clip(clip, torch_dtype)
        return cls(clip, AutoTokenizer.from_pretrained(tokenizer), **kwargs)

    def pixel_values(self, images):
        """The whole image, its longer side scaled to the size of the tower, between black bars. Overshoots stay."""
        images = resize_longest_edge(images, self.clip.config.vision_config.image_size, clamp=False)
        return normalize(pad_to_square(images), CLIP_MEAN, CLIP_STD)

    def tokenize(self, prompts):
        return super().tokenize([clean_text(prompt) for prompt in prompts])

    def raw_scores(self, images, prompts):
        return 100 * self.similarity(images, prompts)


def clean_text(text: str) -> str:
    """What open_clip does to a prompt before it is tokenised, and transformers does not."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def clip_from_open_clip(state: dict[str, torch.Tensor], source: str, vision_heads: int, text_heads: int) -> CLIPModel:
    """
    A CLIP of transformers from weights in open_clip's layout, with plain GELU. Sizes are read off the weights.

    Args:
        state (`dict[str, torch.Tensor]`): open_clip's state dict.
        source (`str`): the checkpoint, for the message.
        vision_heads (`int`): attention heads of the image tower.
        text_heads (`int`): attention heads of the text tower.

    Raises:
        ValueError: if the keys are not those of such a CLIP.
    """
    try:
        config = _config(state, vision_heads, text_heads)
    except KeyError as error:
        raise ValueError(f"`{source}` is no CLIP in open_clip's layout: the key {error} is missing.") from error
    converted = {name: tensor for name, tensor in renamed(state, NAMES).items() if name.startswith(PARTS)}
    for name in ("visual_projection.weight", "text_projection.weight"):
        converted[name] = converted[name].T.contiguous()
    return pretrained_from_state_dict(CLIPModel, config, converted, source, torch.float32)


def _count_blocks(state: dict[str, torch.Tensor], tower: str) -> int:
    return len({name.split(".")[0] for name in under(state, f"{tower}.resblocks.")})


def _config(state: dict[str, torch.Tensor], vision_heads: int, text_heads: int) -> CLIPConfig:
    width, channels, patch, _ = state["visual.conv1.weight"].shape
    grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    vision: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": len(state["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": _count_blocks(state, "visual.transformer"),
        "num_attention_heads": vision_heads,
        "num_channels": channels,
        "patch_size": patch,
        "image_size": grid * patch,
        "hidden_act": "gelu",
    }
    text: dict[str, Any] = {
        "vocab_size": len(state["token_embedding.weight"]),
        "max_position_embeddings": len(state["positional_embedding"]),
        "hidden_size": state["positional_embedding"].shape[1],
        "intermediate_size": len(state["transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": _count_blocks(state, "transformer"),
        "num_attention_heads": text_heads,
        "hidden_act": "gelu",
        "eos_token_id": 2,  # features are read at the largest token id, as in open_clip
    }
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=state["text_projection"].shape[1])
