# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tapo_trl.rewards.pretrained.preprocessing import CLIP_MEAN, CLIP_STD
from tapo_trl.rewards.pretrained.qwen2_vl import FACTOR, patchify, read_frames, smart_resize

from .fixtures import recipes


PIXELS = 448 * 448


@pytest.mark.parametrize(
    ("side", "expected"), [(256, 448), (448, 448), (512, 448), (768, 420), (1024, 448), (1536, 420)]
)
def test_size_of_squares_in_hpsv3(side, expected):
    """With both limits equal, rounding errors decide."""
    assert smart_resize(side, side, FACTOR, PIXELS, PIXELS) == (expected, expected)


def test_a_narrow_picture():
    with pytest.raises(ValueError, match="aspect ratio must be smaller than 200"):
        read_frames(torch.rand(1, 3, 4, 1000), PIXELS, PIXELS)


@pytest.mark.parametrize("size", [(448, 448), (420, 420), (84, 140)])
def test_patches_are_those_of_transformers(size):
    image = Image.fromarray(recipes.picture(*size, 1))
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=PIXELS)
    expected = processor(image, return_tensors="pt")
    pixels = recipes.as_pixels(recipes.picture(*size, 1))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    video = ((pixels - mean) / std)[None, :, None].expand(-1, -1, 2, -1, -1)
    patches, grid = patchify(video)
    assert torch.equal(grid, expected["image_grid_thw"])
    torch.testing.assert_close(patches, expected["pixel_values"], atol=1e-6, rtol=0)


def test_order_of_patches():
    """Each patch holds both frames, frame by frame within a channel, and the four that are merged follow each other."""
    video = torch.arange(2 * 3 * 4 * 56 * 84).view(2, 3, 4, 56, 84).float()
    patches, grid = patchify(video)
    assert grid.tolist() == [[2, 4, 6], [2, 4, 6]]
    patches = patches.view(
        2, 2, 2, 3, 2, 2, 3, 2, 14, 14
    )  # video, time, block row and column, row, column, channel, frame
    torch.testing.assert_close(patches[1, 1, 1, 2, 0, 1, 2, 1], video[1, 2, 3, 28:42, 70:84])
    torch.testing.assert_close(patches[0, 0, 0, 1, 1, 0, 0, 0], video[0, 0, 0, 14:28, 28:42])


@pytest.mark.parametrize("size", [(512, 512), (768, 768), (256, 256), (480, 832), (300, 200)])
def test_pixels_are_those_of_pil(size):
    array = recipes.picture(*size, 5)
    height, width = smart_resize(*size, FACTOR, PIXELS, PIXELS)
    resized = Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)
    expected = 255 * recipes.as_pixels(np.asarray(resized).copy())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    found = read_frames(recipes.as_pixels(array)[None], PIXELS, PIXELS)[0] * std + mean
    assert (255 * found - expected).abs().max() <= 2
