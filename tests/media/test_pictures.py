# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tapo_trl.media.pictures import (
    images_to_grid,
    images_to_pil,
    save_overview,
    tile_videos,
    video_to_gif,
    videos_to_strip,
)


class TestImageGrid:
    def test_cells_lie_row_by_row_and_the_rest_is_white(self):
        images = torch.stack([torch.full((3, 128, 128), value) for value in (0.0, 0.5, 1.0)])
        images[2, 0] = 0.0
        grid = np.asarray(images_to_grid(images, columns=2))
        assert grid.shape == (256, 256, 3)
        assert (grid[:128, :128] == 0).all()
        assert (grid[:128, 128:] == 128).all()
        assert (grid[128:, :128] == [0, 255, 255]).all()
        assert (grid[128:, 128:] == 255).all()

    @pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (4, 2, 2), (5, 2, 3), (9, 3, 3)])
    def test_default_layout_is_about_square(self, count, rows, columns):
        grid = images_to_grid(torch.zeros(count, 3, 128, 128))
        assert grid.size == (columns * 128, rows * 128)

    def test_small_images_are_enlarged_without_smoothing(self):
        images = torch.rand(1, 3, 32, 32)
        grid = np.asarray(images_to_grid(images))
        assert grid.shape == (128, 128, 3)
        assert (grid[::4, ::4] == np.asarray(images_to_pil(images)[0])).all()

    def test_values_are_clamped(self):
        pixels = np.asarray(images_to_pil(torch.tensor([[[[2.0]], [[-1.0]], [[0.5]]]]))[0])
        assert pixels.tolist() == [[[255, 0, 128]]]

    @pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8)])
    def test_wrong_shape(self, shape):
        with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
            images_to_pil(torch.zeros(shape))


def shades(*values, frames=3, size=128):
    """Videos of one shade each, which grows by 0.1 with every frame."""
    times = torch.arange(frames) / 10
    return torch.stack([(value + times)[None, :, None, None].expand(3, frames, size, size) for value in values])


class TestVideos:
    def test_strip_has_a_row_per_video_and_evenly_spaced_frames(self):
        strip = np.asarray(videos_to_strip(shades(0.0, 0.5, frames=5), columns=3))
        assert strip.shape == (256, 384, 3)
        cells = strip.reshape(2, 128, 3, 128, 3)
        assert (cells == cells[:, :1, :, :1]).all()
        assert cells[:, 0, :, 0, 0].tolist() == [[0, 51, 102], [128, 178, 230]], "frames 0, 2 and 4"

    @pytest.mark.parametrize(("frames", "columns"), [(3, 3), (6, 6), (81, 6)])
    def test_default_number_of_frames(self, frames, columns):
        assert videos_to_strip(shades(0.0, frames=frames, size=128) * 0).size == (columns * 128, 128)

    def test_large_frames_are_made_smaller(self):
        assert videos_to_strip(torch.zeros(2, 3, 2, 480, 832)).size == (2 * 320, 2 * 185)

    def test_tiles_lie_row_by_row_and_the_rest_is_white(self):
        video = tile_videos(shades(0.0, 0.2, 0.4))
        assert video.shape == (3, 3, 256, 256)
        for frame in range(3):
            corners = video[0, frame, [0, 0, -1, -1], [0, -1, 0, -1]]
            torch.testing.assert_close(corners, torch.tensor([0.0, 0.2, 0.4, 1 - frame / 10]) + frame / 10)

    def test_small_videos_are_enlarged(self):
        videos = torch.rand(1, 3, 2, 32, 64)
        tiled = tile_videos(videos)
        assert tiled.shape == (3, 2, 128, 256)
        assert torch.equal(tiled[:, :, ::4, ::4], videos[0])

    def test_gif(self):
        with Image.open(io.BytesIO(video_to_gif(torch.rand(3, 4, 600, 300), fps=8))) as gif:
            assert (gif.format, gif.n_frames, gif.size, gif.info["duration"]) == ("GIF", 4, (256, 512), 120)

    def test_overview_of_images_is_a_grid_alone(self, tmp_path):
        picture, video = save_overview(torch.rand(4, 3, 128, 128), tmp_path / "a")
        assert (picture.size, video) == ((256, 256), None)
        assert [path.name for path in tmp_path.iterdir()] == ["a.png"]

    @pytest.mark.parametrize("shape", [(3, 2, 8, 8), (1, 1, 2, 8, 8), (0, 3, 2, 8, 8)])
    @pytest.mark.parametrize("function", [videos_to_strip, tile_videos])
    def test_wrong_shape(self, function, shape):
        with pytest.raises(ValueError, match=r"\[B, 3, F, H, W\]"):
            function(torch.zeros(shape))
