# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Preference pairs with a rule that anything can learn: reddish images win over bluish ones."""

import io

import numpy as np
from datasets import Dataset
from PIL import Image


def color_pairs(number: int, seed: int = 0, size: int = 32) -> Dataset:
    rng = np.random.default_rng(seed)
    chosen, rejected = [], []
    for _ in range(number):
        red, blue = (rng.integers(0, 80, (size, size, 3), dtype=np.uint8) for _ in range(2))
        red[..., 0] += 150
        blue[..., 2] += 150
        chosen.append(Image.fromarray(red))
        rejected.append(Image.fromarray(blue))
    prompts = [f"thing {index % 4}" for index in range(number)]
    return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})


def latent_pairs(number: int, shape: tuple[int, ...] = (4, 8, 8), seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    latents = rng.normal(size=(2, number, *shape)).astype(np.float32)
    latents[0, :, 0] += 2
    latents[1, :, 0] -= 2
    prompts = [f"thing {index % 4}" for index in range(number)]
    return Dataset.from_dict({"prompt": prompts, "chosen": list(latents[0]), "rejected": list(latents[1])})


def mixed_pairs(number: int) -> Dataset:
    """As `color_pairs`, in PNG files of different shapes: square, twice as high as wide, twice as wide as high, ..."""
    shapes = [
        ((64, 64), (32, 32)),
        ((80, 40), (100, 50)),
        ((40, 80), (20, 40)),
        ((40, 80), (80, 40)),
        ((30, 60), (30, 60)),
    ]
    files = {"chosen": [], "rejected": []}
    for row, pair in enumerate(color_pairs(number)):
        for side, (height, width) in zip(files, shapes[row % len(shapes)], strict=True):
            buffer = io.BytesIO()
            pair[side].resize((width, height)).save(buffer, "PNG")
            files[side].append(buffer.getvalue())
    return Dataset.from_dict({"prompt": [f"thing {row % 4}" for row in range(number)], **files})
