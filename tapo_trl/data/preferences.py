# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Preference pairs: columns `prompt`, `chosen`, `rejected` (images, videos or latents), optional `margin` and labels."""

import json
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm
from transformers.utils import logging

from ..files import atomic_write, cache_root
from ..policies import FlowPolicy
from .buckets import BucketedPairs, assign_buckets, bucket_sizes, cropped_share
from .columns import check_prompts, column_values, refuse_transform, without_decoding
from .dimensions import combine_dimensions
from .images import BadFileError, ImageReader
from .latents import LATENT_COLUMNS, ROW_COLUMN, SIDES, LatentReader, encode_pairs, is_encoded, latents_fingerprint
from .pairs import preset_hint
from .videos import UniformVideoReader, VideoReader


logger = logging.get_logger(__name__)

REQUIRED_COLUMNS = ("prompt", *SIDES)
CHOSEN_IS_BETTER, TIE = 1.0, 0.5
DEFAULT_FPS = 16

# Share of the images' area on average
_MUCH_CROPPED = 0.1

# Files that an error or a warning lists; it counts the others.
_MAX_LISTED = 20


class PreferencePairs(torch.utils.data.Dataset):
    """
    Preference pairs whose images or videos are read when they are asked for.

    Attributes:
        sides (`tuple[str, ...]`): columns of images or videos.
        noun (`str`): what a row is called in messages.

    Args:
        dataset ([`~datasets.Dataset`]): columns `prompt`, `chosen`, `rejected`, and optionally `margin` and labels.
        reader ([`ImageReader`], [`VideoReader`] or [`LatentReader`]): reads `chosen` and `rejected`.
        name (`str`): what the dataset is called in error messages.
        dimension_weights (`dict[str, float]`, *optional*): see [`prepare_preference_dataset`].
        skip_bad_files (`bool`, *optional*, defaults to `False`):
            whether the next pair takes the place of one whose file cannot be used. Otherwise that is an error.
    """

    sides: tuple[str, ...] = SIDES
    noun = "pair"

    def __init__(
        self,
        dataset: Dataset,
        reader: ImageReader | VideoReader | LatentReader,
        name: str,
        dimension_weights: Mapping[str, float] | None = None,
        skip_bad_files: bool = False,
    ):
        self.reader, self.name, self.skip_bad_files = reader, name, skip_bad_files
        self.labels = np.full(len(dataset), CHOSEN_IS_BETTER)
        self.swapped = np.zeros(len(dataset), dtype=bool)
        if dimension_weights is not None:
            preference = combine_dimensions(dataset, dimension_weights, name)
            self.labels = np.where(preference == 0, TIE, CHOSEN_IS_BETTER)
            self.swapped = preference < 0
        elif "label" in dataset.column_names:
            self.labels = np.array(column_values(dataset, "label"), dtype=float)
        extra = [column for column in ("margin",) if column in dataset.column_names]
        self.columns = ("prompt", ROW_COLUMN, "label", *extra)
        self._open(dataset, extra)

    def _open(self, dataset: Dataset, extra: Sequence[str] = ()) -> None:
        """Take the prompts, the images or videos, and the columns `extra`. No file is read."""
        chosen = dataset.with_format(None).select_columns(["prompt", *self.sides, *extra])
        self.dataset = without_decoding(chosen, self.sides)
        self.rows = list(range(len(dataset)))
        self.bad_files: dict[int, list[str]] = {}
        self.sizes = np.zeros((len(dataset), len(self.sides), 2), dtype=np.int32)  # of images, once they are checked

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """As [`~PreferencePairs.load`], or with `skip_bad_files` the next pair that can be read."""
        for offset in range(len(self)):
            try:
                return self.load(self.rows[(index + offset) % len(self)])
            except BadFileError as error:
                if not self.skip_bad_files:
                    raise
                logger.warning(f"The next {self.noun} takes the place of one that cannot be used. {error}")
        raise ValueError(f"No {self.noun} of `{self.name}` can be read.")

    def load(self, row: int) -> dict[str, Any]:
        """
        Read the pair in a row of the dataset, the preferred side as `chosen`.

        Returns:
            `dict`: `prompt`, `slrm_row`, `label`, `margin` if given, and what the reader makes of `chosen` and
            `rejected`.
        """
        example = self.dataset[row]
        columns = reversed(self.sides) if self.swapped[row] else self.sides
        media = {
            side: self.reader.load(example[column], self._place(row, column))
            for side, column in zip(self.sides, columns, strict=True)
        }
        return {**example, **media, ROW_COLUMN: row, "label": float(self.labels[row])}

    def drop_bad_files(self) -> None:
        """Check the headers of all files, and leave the pairs out whose files cannot be used."""
        for row in tqdm(self.rows, desc=f"Checking {self.name}", disable=None):
            example = self.dataset[row]
            for number, side in enumerate(self.sides):
                try:
                    size = self.reader.check(example[side], self._place(row, side))
                    if size is not None:
                        self.sizes[row, number] = size
                except BadFileError as error:
                    self.bad_files.setdefault(row, []).append(str(error))
        self.rows = [row for row in self.rows if row not in self.bad_files]

    def report_cropping(self) -> None:
        """Say so if much of the images will be cropped off, as far as their sizes are known."""
        sizes = self.sizes[self.rows]
        sizes = sizes[(sizes > 0).all(axis=(1, 2))]
        if len(sizes) == 0:
            return
        cropped = cropped_share(sizes, self.reader.height, self.reader.width)
        if cropped.mean() > _MUCH_CROPPED:
            ratios = sizes[..., 1] / sizes[..., 0]
            logger.warning(
                f"On average {cropped.mean():.0%} of an image of `{self.name}` is cropped off (at most {cropped.max():.0%}): "
                f"they are {ratios.min():.2f} to {ratios.max():.2f} times as wide as high, and {self.reader.height} x "
                f"{self.reader.width} (`height` x `width`) is read around their centre. `aspect_ratio_buckets=True` trains on "
                "about their own aspect ratios."
            )

    def report_bad_files(self, messages: list[str], number_left: int) -> None:
        """
        Say which files cannot be used.

        Args:
            messages (`list[str]`): one per file.
            number_left (`int`): number of pairs without them.

        Raises:
            BadFileError: if there are any, unless they may be skipped.
            ValueError: if no pair is left.
        """
        if not messages:
            return
        listed = [f"- {message}" for message in messages[:_MAX_LISTED]]
        if len(messages) > _MAX_LISTED:
            listed.append(f"- ... and {len(messages) - _MAX_LISTED} more")
        listed = "\n".join(listed)
        if not self.skip_bad_files:
            raise BadFileError(
                f"{len(messages)} of the files of `{self.name}` cannot be used:\n{listed}\nReplace them, or leave their "
                f"{self.noun}s out with `skip_bad_files=True`."
            )
        if number_left == 0:
            raise ValueError(f"`{self.name}` has no {self.noun} whose files can be used:\n{listed}")
        left_out = len(self.dataset) - number_left
        logger.warning(f"Left out {left_out} of the {len(self.dataset)} {self.noun}s of `{self.name}`:\n{listed}")

    def _place(self, row: int, column: str) -> str:
        return f"`{self.name}`, row {row}, column `{column}`"


