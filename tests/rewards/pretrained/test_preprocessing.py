# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch
from PIL import Image

from tapo_trl.rewards.pretrained.preprocessing import (
    center_crop,
    normalize,
    pad_to_square,
    resize,
    resize_longest_edge,
    resize_shortest_edge,
)


def make_picture(height, width):
    """Edges, waves and noise, uint8."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    waves = 127 + 100 * np.sin(rows / 3)[..., None] * np.cos(columns / np.array([2, 5, 11])[:, None, None]).transpose(
        1, 2, 0
    )
    picture = waves + generator.normal(0, 20, (height, width, 3))
    picture[height // 4 : height // 2, width // 4 : width // 2] = (255, 0, 40)
    return picture.clip(0, 255).astype(np.uint8)


def to_tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255


SIZES = [(512, 512), (768, 768), (480, 832), (333, 417), (100, 150)]


class TestResize:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("new", [(224, 224), (160, 300)])
    def test_against_pil(self, size, new):
        picture = make_picture(*size)
        expected = to_tensor(Image.fromarray(picture).resize(new[::-1], Image.Resampling.BICUBIC))
        found = resize(to_tensor(picture), new)
        assert (found - expected).abs().max() <= 2 / 255
        assert found.min() >= 0 and found.max() <= 1

    def test_overshoots_may_stay(self):
        edge = torch.zeros(1, 3, 8, 8)
        edge[..., 4:] = 1
        assert resize(edge, (16, 16), clamp=False).max() > 1.01

    def test_same_size(self):
        images = torch.rand(1, 3, 5, 6)
        assert resize(images, (5, 6)) is images

    @pytest.mark.parametrize(
        ("size", "new"), [((480, 832), (224, 388)), ((832, 480), (388, 224)), ((7, 7), (224, 224))]
    )
    def test_shortest_edge(self, size, new):
        assert resize_shortest_edge(torch.rand(1, 3, *size), 224).shape[-2:] == new

    @pytest.mark.parametrize(
        ("size", "new"),
        [((480, 832), (129, 224)), ((832, 480), (224, 129)), ((7, 7), (224, 224)), ((1, 600), (1, 224))],
    )
    def test_longest_edge(self, size, new):
        assert resize_longest_edge(torch.rand(1, 3, *size), 224).shape[-2:] == new


def test_pad_to_square():
    images = torch.rand(2, 3, 4, 7)
    found = pad_to_square(images, (0.1, 0.2, 0.3))
    assert found.shape == (2, 3, 7, 7)
    torch.testing.assert_close(found[:, :, 1:5], images)
    for channel, value in enumerate((0.1, 0.2, 0.3)):
        assert (found[:, channel, [0, 5, 6]] == value).all()
    torch.testing.assert_close(pad_to_square(images.transpose(2, 3))[..., 1:5], images.transpose(2, 3))


@pytest.mark.parametrize(("rounding", "first"), [("down", 1), ("nearest", 2)])
def test_odd_margins_of_crops(rounding, first):
    row = torch.arange(7.0).expand(1, 3, 7, 7)
    found = center_crop(row, 4, rounding)
    assert found.shape == (1, 3, 4, 4) and found[0, 0, 0].tolist() == [first + step for step in range(4)]


def test_normalize():
    found = normalize(torch.full((1, 3, 2, 2), 0.5), (0.5, 0.25, 0.0), (1.0, 0.5, 0.25))
    assert found[0, :, 0, 0].tolist() == [0.0, 0.5, 2.0]


def test_gradients():
    images = torch.rand(1, 3, 20, 30, requires_grad=True)
    pad_to_square(resize_longest_edge(images, 12)).sum().backward()
    assert (images.grad.abs().flatten(1).sum() > 0).all() and images.grad.isfinite().all()
