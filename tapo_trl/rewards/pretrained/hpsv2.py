# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""HPSv2.1, whose weights are in open_clip's layout."""

import html
import re
from typing import Any

import ftfy
import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from .clip import OPENAI_CLIP, CLIPReward, cast_clip
from .preprocessing import CLIP_MEAN, CLIP_STD, normalize, pad_to_square, resize_longest_edge


HEADS = (16, 16)  # of the image and the text tower of ViT-H/14
BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OTHERS = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers' spelling
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}


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
        clip = clip_from_open_clip(state.get("state_dict", state), *heads)
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


def clip_from_open_clip(state: dict[str, torch.Tensor], vision_heads: int, text_heads: int) -> CLIPModel:
    """
    A CLIP of transformers from weights in open_clip's layout, with plain GELU. Sizes are read off the weights.

    Args:
        state (`dict[str, torch.Tensor]`): open_clip's state dict.
        vision_heads (`int`): attention heads of the image tower.
        text_heads (`int`): attention heads of the text tower.

    Raises:
        ValueError: if the keys are not those of such a CLIP.
    """
    sizes = {"vision": _blocks(state, "visual.transformer"), "text": _blocks(state, "transformer")}
    try:
        converted = {new: state[old] for old, new in OTHERS.items()}
        converted["visual_projection.weight"] = state["visual.proj"].T
        converted["text_projection.weight"] = state["text_projection"].T
        for tower, source in (("vision", "visual.transformer"), ("text", "transformer")):
            for layer in range(sizes[tower]):
                blocks = f"{source}.resblocks.{layer}.", f"{tower}_model.encoder.layers.{layer}."
                converted |= _converted_block(state, *blocks)
        config = _config(state, sizes, vision_heads, text_heads)
    except KeyError as error:
        raise ValueError(f"The weights are no CLIP in open_clip's layout: the key {error} is missing.") from error
    converted = {name: tensor.float().contiguous() for name, tensor in converted.items()}
    clip, info = CLIPModel.from_pretrained(None, config=config, state_dict=converted, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(f"The weights are no CLIP in open_clip's layout: {info}.")
    return clip


def _blocks(state: dict[str, torch.Tensor], source: str) -> int:
    """Number of transformer blocks."""
    return len(
        {name.split(".resblocks.")[1].split(".")[0] for name in state if name.startswith(f"{source}.resblocks.")}
    )


def _converted_block(state: dict[str, torch.Tensor], source: str, target: str) -> dict[str, torch.Tensor]:
    converted = {}
    for kind in ("weight", "bias"):
        parts = state[f"{source}attn.in_proj_{kind}"].chunk(3)
        converted |= {f"{target}self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}
        converted |= {f"{target}{new}.{kind}": state[f"{source}{old}.{kind}"] for old, new in BLOCK.items()}
    return converted


def _config(state: dict[str, torch.Tensor], layers: dict[str, int], vision_heads: int, text_heads: int) -> CLIPConfig:
    width, channels, patch, _ = state["visual.conv1.weight"].shape
    grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    vision: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": len(state["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": layers["vision"],
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
        "num_hidden_layers": layers["text"],
        "num_attention_heads": text_heads,
        "hidden_act": "gelu",
        "eos_token_id": 2,  # features are read at the largest token id, as in open_clip
    }
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=state["text_projection"].shape[1])
