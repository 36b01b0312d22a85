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

"""Preference pairs: columns `prompt`, `chosen`, `rejected` (images or latents), optional `margin` and `label`."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Array3D, Array4D, Dataset, Features, Image, Value
from datasets.fingerprint import Hasher
from huggingface_hub.constants import HF_HOME
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

from ..policies import FlowPolicy


REQUIRED_COLUMNS = ("prompt", "chosen", "rejected")
LATENT_COLUMNS = ("chosen_latents", "rejected_latents")
ROW_COLUMN = "slrm_row"
CHOSEN_IS_BETTER, TIE = 1.0, 0.5


class NumberedPairs(torch.utils.data.Dataset):
    """
    Pairs whose images are read and encoded batch by batch. Adding a column to the dataset itself would copy its images.

    Args:
        pairs ([`~datasets.Dataset`]): columns `prompt`, `chosen`, `rejected`, and optionally `margin` and `label`.
    """

    def __init__(self, pairs: Dataset):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"label": CHOSEN_IS_BETTER, **self.pairs[row], ROW_COLUMN: row}


def check_preference_dataset(dataset: Dataset | NumberedPairs, name: str) -> None:
    """
    Check what can be checked without reading an image: type, columns, emptiness, labels.

    Args:
        dataset ([`~datasets.Dataset`]): preference pairs.
        name (`str`): what the dataset is called in error messages.

    Raises:
        TypeError: if it is not a [`~datasets.Dataset`].
        ValueError: if a column is missing, there are no rows, or a prompt, margin or label cannot be used.
    """
    if not isinstance(dataset, (Dataset, NumberedPairs)):
        raise TypeError(
            f"`{name}` must be a `datasets.Dataset`, got `{type(dataset).__name__}`. A streamed dataset can be "
            "materialised with `Dataset.from_generator`."
        )
    if is_prepared(dataset):
        return
    missing = [column for column in REQUIRED_COLUMNS if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"`{name}` lacks the columns {missing}; it has {dataset.column_names}. A preference dataset needs "
            f"{list(REQUIRED_COLUMNS)}: rename yours with `dataset.rename_columns`."
        )
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty.")
    for row, prompt in enumerate(dataset["prompt"]):
        if not isinstance(prompt, str):
            raise ValueError(f"`{name}`, row {row}: `prompt` must be a string, got {prompt!r}.")
    if "margin" in dataset.column_names and not np.isfinite(np.array(dataset["margin"], dtype=float)).all():
        raise ValueError(f"The column `margin` of `{name}` must hold finite numbers; it has missing values or NaN.")
    if "label" in dataset.column_names:
        wrong = set(dataset["label"]) - {CHOSEN_IS_BETTER, TIE}
        if wrong:
            raise ValueError(
                f"The column `label` of `{name}` must be 1 (`chosen` is better) or 0.5 (a tie), got "
                f"{sorted(wrong, key=str)[:3]}. Swap `chosen` and `rejected` where the second image is better."
            )


def is_prepared(dataset: Dataset | NumberedPairs) -> bool:
    """Whether [`prepare_preference_dataset`] made this dataset."""
    return isinstance(dataset, NumberedPairs) or ROW_COLUMN in dataset.column_names


def prepare_preference_dataset(
    dataset: Dataset | NumberedPairs,
    policy: FlowPolicy,
    resolution: int,
    *,
    cache_latents: bool = True,
    cache_dir: str | Path | None = None,
    batch_size: int = 8,
    name: str = "dataset",
) -> Dataset | NumberedPairs:
    """
    Bring preference pairs into the form that training reads: a number per row, labels, and latents or images.

    Images may be [`~datasets.Image`] columns, PIL images, paths, encoded bytes or `uint8` arrays of shape
    `(height, width, 3)`. They are cropped around their centre to a square, resized to `resolution` (Lanczos), and laid
    on white where they are transparent. Arrays of the latents' shape are taken as normalised latents, as the
    transformer sees them.

    Args:
        dataset ([`~datasets.Dataset`]): columns `prompt`, `chosen`, `rejected`, and optionally `margin` (by how much
            `chosen` must win) and `label` (1, or 0.5 for a tie).
        policy ([`FlowPolicy`]): policy whose VAE encodes the images.
        resolution (`int`): height and width of the images in pixels.
        cache_latents (`bool`, *optional*, defaults to `True`):
            encode all images now, into a file that later runs re-use. Otherwise images are checked now and encoded
            batch by batch.
        cache_dir (`str` or `Path`, *optional*): root of the cache. Defaults to `tapo_trl` in the Hugging Face home.
        batch_size (`int`, *optional*, defaults to `8`): number of pairs that the VAE encodes at once.
        name (`str`, *optional*): what the dataset is called in error messages and progress bars.

    Returns:
        [`~datasets.Dataset`]: columns `prompt`, `slrm_row` (its number), `label`, `margin` if given, `chosen_latents`
        and `rejected_latents` (float32). Without `cache_latents`, [`NumberedPairs`] with the images instead of latents.

    Raises:
        ValueError: if an image cannot be read or has a wrong shape; the message names its row.
    """
    check_preference_dataset(dataset, name)
    if is_prepared(dataset):
        return dataset
    shape = policy.latent_shape(resolution, resolution)
    dataset = _without_decoding(dataset.with_format(None))
    extra = [column for column in ("label", "margin") if column in dataset.column_names]
    dataset = dataset.select_columns([*REQUIRED_COLUMNS, *extra])

    holds_latents = all(_is_latent(dataset[0][column], shape) for column in ("chosen", "rejected"))
    fingerprint = Hasher.hash([dataset._fingerprint, policy.vae_fingerprint(), shape, holds_latents])
    folder = (Path(cache_dir) if cache_dir is not None else Path(HF_HOME) / "tapo_trl") / "latents"
    cache_file = folder / f"{fingerprint}.arrow"
    if not holds_latents and not (cache_latents and cache_file.exists()):
        for row, example in enumerate(dataset):
            for column in ("chosen", "rejected"):
                _open_image(example[column], f"`{name}`, row {row}, column `{column}`", shape)
    if not holds_latents and not cache_latents:
        return NumberedPairs(dataset)

    def encode(batch: dict[str, list], rows: list[int]) -> dict[str, Any]:
        encoded = {ROW_COLUMN: rows, "label": batch.get("label", [CHOSEN_IS_BETTER] * len(rows))}
        for column, target in zip(("chosen", "rejected"), LATENT_COLUMNS, strict=True):
            places = [f"`{name}`, row {row}, column `{column}`" for row in rows]
            values = zip(batch[column], places, strict=True)
            if holds_latents:
                encoded[target] = np.stack([_read_latent(value, place, shape) for value, place in values])
            else:
                images = torch.stack([load_image(value, resolution, place, shape) for value, place in values])
                encoded[target] = policy.encode_images(images).cpu().numpy()
        return encoded

    array = Array3D(shape, "float32") if len(shape) == 3 else Array4D(shape, "float32")
    features = {column: dataset.features[column] for column in ("prompt", *extra)}
    features |= {"label": Value("float64"), ROW_COLUMN: Value("int64"), **dict.fromkeys(LATENT_COLUMNS, array)}
    folder.mkdir(parents=True, exist_ok=True)
    dataset = dataset.map(
        encode,
        with_indices=True,
        batched=True,
        batch_size=batch_size,
        remove_columns=["chosen", "rejected"],
        features=Features(features),
        new_fingerprint=fingerprint,
        cache_file_name=str(cache_file),
        writer_batch_size=64,
        desc=f"Encoding the images of {name}",
    )
    return dataset.with_format("torch")


def load_image(
    value: Any, resolution: int, place: str = "`image`", latent_shape: tuple[int, ...] | None = None
) -> torch.Tensor:
    """
    Read one image, crop it around its centre to a square and resize it.

    Args:
        value: PIL image, path, encoded bytes, `{"bytes": ..., "path": ...}` or `uint8` array `(height, width, 3)`.
        resolution (`int`): height and width of the result.
        place (`str`, *optional*): where the image is, for error messages.
        latent_shape (`tuple[int, ...]`, *optional*): the other shape an array could have had, for error messages.

    Returns:
        `torch.Tensor` of shape `(3, resolution, resolution)`: float32 in [0, 1].

    Raises:
        ValueError: if the image cannot be read.
    """
    image = _open_image(value, place, latent_shape)
    try:
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), (resolution, resolution), PILImage.Resampling.LANCZOS)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{place}: the image is damaged ({error}).") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _open_image(value: Any, place: str, latent_shape: tuple[int, ...] | None) -> PILImage.Image:
    """The image, decoded only as far as its header."""
    if isinstance(value, PILImage.Image):
        return value
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        value = value["bytes"] if value["bytes"] is not None else value["path"]
    if isinstance(value, (str, Path, bytes)):
        try:
            return PILImage.open(io.BytesIO(value) if isinstance(value, bytes) else value)
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{place}: the image cannot be read ({error}).") from error
    if isinstance(value, (np.ndarray, list)):
        array = np.asarray(value)
        integers = (
            np.issubdtype(array.dtype, np.integer) and array.size > 0 and array.min() >= 0 and array.max() <= 255
        )
        if array.ndim == 3 and array.shape[-1] == 3 and integers:
            return PILImage.fromarray(array.astype(np.uint8))
        raise ValueError(
            f"{place}: an array of shape {array.shape} and type {array.dtype} is neither a latent of shape "
            f"{latent_shape} nor a `uint8` image of shape (height, width, 3). Latents must have the shape that "
            "`resolution` asks for."
        )
    raise ValueError(f"{place}: a `{type(value).__name__}` is not an image, a path, bytes, or a latent.")


def _is_latent(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, (np.ndarray, list)) and np.shape(value) == tuple(shape)


def _read_latent(value: Any, place: str, shape: tuple[int, ...]) -> np.ndarray:
    if not _is_latent(value, shape):
        raise ValueError(f"{place}: expected a latent of shape {tuple(shape)}, got shape {np.shape(value)}.")
    latent = np.asarray(value, dtype=np.float32)
    if not np.isfinite(latent).all():
        raise ValueError(f"{place}: the latent has values that are not finite.")
    return latent


def _without_decoding(dataset: Dataset) -> Dataset:
    for column in ("chosen", "rejected"):
        if isinstance(dataset.features[column], Image):
            dataset = dataset.cast_column(column, Image(decode=False))
    return dataset


class PreferencePairCollator:
    """
    Collate prepared pairs.

    Args:
        resolution (`int`): height and width of images, where latents are not cached.
    """

    def __init__(self, resolution: int):
        self.resolution = resolution

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """
        Returns:
            `dict`: `row` (int64) and `label` (float32) of shape `(batch_size,)`; `chosen_latents` and
            `rejected_latents` of shape `(batch_size, *latent_shape)` or `chosen` and `rejected` of shape
            `(batch_size, 3, resolution, resolution)`; `margin` if given; `prompt`, a list of strings.
        """
        batch = {
            "row": torch.tensor([int(example[ROW_COLUMN]) for example in examples]),
            "label": torch.tensor([float(example["label"]) for example in examples]),
        }
        if LATENT_COLUMNS[0] in examples[0]:
            for column in LATENT_COLUMNS:
                batch[column] = torch.stack([example[column] for example in examples])
        else:
            for column in ("chosen", "rejected"):
                batch[column] = torch.stack([load_image(example[column], self.resolution) for example in examples])
        if "margin" in examples[0]:
            batch["margin"] = torch.tensor([float(example["margin"]) for example in examples])
        batch["prompt"] = [example["prompt"] for example in examples]
        return batch
