# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Images or videos with their prompts: columns `prompt`, and `image` or `video`."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset

from ..policies import FlowPolicy
from .buckets import BucketedPairs
from .columns import check_prompts, refuse_transform
from .latents import ROW_COLUMN
from .preferences import DEFAULT_FPS, PreferencePairs, is_prepared, media_reader, prepare_pairs


MEDIA_COLUMNS = ("image", "video")


class MediaSamples(PreferencePairs):
    """
    Prompts whose image or video is read when it is asked for: a [`~data.preferences.PreferencePairs`] of one side.

    Args:
        dataset ([`~datasets.Dataset`]): columns `prompt`, and `image` or `video`.
        reader ([`ImageReader`], [`VideoReader`] or [`LatentReader`]): reads that column.
        name (`str`): what the dataset is called in error messages.
        column (`str`): `"image"` or `"video"`.
        skip_bad_files (`bool`, *optional*, defaults to `False`): see [`~data.preferences.PreferencePairs`].
    """

    noun = "sample"

    def __init__(self, dataset: Dataset, reader: Any, name: str, column: str, skip_bad_files: bool = False):
        self.sides = (column,)
        self.columns = ("prompt", ROW_COLUMN)
        self.reader, self.name, self.skip_bad_files = reader, name, skip_bad_files
        self.labels, self.swapped = np.ones(len(dataset)), np.zeros(len(dataset), dtype=bool)
        self._open(dataset)


def check_sample_dataset(dataset: Dataset | MediaSamples, name: str, modality: str | None = None) -> None:
    """
    Check what can be checked without reading a file: type, columns, emptiness, prompts.

    Args:
        dataset ([`~datasets.Dataset`]): images or videos with prompts. Its format does not matter.
        name (`str`): what the dataset is called in error messages.
        modality (`str`, *optional*): `"image"` or `"video"`, the column that is needed. Either by default.

    Raises:
        TypeError: if it is not a [`~datasets.Dataset`].
        ValueError: if rows are transformed when they are read, a column is missing, there are no rows, or a prompt cannot
            be used.
    """
    if not isinstance(dataset, (Dataset, PreferencePairs, BucketedPairs)):
        raise TypeError(
            f"`{name}` must be a `datasets.Dataset`, got `{type(dataset).__name__}`. A streamed dataset can be "
            "materialised with `Dataset.from_generator`."
        )
    if is_prepared(dataset):
        return
    refuse_transform(dataset, name)
    wanted = MEDIA_COLUMNS if modality is None else (modality,)
    if "prompt" not in dataset.column_names or not set(wanted) & set(dataset.column_names):
        raise ValueError(
            f"`{name}` needs the columns `prompt` and {' or '.join(f'`{column}`' for column in wanted)}, but has "
            f"{dataset.column_names}: rename yours with `dataset.rename_columns`."
        )
    check_prompts(dataset, name)


def prepare_sample_dataset(
    dataset: Dataset | MediaSamples,
    policy: FlowPolicy,
    height: int,
    width: int,
    num_frames: int | None = None,
    fps: float = DEFAULT_FPS,
    *,
    skip_bad_files: bool = False,
    short_videos: Literal["refuse", "uniform"] = "refuse",
    aspect_ratio_buckets: bool = False,
    cache_latents: bool = True,
    cache_dir: str | Path | None = None,
    batch_size: int | None = None,
    name: str = "dataset",
) -> Dataset | MediaSamples | BucketedPairs:
    """
    Bring images or videos with prompts into the form that training reads: a number per row, and latents or pixels.

    Arguments, what is returned and what is raised are those of [`~data.preferences.prepare_preference_dataset`], but for the
    columns: `prompt`, and `image` if `policy` makes images, `video` if it makes videos. The result has the column
    `image_latents` or `video_latents` in place of those of two sides.
    """
    check_sample_dataset(dataset, name, policy.modality)
    if is_prepared(dataset):
        return dataset
    reader = media_reader(policy, height, width, num_frames, fps, short_videos)
    samples = MediaSamples(dataset, reader, name, policy.modality, skip_bad_files)
    shape = tuple(policy.latent_shape(height, width, num_frames))
    return prepare_pairs(samples, policy, shape, aspect_ratio_buckets, cache_latents, cache_dir, batch_size)


class SampleCollator:
    """Collate prepared samples."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """
        Returns:
            `dict`: `row` (int64) of shape `(batch_size,)`; `image_latents` or `video_latents` of shape `(batch_size,
            *latent_shape)`, or `image` or `video`, pixels of shape `(batch_size, 3, [num_frames,] height, width)`; `prompt`, a
            list of strings.
        """
        columns = [
            name for name, value in examples[0].items() if isinstance(value, torch.Tensor) and name != ROW_COLUMN
        ]
        batch = {column: torch.stack([example[column] for example in examples]) for column in columns}
        batch["row"] = torch.tensor([int(example[ROW_COLUMN]) for example in examples])
        batch["prompt"] = [example["prompt"] for example in examples]
        return batch