def check_preference_dataset(
    dataset: Dataset | PreferencePairs, name: str, dimension_weights: Mapping[str, float] | None = None
) -> None:
    """
    Check what can be checked without reading a file: type, columns, emptiness, labels.

    Args:
        dataset ([`~datasets.Dataset`]): preference pairs. Its format does not matter.
        name (`str`): what the dataset is called in error messages.
        dimension_weights (`dict[str, float]`, *optional*): see [`prepare_preference_dataset`].

    Raises:
        TypeError: if it is not a [`~datasets.Dataset`].
        ValueError: if rows are transformed when they are read, a column is missing, there are no rows, or a prompt, margin
            or label cannot be used.
    """
    if not isinstance(dataset, (Dataset, PreferencePairs, BucketedPairs)):
        raise TypeError(
            f"`{name}` must be a `datasets.Dataset`, got `{type(dataset).__name__}`. A streamed dataset can be "
            "materialised with `Dataset.from_generator`."
        )
    if is_prepared(dataset):
        return
    refuse_transform(dataset, name)
    missing = [column for column in REQUIRED_COLUMNS if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"`{name}` lacks the columns {missing}; it has {dataset.column_names}. A preference dataset needs "
            f"{list(REQUIRED_COLUMNS)}: rename yours with `dataset.rename_columns`, or convert it with "
            f"`to_preference_pairs`.{preset_hint(dataset.column_names, 'preset')}"
        )
    check_prompts(dataset, name)
    if (
        "margin" in dataset.column_names
        and not np.isfinite(np.array(column_values(dataset, "margin"), dtype=float)).all()
    ):
        raise ValueError(f"The column `margin` of `{name}` must hold finite numbers; it has missing values or NaN.")
    if dimension_weights is not None:
        combine_dimensions(dataset, dimension_weights, name)
    elif "label" in dataset.column_names:
        wrong = set(column_values(dataset, "label")) - {CHOSEN_IS_BETTER, TIE}
        if wrong:
            raise ValueError(
                f"The column `label` of `{name}` must be 1 (`chosen` is better) or 0.5 (a tie), got "
                f"{sorted(wrong, key=str)[:3]}. Swap `chosen` and `rejected` where the second side is better."
            )


