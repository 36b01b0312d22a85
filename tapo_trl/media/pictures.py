# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Samples as pictures and films that can be looked at: grids of images, strips of frames, videos side by side."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from ..data.videos import write_video


MIN_CELL_SIZE = 128
MAX_STRIP_CELL_SIZE = 320
STRIP_COLUMNS = 6
LABEL_SIZE, GAP, MARK = 14, 4, "#0a8f3c"


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
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in pixels]


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
    factor = _enlargement(*cells[0].size)
    if factor > 1:
        width, height = cells[0].size
        cells = [cell.resize((width * factor, height * factor), Image.Resampling.NEAREST) for cell in cells]
    columns = columns or _square_columns(len(cells))
    rows = -(-len(cells) // columns)
    width, height = cells[0].size
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for number, cell in enumerate(cells):
        grid.paste(cell, (number % columns * width, number // columns * height))
    return grid


def labelled_grid(
    cells: Sequence[Sequence[Image.Image]],
    rows: Sequence[str],
    columns: Sequence[str],
    captions: Sequence[Sequence[str]] | None = None,
    marked: Sequence[Sequence[bool]] | None = None,
) -> Image.Image:
    """
    Pictures of one size as a table, small ones enlarged as by [`images_to_grid`].

    Args:
        cells (`Sequence[Sequence[PIL.Image.Image]]`): a list of pictures per row.
        rows (`Sequence[str]`): labels on the left.
        columns (`Sequence[str]`): labels above.
        captions (`Sequence[Sequence[str]]`, *optional*): a line under each picture.
        marked (`Sequence[Sequence[bool]]`, *optional*): which pictures get a frame.

    Returns:
        `PIL.Image.Image`: the table.
    """
    width, height = cells[0][0].size
    factor = _enlargement(height, width)
    width, height = width * factor, height * factor
    font = ImageFont.load_default(LABEL_SIZE)
    longest, word = (max(map(font.getlength, texts)) for texts in (rows, " ".join(rows).split()))
    left = round(max(word, min(longest, width))) + 2 * GAP
    labels = [_wrapped(label, font, left - 2 * GAP) for label in rows]
    headers = [_wrapped(label, font, width) for label in columns]
    line = sum(font.getmetrics())
    top = GAP + line * max(header.count("\n") + 1 for header in headers)
    step = height + GAP + (line if captions is not None else 0)
    table = Image.new("RGB", (left + len(columns) * (width + GAP), top + len(rows) * step), "white")
    pen = ImageDraw.Draw(table)
    for column, header in enumerate(headers):
        pen.multiline_text((left + column * (width + GAP), 0), header, "black", font)
    for row, label in enumerate(labels):
        y = top + row * step
        pen.multiline_text((GAP, y), label, "black", font)
        for column, cell in enumerate(cells[row]):
            x = left + column * (width + GAP)
            table.paste(cell.resize((width, height), Image.Resampling.NEAREST), (x, y))
            if marked is not None and marked[row][column]:
                pen.rectangle((x, y, x + width - 1, y + height - 1), outline=MARK, width=3)
            if captions is not None:
                pen.text((x, y + height), captions[row][column], "black", font)
    return table


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Lines of whole words that are no wider, as far as single words allow it."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def videos_to_strip(videos: torch.Tensor, columns: int | None = None) -> Image.Image:
    """
    One picture of a batch of videos: a row for each, with evenly spaced frames from the first to the last. Large frames
    are made smaller, so that a cell has at most 320 pixels a side.

    Args:
        videos (`torch.Tensor`): Videos of shape `[B, 3, F, H, W]`, float, in [0, 1].
        columns (`int`, *optional*): Number of frames of each video, 6 or all of fewer by default.

    Returns:
        `PIL.Image.Image`: The strip.
    """
    _check_videos(videos)
    num_frames, height, width = videos.shape[2:]
    columns = min(columns or STRIP_COLUMNS, num_frames)
    frames = torch.linspace(0, num_frames - 1, columns).round().long()
    images = videos[:, :, frames].transpose(1, 2).flatten(0, 1).float()
    scale = MAX_STRIP_CELL_SIZE / max(height, width)
    if scale < 1:
        size = (round(height * scale), round(width * scale))
        images = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
    return images_to_grid(images, columns)


def tile_videos(videos: torch.Tensor, columns: int | None = None) -> torch.Tensor:
    """
    Puts a batch of videos side by side into one, laid out and enlarged as by [`images_to_grid`].

    Args:
        videos (`torch.Tensor`): Videos of shape `[B, 3, F, H, W]`, float, in [0, 1].
        columns (`int`, *optional*): Number of columns; about the square root of the number of videos by default.

    Returns:
        `torch.Tensor`: One video of shape `[3, F, rows * H, columns * W]`.
    """
    _check_videos(videos)
    factor = _enlargement(*videos.shape[3:])
    videos = videos.repeat_interleave(factor, dim=3).repeat_interleave(factor, dim=4)
    columns = columns or _square_columns(len(videos))
    rows = -(-len(videos) // columns)
    blank = videos.new_ones(rows * columns - len(videos), *videos.shape[1:])
    cells = torch.cat([videos, blank]).unflatten(0, (rows, columns))
    return cells.permute(2, 3, 0, 4, 1, 5).flatten(4, 5).flatten(2, 3)


def video_to_gif(video: torch.Tensor, fps: float, max_size: int = 512) -> bytes:
    """
    A video as an animated GIF, which is what TensorBoard shows.

    Args:
        video (`torch.Tensor`): Video of shape `[3, F, H, W]`, float, in [0, 1].
        fps (`float`): Frames per second.
        max_size (`int`, *optional*, defaults to `512`): A larger video is made smaller.

    Returns:
        `bytes`: The encoded file.
    """
    frames = images_to_pil(video.transpose(0, 1))
    for frame in frames:
        frame.thumbnail((max_size, max_size))
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    return buffer.getvalue()


def save_overview(
    samples: torch.Tensor, stem: Path, columns: int | None = None, fps: float | None = None
) -> tuple[Image.Image, torch.Tensor | None]:
    """
    Write all samples at a glance: images as a grid, `stem.png`; videos as a strip of frames, `stem.png`, and side by
    side, `stem.mp4`.

    Args:
        samples (`torch.Tensor`): Images `[B, 3, H, W]` or videos `[B, 3, F, H, W]`, float, in [0, 1].
        stem (`Path`): Name of the files without a suffix; the folder is there.
        columns (`int`, *optional*): Columns of the grid, or of the videos side by side.
        fps (`float`, *optional*): Frames per second; needed for videos.

    Returns:
        `tuple[PIL.Image.Image, torch.Tensor | None]`: The grid or the strip, and the video, if it is one.
    """
    video = tile_videos(samples, columns) if samples.ndim == 5 else None
    picture = images_to_grid(samples, columns) if video is None else videos_to_strip(samples)
    picture.save(stem.with_suffix(".png"))
    if video is not None:
        write_video(stem.with_suffix(".mp4"), video, fps)
    return picture, video


def resize_samples(samples: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """
    Samples in another size, to be shown beside others.

    Args:
        samples (`torch.Tensor`): Images `[B, 3, H, W]` or videos `[B, 3, F, H, W]`, float, in [0, 1].
        size (`tuple[int, ...]`): New height and width, or frames, height and width.
    """
    if samples.shape[2:] == tuple(size):
        return samples
    return F.interpolate(samples, tuple(size), mode="area")


def _check_videos(videos: torch.Tensor) -> None:
    if videos.ndim != 5 or videos.shape[1] != 3 or len(videos) == 0:
        raise ValueError(f"`videos` must have the shape [B, 3, F, H, W], but it has the shape {list(videos.shape)}.")


def _enlargement(height: int, width: int) -> int:
    """The integer factor that makes the shorter side at least 128 pixels."""
    return -(-MIN_CELL_SIZE // min(width, height))


def _square_columns(count: int) -> int:
    return next(n for n in range(1, count + 1) if n * n >= count)
