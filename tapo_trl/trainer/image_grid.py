# Copyright 2026 The tapo_trl authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from PIL import Image


MIN_CELL_SIZE = 128


def images_to_pil(images: torch.Tensor) -> list[Image.Image]:
    """
    Converts a batch of images to PIL.

    Args:
        images (`torch.Tensor`): Images of shape `[B, 3, H, W]`, float, in [0, 1], on any device.

    Returns:
        `list[PIL.Image.Image]`: `B` RGB images of 8 bits per channel.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"`images` must have the shape [B, 3, H, W], but it has the shape {list(images.shape)}.")
    array = VaeImageProcessor.pt_to_numpy(images.detach().float().clamp(0, 1))
    return VaeImageProcessor.numpy_to_pil(array)


def images_to_grid(images: torch.Tensor, columns: int | None = None) -> Image.Image:
    """
    Lays a batch of images out in one picture, row by row. Small images are enlarged by an integer factor, without
    smoothing, so that a cell has at least 128 pixels a side; cells that are left over stay white.

    Args:
        images (`torch.Tensor`): Images of shape `[B, 3, H, W]`, float, in [0, 1].
        columns (`int`, *optional*): Number of columns. The default is the smallest number that makes the grid as wide
            as it is high, or wider.

    Returns:
        `PIL.Image.Image`: The grid.
    """
    cells = images_to_pil(images)
    if not cells:
        raise ValueError("`images` is empty: a grid needs at least one image.")
    width, height = cells[0].size
    factor = -(-MIN_CELL_SIZE // min(width, height))
    if factor > 1:
        cells = [cell.resize((width * factor, height * factor), Image.Resampling.NEAREST) for cell in cells]
    if columns is None:
        columns = next(n for n in range(1, len(cells) + 1) if n * n >= len(cells))
    rows = -(-len(cells) // columns)
    blank = Image.new("RGB", cells[0].size, "white")
    return make_image_grid(cells + [blank] * (rows * columns - len(cells)), rows=rows, cols=columns)
