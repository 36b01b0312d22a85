# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""MPS: a CLIP whose image tokens attend to those words of the prompt that a condition picks out."""

import re

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoTokenizer, CLIPModel

from .checkpoints import load_converted, pretrained_from_state_dict
from .clip import CLIPReward, cast_clip


BASE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, texture, "
    "quantity, attributes, position, number, location, word, things."
)
HEAD_DIM = 64


class MPSReward(CLIPReward):
    r"""
    MPS, overall preference: \( e^\tau \cos \) of the prompt's embedding and of the image's class token after cross-attention to
    the prompt. A word of the prompt takes part if its similarity to the condition is above `threshold` times that of the
    prompt's most similar word. The largest similarity is taken for each prompt on its own; the original takes that of the whole
    batch, which it uses with one prompt.

    Args:
        clip ([`~transformers.CLIPModel`]): the CLIP.
        tokenizer (`Callable`): its tokenizer.
        cross ([`CrossModel`]): cross-attention of image and prompt.
        threshold (`float`, *optional*, defaults to 0.01):
            0.01 is what the model itself and its README use; the original's evaluation scripts use 0.3.
        condition (`str`, *optional*): words that pick out those of the prompt. Defaults to those of overall preference.
        kwargs: arguments of [`PretrainedReward`].
    """

    name = "mps"
    weights = "RE-N-Y/mpsv1"
    weights_file = "model.safetensors"
    needs = (f'{BASE} --include "*.json" merges.txt',)
    license = "none stated (code MIT)"
    score_range = (0.0, 20.0)
    num_parameters = 1_104_606_721
    citation = "Zhang et al., 2024, arXiv:2405.14705"

    def __init__(self, clip, tokenizer, cross, threshold: float = 0.01, condition: str = CONDITION, **kwargs):
        super().__init__(clip, tokenizer, **kwargs)
        self.cross, self.threshold, self.condition = cross, threshold, condition

    @classmethod
    def load(cls, weights, torch_dtype, revision, base_model: str = BASE, **kwargs):
        clip, cross = convert_state_dict(cls.read_weights(weights, revision))
        config = AutoConfig.from_pretrained(base_model)
        config.text_config.eos_token_id = 2  # the last token of a prompt is the one with the highest id
        layers, width = (
            sum(name.endswith("attention.norm.weight") for name in cross),
            len(cross["0.attention.norm.weight"]),
        )
        heads = len(cross["0.attention.query.weight"]) // HEAD_DIM
        clip = pretrained_from_state_dict(CLIPModel, config, clip, weights, torch.float32)
        cast_clip(clip, torch_dtype)
        return cls(
            clip,
            AutoTokenizer.from_pretrained(base_model),
            load_converted(CrossModel(width, layers, heads), cross, weights, torch_dtype),
            **kwargs,
        )

    def text_tokens(self, prompts: list[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Projected embeddings of all tokens, of shape `(N, length, dim)`, and of the last one, of shape `(N, dim)`."""
        output = self.clip.text_model(input_ids=self.tokenize(prompts).to(device))
        return self.clip.text_projection(output.last_hidden_state), self.clip.text_projection(output.pooler_output)

    def raw_scores(self, images, prompts):
        text, text_end = self.text_tokens(prompts, images.device)
        condition, _ = self.text_tokens([self.condition], images.device)
        relevance = (text @ condition[0].T).amax(2)
        relevant = relevance / relevance.amax(1, keepdim=True) > self.threshold
        pixel_values = self.pixel_values(images).to(self.clip.visual_projection.weight.dtype)
        image = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixel_values).last_hidden_state)
        fused = self.cross(image, text, relevant)[:, 0]
        return self.clip.logit_scale.float().exp() * F.cosine_similarity(text_end.float(), fused.float())


class CrossModel(nn.ModuleList):
    """
    Layers in which image tokens attend to the prompt, then to each other.

    Args:
        width (`int`): width of the tokens.
        layers (`int`): number of layers.
        heads (`int`): number of attention heads of 64 channels, which share one key and one value.
    """

    def __init__(self, width: int, layers: int, heads: int):
        super().__init__(
            nn.ModuleDict({"attention": Block(width, heads, False), "mixing": Block(width, heads, True)})
            for _ in range(layers)
        )

    def forward(self, image: torch.Tensor, text: torch.Tensor, relevant: torch.Tensor) -> torch.Tensor:
        for layer in self:
            image = layer["attention"](image, text, relevant)
            image = layer["mixing"](image)
        return image


class Block(nn.Module):
    """Attention and a gated MLP side by side, on the same normalised tokens; rotary positions in self-attention."""

    def __init__(self, width: int, heads: int, is_self_attention: bool):
        super().__init__()
        self.is_self_attention = is_self_attention
        self.norm = nn.LayerNorm(width, bias=False)
        self.query = nn.Linear(width, heads * HEAD_DIM, bias=False)
        self.key_value = nn.Linear(width, 2 * HEAD_DIM, bias=False)
        self.out = nn.Linear(heads * HEAD_DIM, width, bias=False)
        self.mlp_in = nn.Linear(width, 8 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(
        self, tokens: torch.Tensor, context: torch.Tensor | None = None, relevant: torch.Tensor | None = None
    ) -> torch.Tensor:
        normed = self.norm(tokens)
        query = self.query(normed).unflatten(2, (-1, HEAD_DIM)).transpose(1, 2)
        key, value = self.key_value(normed if context is None else context).unsqueeze(1).chunk(2, dim=-1)
        if self.is_self_attention:
            query, key = rotate(query), rotate(key)
        mask = None if relevant is None else relevant[:, None, None]
        heads = query.shape[1]
        key, value = key.expand(-1, heads, -1, -1), value.expand(-1, heads, -1, -1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        hidden_states, gate = self.mlp_in(normed).chunk(2, dim=-1)
        mlp = self.mlp_out(F.silu(gate) * hidden_states)
        return tokens + self.out(attended.transpose(1, 2).flatten(2)) + mlp


def rotate(states: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of `(N, heads, length, 64)`, with the base 10000."""
    length, dim = states.shape[-2:]
    frequencies = 10000 ** -(torch.arange(0, dim, 2, device=states.device) / dim)
    angles = torch.outer(torch.arange(length, device=states.device), frequencies).repeat(1, 2)
    first, second = states.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return states * angles.cos().to(states.dtype) + turned * angles.sin().to(states.dtype)


# Names in a layer of the original's cross model. Its self-attention has one matrix for query, key and value, and the MLP.
CROSS_NAMES = {
    "0.fn.norm.weight": "attention.norm.weight",
    "0.fn.to_q.weight": "attention.query.weight",
    "0.fn.to_kv.weight": "attention.key_value.weight",
    "0.fn.to_out.weight": "attention.out.weight",
    "0.fn.ff.0.weight": "attention.mlp_in.weight",
    "0.fn.ff.2.weight": "attention.mlp_out.weight",
    "1.fn.norm.weight": "mixing.norm.weight",
    "1.fn.attn_out.weight": "mixing.out.weight",
    "1.fn.ff_out.1.weight": "mixing.mlp_out.weight",
}


def convert_state_dict(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors of the CLIP and of [`CrossModel`] from the original's names."""
    state = {name.removeprefix("mps."): tensor for name, tensor in state.items()}
    ids = ".embeddings.position_ids"  # a buffer in older versions of transformers
    clip = {
        name.removeprefix("model."): tensor
        for name, tensor in state.items()
        if name.startswith("model.") and not name.endswith(ids)
    }
    cross = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"cross_model\.layers\.(\d+)\.(.+)", name)
        if match is None:
            continue
        layer, part = match.groups()
        if part in CROSS_NAMES:
            cross[f"{layer}.{CROSS_NAMES[part]}"] = tensor
        elif part == "1.fn.fused_attn_ff_proj.weight":
            heads_width = state[f"cross_model.layers.{layer}.1.fn.attn_out.weight"].shape[1]
            query, key_value, mlp = tensor.split((heads_width, 2 * HEAD_DIM, len(tensor) - heads_width - 2 * HEAD_DIM))
            cross |= {
                f"{layer}.mixing.query.weight": query,
                f"{layer}.mixing.key_value.weight": key_value,
                f"{layer}.mixing.mlp_in.weight": mlp,
            }
    return clip, cross