def is_prepared(dataset: Dataset | PreferencePairs | BucketedPairs) -> bool:
    """Whether [`prepare_preference_dataset`] made this dataset."""
    return isinstance(dataset, (PreferencePairs, BucketedPairs)) or ROW_COLUMN in dataset.column_names


def prepare_preference_dataset(
    dataset: Dataset | PreferencePairs,
    policy: FlowPolicy,
    height: int,
    width: int,
    num_frames: int | None = None,
    fps: float = DEFAULT_FPS,
    *,
    dimension_weights: Mapping[str, float] | None = None,
    skip_bad_files: bool = False,
    short_videos: Literal["refuse", "uniform"] = "refuse",
    aspect_ratio_buckets: bool = False,
    cache_latents: bool = True,
    cache_dir: str | Path | None = None,
    batch_size: int | None = None,
    name: str = "dataset",
) -> Dataset | PreferencePairs | BucketedPairs:
    """
    Bring preference pairs into the form that training reads: a number per row, labels, and latents or pixels.

    `chosen` and `rejected` are images ([`ImageReader`] says in which forms) if `policy` makes images, and videos
    ([`VideoReader`]) if it makes videos. Arrays of the latents' shape are taken as normalised latents, as the
    transformer sees them.

    Args:
        dataset ([`~datasets.Dataset`]): columns `prompt`, `chosen`, `rejected`, and optionally `margin` (by how much
            the preferred side must win), `label` (1, or 0.5 for a tie) and `label_<dimension>`.
        policy ([`FlowPolicy`]): policy whose VAE encodes.
        height (`int`): height in pixels.
        width (`int`): width in pixels.
        num_frames (`int`, *optional*): number of frames, for videos.
        fps (`float`, *optional*, defaults to `16`): frames per second, for videos.
        dimension_weights (`dict[str, float]`, *optional*):
            weights of the columns `label_<dimension>`, which take the place of `label`: the sign of their weighted sum
            (see [`combine_dimensions`]) says which side is preferred, 0 is a tie.
        skip_bad_files (`bool`, *optional*, defaults to `False`):
            whether to leave out the pairs with a file that is unreadable, damaged or too short.
        short_videos (`str`, *optional*, defaults to `"refuse"`):
            what becomes of videos that end before `num_frames` at `fps` are there: `"refuse"` counts them among the files
            that cannot be used; `"uniform"` takes their frames at equal distances ([`UniformVideoReader`]).
        aspect_ratio_buckets (`bool`, *optional*, defaults to `False`):
            whether images keep about their aspect ratio: each pair is cropped to the one of [`bucket_sizes`] that is nearest
            to both of its images, instead of `height` x `width`.
        cache_latents (`bool`, *optional*, defaults to `True`):
            encode everything now, into a file that later runs re-use. Otherwise the headers of the files are checked
            now, and the batches encoded when they are needed.
        cache_dir (`str` or `Path`, *optional*): root of the cache. Defaults to `tapo_trl` in the Hugging Face home.
        batch_size (`int`, *optional*):
            number of pairs that the VAE encodes at once. Defaults to 8 pairs of images and 1 of videos.
        name (`str`, *optional*): what the dataset is called in error messages and progress bars.

    Returns:
        [`~datasets.Dataset`]: columns `prompt`, `slrm_row` (its number), `label`, `margin` if given, `chosen_latents`
        and `rejected_latents` (float32). Without `cache_latents`, [`PreferencePairs`] with pixels instead of latents. With
        `aspect_ratio_buckets`, [`BucketedPairs`] of those.

    Raises:
        BadFileError: if files cannot be used and `skip_bad_files` is not set; the message lists them.
        ValueError: if an entry is not of the right kind; the message names its row.
    """
    check_preference_dataset(dataset, name, dimension_weights)
    if is_prepared(dataset):
        return dataset
    reader = media_reader(policy, height, width, num_frames, fps, short_videos)
    pairs = PreferencePairs(dataset, reader, name, dimension_weights, skip_bad_files)
    shape = tuple(policy.latent_shape(height, width, num_frames))
    return prepare_pairs(pairs, policy, shape, aspect_ratio_buckets, cache_latents, cache_dir, batch_size)


