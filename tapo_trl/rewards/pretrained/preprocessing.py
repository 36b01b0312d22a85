# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""Image preprocessing of scorers, on float tensors: it is differentiable, and needs neither PIL nor torchvision."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def resize(images: torch.Tensor, size: tuple[int, int], clamp: bool = True) -> torch.Tensor:
    """
    Bicubic resampling with antialiasing.

    Args:
        images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): float, in [0, 1].
        size (`tuple[int, int]`): new height and width.
        clamp (`bool`, *optional*, defaults to `True`):
            whether to cut values that overshoot [0, 1] after each direction, as PIL does, with which this agrees to 2/255. A
            scorer whose original resizes float tensors leaves them.

    Returns:
        `torch.Tensor` of shape `(batch_size, 3, *size)`, float32. Images that have this size are returned as they are.
    """
    images = images.float()
    passes = [(images.shape[-2], size[1]), size] if clamp else [size]
    for new in passes:
        if new != tuple(images.shape[-2:]):
            images = F.interpolate(images, size=new, mode="bicubic", align_corners=False, antialias=True)
            images = images.clamp(0, 1) if clamp else images
    return images


def resize_shortest_edge(images: torch.Tensor, edge: int) -> torch.Tensor:
    """[`resize`] the shorter side to `edge` pixels; the longer one is rounded down."""
    height, width = images.shape[-2:]
    shorter = min(height, width)
    return resize(images, (edge * height // shorter, edge * width // shorter))


def resize_longest_edge(images: torch.Tensor, edge: int, clamp: bool = True) -> torch.Tensor:
    """[`resize`] the longer side to `edge` pixels; the shorter one is rounded to the nearest."""
    height, width = images.shape[-2:]
    scale = edge / max(height, width)
    return resize(images, (max(1, round(height * scale)), max(1, round(width * scale))), clamp)


def pad_to_square(images: torch.Tensor, fill: Sequence[float] = (0.0, 0.0, 0.0)) -> torch.Tensor:
    """
    Pad the shorter side on both ends, so that the image stays in the middle; an odd pixel goes to the bottom or right.

    Args:
        images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): images.
        fill (`Sequence[float]`, *optional*, defaults to black): value of each channel.

    Returns:
        `torch.Tensor` of shape `(batch_size, 3, side, side)`.
    """
    height, width = images.shape[-2:]
    side = max(height, width)
    if height == width:
        return images
    square = torch.tensor(fill, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    square = square.expand(len(images), 3, side, side).clone()
    top, left = (side - height) // 2, (side - width) // 2
    square[..., top : top + height, left : left + width] = images
    return square


def center_crop(images: torch.Tensor, edge: int, rounding: Literal["down", "nearest"] = "down") -> torch.Tensor:
    """
    Cut a square of `edge` pixels out of the middle. Where a margin is odd, transformers rounds it `"down"`, and torchvision to
    the `"nearest"` even number.
    """
    top, left = ((side - edge) // 2 if rounding == "down" else round((side - edge) / 2) for side in images.shape[-2:])
    return images[..., top : top + edge, left : left + edge]


def normalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Subtract the mean of each channel and divide by its standard deviation."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return (images - mean) / std


def clip_pixel_values(
    images: torch.Tensor,
    image_size: int,
    image_mean: Sequence[float] = CLIP_MEAN,
    image_std: Sequence[float] = CLIP_STD,
) -> torch.Tensor:
    """
    What CLIP's image processor does: the shorter side is scaled to `image_size` (bicubic), the centre cut out, and the
    channels normalised.

    Args:
        images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): float, in [0, 1].
        image_size (`int`): height and width that the CLIP reads.
        image_mean (`Sequence[float]`, *optional*): mean of each channel. Defaults to OpenAI's.
        image_std (`Sequence[float]`, *optional*): standard deviation of each channel. Defaults to OpenAI's.

    Returns:
        `torch.Tensor` of shape `(batch_size, 3, image_size, image_size)`, float32.
    """
    images = resize_shortest_edge(images.float().clamp(0, 1), image_size)
    return normalize(center_crop(images, image_size), image_mean, image_std)
