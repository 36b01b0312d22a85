# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""GenEval's object detector: a Mask2Former of mmdet 2 on a Swin, in transformers."""

import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from .checkpoints import pretrained_from_state_dict, renamed
from .preprocessing import normalize


LONGER, SHORTER, DIVISOR = 1333, 800, 32  # sides that pictures are scaled to, and padded to a multiple of
MEAN, STD, PADDING = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 128.0
LEVELS, POINTS = 3, 4  # of deformable attention
MAX_DETECTIONS = 100
SWIN, PIXELS, QUERIES = (
    "model.pixel_level_module.encoder.",
    "model.pixel_level_module.decoder.",
    "model.transformer_module.",
)
# Patterns of mmdet's names and what stands in their place in transformers', one after the other
NAMES = (
    (r"^backbone\.norm", f"{SWIN}hidden_states_norms.stage"),
    (r"^backbone\.patch_embed\.projection", f"{SWIN}swin.embeddings.patch_embeddings.projection"),
    (r"^backbone\.patch_embed", f"{SWIN}swin.embeddings"),
    (r"^backbone\.stages", f"{SWIN}swin.encoder.layers"),
    (r"attn\.w_msa\.(?=relative)", "attention.relative_position_bias."),
    (r"attn\.w_msa\.proj", "attention.o_proj"),
    (r"attn\.w_msa\.qkv", "attention.{}_proj"),
    (r"(blocks\.\d+)\.norm1", r"\1.layernorm_before"),
    (r"(blocks\.\d+)\.norm2", r"\1.layernorm_after"),
    (r"\.ffn\.layers\.0\.0", ".mlp.fc1"),
    (r"\.ffn\.layers\.1", ".mlp.fc2"),
    (r"\.ffns\.0\.layers\.0\.0", ".fc1"),
    (r"\.ffns\.0\.layers\.1", ".fc2"),
    (r"input_convs\.(\d)\.conv", r"input_projections.\1.0"),
    (r"input_convs\.(\d)\.gn", r"input_projections.\1.1"),
    (r"(lateral|output)_convs\.0\.conv", r"\1.0"),
    (r"(lateral|output)_convs\.0\.gn", r"\1.1"),
    (r"\.lateral\.", ".adapter_1."),
    (r"\.output\.", ".layer_1."),
    (r"level_encoding\.weight", "level_embed"),
    (r"mask_feature", "mask_projection"),
    (r"(pixel_decoder.*)attentions\.0", r"\1self_attn"),
    (r"(pixel_decoder.*)norms\.0", r"\1self_attn_layer_norm"),
    (r"(pixel_decoder.*)norms\.1", r"\1final_layer_norm"),
    (r"attentions\.0\.attn", "cross_attn"),
    (r"attentions\.1\.attn\.in_proj_", "self_attn.{}_proj."),
    (r"attentions\.1\.attn", "self_attn"),
    (r"norms\.0", "cross_attn_layer_norm"),
    (r"norms\.1", "self_attn_layer_norm"),
    (r"norms\.2", "final_layer_norm"),
    (r"^panoptic_head\.pixel_decoder\.", PIXELS),
    (r"^panoptic_head\.cls_embed", "class_predictor"),
    (r"^panoptic_head\.query_embed", f"{QUERIES}queries_embedder"),
    (r"^panoptic_head\.query_feat", f"{QUERIES}queries_features"),
    (r"^panoptic_head\.level_embed", f"{QUERIES}level_embed"),
    (r"^panoptic_head\.transformer_decoder\.post_norm", f"{QUERIES}decoder.layernorm"),
    (r"^panoptic_head\.transformer_decoder\.", f"{QUERIES}decoder."),
    (r"^panoptic_head\.mask_embed\.", f"{QUERIES}decoder.mask_predictor.mask_embedder."),
)


class Detections(NamedTuple):
    """
    Objects of one picture.

    Attributes:
        labels (`torch.Tensor` of shape `(N,)`): classes, int64.
        scores (`torch.Tensor` of shape `(N,)`): confidences in [0, 1].
        boxes (`torch.Tensor` of shape `(N, 4)`): left, top, right and bottom in pixels, int64; the latter two are not inside.
        masks (`torch.Tensor` of shape `(N, H, W)`): pixels of each object, bool.
    """

    labels: torch.Tensor
    scores: torch.Tensor
    boxes: torch.Tensor
    masks: torch.Tensor


def detector_from_mmdet(state: dict[str, torch.Tensor], source: str) -> Mask2FormerForUniversalSegmentation:
    """
    A Mask2Former of transformers from weights of mmdet 2, in float32. Sizes are read off the weights.

    Args:
        state (`dict[str, torch.Tensor]`): mmdet's state dict.
        source (`str`): the checkpoint, for the message.

    Raises:
        ValueError: if it is no Mask2Former on a Swin.
    """
    try:
        config = _config(state)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"`{source}` is no Mask2Former on a Swin in mmdet's layout: {error!r}.") from error
    converted = {}
    for name, tensor in renamed(state, NAMES).items():
        if match := re.fullmatch(r"(.*hidden_states_norms\.stage)(\d)(.*)", name):
            name = f"{match[1]}{int(match[2]) + 1}{match[3]}"  # counted from one
        if match := re.fullmatch(r"(.*mask_embedder\.)(\d)(.*)", name):
            name = f"{match[1]}{int(match[2]) // 2}.0{match[3]}"  # activations are not counted
        if (
            ".downsample." in name
        ):  # four pixels: mmdet goes along rows within a channel, transformers along columns around it
            tensor = tensor.unflatten(-1, (-1, 2, 2)).movedim(-3, -1).transpose(-3, -2).flatten(-3).contiguous()
        if not name.endswith("relative_position_index"):
            converted[name] = tensor
    # What transformers has and does not use here
    width = config.backbone_config.hidden_size
    converted[f"{SWIN}swin.layernorm.weight"], converted[f"{SWIN}swin.layernorm.bias"] = torch.ones(width), torch.zeros(width)  # fmt: skip
    converted["criterion.empty_weight"] = torch.ones(len(state["panoptic_head.cls_embed.bias"]))
    return pretrained_from_state_dict(
        Mask2FormerForUniversalSegmentation, config, converted, source, torch.float32
    ).eval()