def media_reader(
    policy: FlowPolicy, height: int, width: int, num_frames: int | None, fps: float, short_videos: str
) -> ImageReader | VideoReader:
    """What reads the images or videos of a policy. Arguments are those of [`prepare_preference_dataset`]."""
    if policy.modality == "video":
        video_reader = {"refuse": VideoReader, "uniform": UniformVideoReader}[short_videos]
        return video_reader(height, width, num_frames, fps)
    if short_videos != "refuse":
        raise ValueError(f"`short_videos={short_videos!r}` has no effect on a policy that makes images.")
    return ImageReader(height, width)


def prepare_pairs(
    pairs: PreferencePairs,
    policy: FlowPolicy,
    shape: tuple[int, ...],
    aspect_ratio_buckets: bool,
    cache_latents: bool,
    cache_dir: str | Path | None,
    batch_size: int | None = None,
) -> Dataset | PreferencePairs | BucketedPairs:
    """
    Check or encode the files of pairs, which become ready for a training.

    Args:
        pairs ([`PreferencePairs`]): the pairs.
        shape (`tuple[int, ...]`): shape of one latent.

    The others, what is returned and what is raised are those of [`prepare_preference_dataset`].
    """
    is_video, skip_bad_files = policy.modality == "video", pairs.skip_bad_files
    holds_latents = _holds_latents(pairs, shape)
    if holds_latents:
        pairs.reader = LatentReader(shape)

    folder = cache_root(cache_dir) / "latents"
    cache_file = folder / f"{latents_fingerprint(pairs, policy)}.arrow"
    cache_latents = cache_latents or holds_latents
    batch_size = batch_size or (1 if is_video else 8)
    if aspect_ratio_buckets:
        if is_video or holds_latents:
            raise ValueError("`aspect_ratio_buckets=True` is for images, not for videos or latents.")
        return _prepare_buckets(pairs, policy, cache_file, cache_latents, batch_size)
    if not holds_latents and not (cache_latents and is_encoded(cache_file)):
        pairs.drop_bad_files()
        pairs.report_cropping()
        if not cache_latents or not skip_bad_files:
            messages = [message for messages in pairs.bad_files.values() for message in messages]
            pairs.report_bad_files(messages, len(pairs))
    if not cache_latents:
        return pairs
    latents, messages = encode_pairs(pairs, policy, shape, cache_file, batch_size)
    pairs.report_bad_files(messages, len(latents))
    return latents


