# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Images in whatever form a dataset holds them."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from PIL import ExifTags, Image, ImageOps


# A file of a dataset, as the Hub's pages and `datasets` write it
_HUB_FILE = re.compile(
    r"(?:https://(?:huggingface\.co|hf\.co)/datasets/(?P<repo>[^/]+/[^/]+)/(?:blob|resolve|raw)/(?P<revision>[^/]+))"
    r"/(?P<file>[^?#]+)(?:[?#].*)?"
)


class BadFileError(ValueError):
    """An image or a video that cannot be used: it cannot be read, is damaged, or is too short."""


@dataclass(frozen=True)
class ImageReader:
    """
    Reads images of one size: PIL images, paths, encoded bytes, `{"bytes": ..., "path": ...}`, addresses of files of datasets
    on the Hub, or `uint8` arrays of shape `(height, width, 3)`. They are cropped around their centre to the shape of the
    result, resized (Lanczos), and laid on white where they are transparent.

    Grey images of more than 8 bits are scaled: 16 bits from 0 to 65535; 32-bit integers by whether they reach beyond 255,
    and floating point numbers by whether they reach beyond 1. Numbers that are on neither scale are refused.

    Args:
        height (`int`): height of the result in pixels.
        width (`int`): width of the result in pixels.
    """

    height: int
    width: int

    def check(self, value: Any, place: str = "`image`") -> tuple[int, int]:
        """
        Read an image as far as its header.

        Args:
            value: the image.
            place (`str`, *optional*): where it is, for error messages.

        Returns:
            `tuple[int, int]`: its height and width in pixels, as it is displayed.

        Raises:
            BadFileError: if it cannot be read.
            ValueError: if it is no image.
        """
        image = open_image(value, place)
        with _decoding(place, "the image cannot be read"):
            # Pillow decodes a PNG to look for what is not in its header
            turned = "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation, 1) > 4
        return (image.width, image.height) if turned else (image.height, image.width)

    def load(self, value: Any, place: str = "`image`") -> torch.Tensor:
        """
        Read an image. The arguments are those of [`~ImageReader.check`].

        Returns:
            `torch.Tensor` of shape `(3, height, width)`: float32 in [0, 1].

        Raises:
            BadFileError: if it cannot be read.
            ValueError: if it is no image.
        """
        pixels = fit_image(open_image(value, place), self.height, self.width, place)
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def open_image(value: Any, place: str) -> Image.Image:
    """The image, decoded only as far as its header. See [`ImageReader`]."""
    if isinstance(value, Image.Image):
        return value
    value = file_of(value, place)
    if value is None:
        raise BadFileError(f"{place}: there is no image.")
    if isinstance(value, str) and "://" in value:
        raise BadFileError(f"{place}: {value} is an address of no dataset on the Hub: download it, and give its path.")
    if isinstance(value, (str, Path, bytes)):
        with _decoding(place, "the image cannot be read"):
            return Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
    if isinstance(value, (np.ndarray, list)):
        return Image.fromarray(as_pixels(value, place, "image", ("height", "width", 3)))
    raise ValueError(f"{place}: a `{type(value).__name__}` is not an image, a path, bytes or an array.")


def fit_image(image: Image.Image, height: int, width: int, place: str) -> np.ndarray:
    """The image as it is displayed, cropped and resized to `uint8` of shape `(height, width, 3)`."""
    if 0 in image.size:
        raise BadFileError(f"{place}: the image has no pixels.")
    file_format = image.format  # which the turned image has no longer
    with _decoding(place, "the image is damaged"):
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _to_8_bits(image, place, file_format)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS))


@contextmanager
def _decoding(place: str, failure: str) -> Iterator[None]:
    """What a decoder raises is an error at `place`."""
    try:
        yield
    except BadFileError:
        raise
    except Exception as error:  # Pillow's decoders let through whatever a damaged file leads them to
        raise BadFileError(f"{place}: {failure} ({error or type(error).__name__}).") from error


def _to_8_bits(image: Image.Image, place: str, file_format: str | None) -> Image.Image:
    """A grey image of 16 or 32 bits, which Pillow would cut off at 255, on white where it is transparent."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        scale = 1.0 if high <= 1 else 255.0
    else:
        scale = 65535.0 if high > 255 or image.mode != "I" or file_format in ("PNG", "PPM") else 255.0
    if not 0 <= low <= high <= scale:
        raise BadFileError(
            f"{place}: the numbers of the image (mode {image.mode}) reach from {low:g} to {high:g}, which is no known scale. "
            "Save it with 8 or 16 bits."
        )
    pixels = (values * (255 / scale)).round().astype(np.uint8)
    if isinstance(image.info.get("transparency"), int):
        pixels[values == image.info["transparency"]] = 255
    return Image.fromarray(pixels)


def file_of(value: Any, place: str) -> Any:
    """The bytes or else the path, where `datasets` keeps them together. Files of datasets on the Hub are downloaded."""
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    address = _HUB_FILE.fullmatch(value) if isinstance(value, str) else None
    if address is not None:
        return _download(address["repo"], unquote(address["revision"]), unquote(address["file"]), place)
    return value


def _download(repo: str, revision: str, file: str, place: str) -> str:
    try:
        return hf_hub_download(repo, file, repo_type="dataset", revision=revision)
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise ConnectionError(
            f"{place}: the file {file} of the dataset {repo} is not in the Hugging Face cache, and cannot be downloaded "
            f"({str(error).splitlines()[0]}). Where there is a connection, `hf download --repo-type dataset {repo}` brings "
            "all of its files into the cache."
        ) from error
    except EntryNotFoundError as error:
        raise BadFileError(f"{place}: the dataset {repo} has no file {file}.") from error


def as_pixels(value: np.ndarray | list, place: str, kind: str, shape: tuple[str | int, ...]) -> np.ndarray:
    """`value` as `uint8`, if it has as many dimensions as `shape`, 3 channels, and integers from 0 to 255."""
    array = np.asarray(value)
    integers = np.issubdtype(array.dtype, np.integer) and array.size > 0 and array.min() >= 0 and array.max() <= 255
    if array.ndim != len(shape) or array.shape[-1] != 3 or not integers:
        names = ", ".join(str(name) for name in shape)
        raise ValueError(
            f"{place}: an array of shape {array.shape} and type {array.dtype} is not a `uint8` {kind} of shape ({names})."
        )
    return array.astype(np.uint8)