def _config(state: dict[str, torch.Tensor]) -> Mask2FormerConfig:
    def count(pattern: str) -> int:
        return len({match[1] for name in state if (match := re.match(pattern, name))})

    stages, first = range(count(r"backbone\.stages\.(\d+)\.")), "backbone.stages.{}.blocks.0."
    tables = [state[f"{first.format(stage)}attn.w_msa.relative_position_bias_table"] for stage in stages]
    width, _, patch, _ = state["backbone.patch_embed.projection.weight"].shape
    pixels, decoder = "panoptic_head.pixel_decoder.", "panoptic_head.transformer_decoder.layers."
    features = state[f"{pixels}input_convs.0.conv.weight"].shape[0]
    backbone = SwinConfig(
        embed_dim=width,
        patch_size=patch,
        depths=[count(rf"backbone\.stages\.{stage}\.blocks\.(\d+)\.") for stage in stages],
        num_heads=[table.shape[1] for table in tables],
        window_size=(round(len(tables[0]) ** 0.5) + 1) // 2,
        mlp_ratio=len(state[f"{first.format(0)}ffn.layers.0.0.bias"]) / width,
        out_features=[f"stage{stage + 1}" for stage in stages],
    )
    attention = f"{pixels}encoder.layers.0.attentions.0.attention_weights.bias"
    return Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=len(state["panoptic_head.cls_embed.bias"]) - 1,
        num_queries=len(state["panoptic_head.query_feat.weight"]),
        feature_size=features,
        hidden_dim=features,
        mask_feature_size=len(state[f"{pixels}mask_feature.bias"]),
        num_attention_heads=len(state[attention]) // (LEVELS * POINTS),
        encoder_layers=count(rf"{re.escape(pixels)}encoder\.layers\.(\d+)\."),
        encoder_feedforward_dim=len(state[f"{pixels}encoder.layers.0.ffns.0.layers.0.0.bias"]),
        decoder_layers=count(rf"{re.escape(decoder)}(\d+)\.") + 1,  # transformers counts the queries before the first
        dim_feedforward=len(state[f"{decoder}0.ffns.0.layers.0.0.bias"]),
    )


def read_pixels(images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """
    Pictures as the detector reads them.

    Args:
        images (`torch.Tensor` of shape `(N, 3, H, W)`): float, in [0, 1].

    Returns:
        `tuple`: pixels of shape `(N, 3, height, width)`, padded at the right and at the bottom, and height and width without that.
    """
    height, width = images.shape[-2:]
    scale = min(LONGER / max(height, width), SHORTER / min(height, width))
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    pixels = (images.clamp(0, 1) * 255).round()  # as a file would have them
    pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False).round()
    padding = (0, -size[1] % DIVISOR, 0, -size[0] % DIVISOR)
    return normalize(F.pad(pixels, padding, value=PADDING), MEAN, STD), size


@torch.no_grad()
def detect(detector: Mask2FormerForUniversalSegmentation, images: torch.Tensor) -> list[Detections]:
    """
    The objects of each picture, of which a query may be several, as in mmdet.

    Args:
        detector (`Mask2FormerForUniversalSegmentation`): from [`detector_from_mmdet`].
        images (`torch.Tensor` of shape `(N, 3, H, W)`): float, in [0, 1].
    """
    pixels, (height, width) = read_pixels(images)
    output = detector(pixels)
    found = []
    for classes, logits in zip(output.class_queries_logits, output.masks_queries_logits, strict=True):
        logits = F.interpolate(logits[None], pixels.shape[-2:], mode="bilinear", align_corners=False)
        logits = logits[..., :height, :width]
        logits = F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)[0]
        masks = logits > 0
        mask_scores = (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
        class_scores = classes.softmax(-1)[:, :-1]
        scores, index = class_scores.flatten().topk(min(MAX_DETECTIONS, class_scores.numel()))
        queries, labels = index // class_scores.shape[1], index % class_scores.shape[1]
        boxes = torch.cat([_edges(masks.any(1)), _edges(masks.any(2))], 1)[:, [0, 2, 1, 3]]
        found.append(Detections(labels, scores * mask_scores[queries], boxes[queries], masks[queries]))
    return found


def _edges(line: torch.Tensor) -> torch.Tensor:
    """First index and one past the last at which each row of `(N, length)` is true, zeros if it is nowhere."""
    start, end = line.int().argmax(1), line.shape[1] - line.int().flip(1).argmax(1)
    return torch.stack([start, end], 1) * line.any(1, keepdim=True)
