# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Pieces that the scripts of this folder share: reading the data set, writing picture grids, saving atomically."""

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from PIL import Image


HERE = Path(__file__).resolve().parent
STYLES = ("noto", "twemoji", "fluent")


def load_images(path: Path | str, split: str | None = None) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """Reads a parquet file of `build_dataset.py`: images [N, 3, 64, 64] in [0, 1], prompts, style numbers [N]."""
    dataset = load_dataset("parquet", data_files=str(path), split="train")
    if split is not None:
        dataset = dataset.select([row for row, value in enumerate(dataset["split"]) if value == split])
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in dataset["image"]])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return images, list(dataset["prompt"]), torch.tensor([STYLES.index(style) for style in dataset["style"]])


def save_grid(images: torch.Tensor, path: Path | str, columns: int) -> None:
    """Writes images [N, 3, H, W] in [0, 1] as one PNG with `columns` pictures per row."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    canvas = torch.ones(3, rows * height, columns * width)
    for i, image in enumerate(images.detach().float().clamp(0, 1).cpu()):
        top, left = (i // columns) * height, (i % columns) * width
        canvas[:, top : top + height, left : left + width] = image
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((canvas.permute(1, 2, 0) * 255).round().byte().numpy()).save(path)


def replace_folder(source: Path, target: Path) -> None:
    """Puts the finished folder `source` in the place of `target`, so that a reader never meets half a folder."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(source, target)
    shutil.rmtree(old, ignore_errors=True)


def save_atomically(state: dict, path: Path) -> None:
    """`torch.save` through a temporary file and a rename."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)