def _prepare_buckets(
    pairs: PreferencePairs, policy: FlowPolicy, cache_file: Path, cache_latents: bool, batch_size: int
) -> BucketedPairs:
    """The pairs in one dataset per size; with `cache_latents`, files beside `cache_file`, one of which tells the sizes."""
    record = cache_file.with_suffix(".buckets.json")
    if cache_latents and record.exists():
        found = json.loads(record.read_text(encoding="utf-8"))
    else:
        pairs.drop_bad_files()
        sizes = bucket_sizes(policy, pairs.reader.height, pairs.reader.width)
        rows = np.array(pairs.rows, dtype=int)
        assigned = assign_buckets(pairs.sizes[rows], sizes)
        buckets = [(size, rows[assigned == index].tolist()) for index, size in enumerate(sizes)]
        messages = [message for messages in pairs.bad_files.values() for message in messages]
        found = {"buckets": [bucket for bucket in buckets if bucket[1]], "bad_files": messages}
        if not cache_latents or not pairs.skip_bad_files:
            pairs.report_bad_files(messages, len(rows))
        if cache_latents:
            record.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(record) as aside:
                aside.write_text(json.dumps(found), encoding="utf-8")
    parts, messages = [], found["bad_files"]
    for (height, width), rows in found["buckets"]:
        part = copy(pairs)
        part.reader, part.rows, part.bad_files = ImageReader(height, width), rows, {}
        if cache_latents:
            key = Hasher.hash([cache_file.stem, height, width, rows])
            shape = tuple(policy.latent_shape(height, width))
            part, damaged = encode_pairs(part, policy, shape, cache_file.with_name(f"{key}.arrow"), batch_size)
            messages = [*messages, *damaged]
        parts.append(part)
    parts = [part for part in parts if len(part) > 0]
    if cache_latents:
        pairs.report_bad_files(messages, sum(len(part) for part in parts))
    return BucketedPairs(parts)


def _holds_latents(pairs: PreferencePairs, shape: tuple[int, ...]) -> bool:
    """Whether the first row has latents of this shape. Arrays of floating point numbers can be nothing else."""
    values = [pairs.dataset[0][side] for side in pairs.sides]
    if all(isinstance(value, (np.ndarray, list)) and np.shape(value) == shape for value in values):
        return True
    for side, value in zip(pairs.sides, values, strict=True):
        if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating):
            raise ValueError(
                f"`{pairs.name}`, row 0, column `{side}`: an array of shape {value.shape} and type {value.dtype} is "
                f"neither a latent of shape {shape} nor `uint8` pixels. Latents must have the shape that `height`, "
                "`width` and `num_frames` ask for."
            )
    return False


class PreferencePairCollator:
    """Collate prepared pairs."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """
        Returns:
            `dict`: `row` (int64) and `label` (float32) of shape `(batch_size,)`; `chosen_latents` and
            `rejected_latents` of shape `(batch_size, *latent_shape)`, or `chosen` and `rejected`, pixels of shape
            `(batch_size, 3, [num_frames,] height, width)`; `margin` if given; `prompt`, a list of strings.
        """
        batch = {
            "row": torch.tensor([int(example[ROW_COLUMN]) for example in examples]),
            "label": torch.tensor([float(example["label"]) for example in examples]),
        }
        for column in LATENT_COLUMNS if LATENT_COLUMNS[0] in examples[0] else SIDES:
            batch[column] = torch.stack([example[column] for example in examples])
        if "margin" in examples[0]:
            batch["margin"] = torch.tensor([float(example["margin"]) for example in examples])
        batch["prompt"] = [example["prompt"] for example in examples]
        return batch
