# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Latents of preference pairs, given by the dataset or encoded once into a file."""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Array3D, Array4D, Dataset, Features, Value
from datasets.fingerprint import Hasher
from transformers.utils import logging

from ..files import update_with_weights
from ..policies import FlowPolicy
from .images import BadFileError


if TYPE_CHECKING:
    from .preferences import PreferencePairs


logger = logging.get_logger(__name__)

_VERSION = 1  # raise it when files are read or encoded in another way

SIDES = ("chosen", "rejected")
LATENT_COLUMNS = ("chosen_latents", "rejected_latents")
ROW_COLUMN = "slrm_row"

# Most that `datasets` holds in memory before it writes, in bytes
_WRITER_BUFFER = 2**28


@dataclass(frozen=True)
class LatentReader:
    """
    Takes normalised latents, as the transformer sees them, from the dataset.

    Args:
        shape (`tuple[int, ...]`): shape of one latent.
    """

    shape: tuple[int, ...]

    def load(self, value: Any, place: str = "`latent`") -> torch.Tensor:
        """
        Returns:
            `torch.Tensor` of shape `shape`: float32.

        Raises:
            ValueError: if the latent has another shape, or is not finite.
        """
        if np.shape(value) != self.shape:
            raise ValueError(f"{place}: expected a latent of shape {self.shape}, got shape {np.shape(value)}.")
        latent = torch.from_numpy(np.array(value, dtype=np.float32))
        if not latent.isfinite().all():
            raise ValueError(f"{place}: the latent has values that are not finite.")
        return latent


def latents_fingerprint(pairs: "PreferencePairs", policy: FlowPolicy) -> str:
    """
    Hash of all that the latents of `pairs` and what is stored with them depend on: the rows, the files behind them, the
    labels, the reader, the policy's way to encode, and the VAE with its tiles.
    """
    tiles = {name: value for name, value in vars(policy.vae).items() if name.startswith("tile_")}
    weights = hashlib.sha256()
    update_with_weights(weights, policy.vae)
    vae = [policy.vae_fingerprint(), weights.hexdigest(), str(policy.vae.dtype), policy.vae.use_tiling and tiles]
    preferences = [pairs.swapped.tolist(), pairs.labels.tolist()]
    reader = [_VERSION, type(policy).__name__, repr(pairs.reader)]
    return Hasher.hash([pairs.dataset._fingerprint, file_states(pairs.dataset, pairs.sides), preferences, reader, vae])


def file_states(dataset: Dataset, sides: Sequence[str] = SIDES) -> list[tuple[str, int | None, int | None]]:
    """
    Path, size in bytes and time of the last change (ns) of the files that the columns `sides` name; the fingerprint
    of a dataset does not see that such a file has changed.
    """
    states = []
    for side in sides:
        for path in _paths(dataset.data.column(side), dataset._indices):
            try:
                status = os.stat(path)
                states.append((path, status.st_size, status.st_mtime_ns))
            except OSError:
                states.append((path, None, None))
    return states


def _paths(column: pa.ChunkedArray, indices: Any | None) -> list[str]:
    """Paths in a column of strings, of `{"bytes", "path"}` without bytes, or of lists of those."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return _paths(pc.list_flatten(column), None)  # of all rows, which is on the safe side
    if pa.types.is_struct(column.type):
        names = {field.name for field in column.type}
        if "path" not in names:
            return []
        paths = pc.struct_field(column, "path")
        if "bytes" in names:
            paths = pc.if_else(pc.is_valid(pc.struct_field(column, "bytes")), None, paths)
        column = paths
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return []
    if indices is not None:
        column = column.take(indices.column(0))
    return column.drop_null().to_pylist()


def encode_pairs(
    pairs: "PreferencePairs", policy: FlowPolicy, shape: tuple[int, ...], cache_file: Path, batch_size: int
) -> tuple[Dataset, list[str]]:
    """
    The latents of all pairs, from `cache_file` if an earlier run finished it.

    Args:
        pairs ([`PreferencePairs`]): the pairs.
        policy ([`FlowPolicy`]): policy whose VAE encodes.
        shape (`tuple[int, ...]`): shape of one latent.
        cache_file (`Path`): where the latents are kept. Beside it, `.json` tells which files could not be used.
        batch_size (`int`): number of pairs that the VAE encodes at once.

    Returns:
        `tuple[Dataset, list[str]]`: the columns of the pairs with `chosen_latents` and `rejected_latents` (float32), and
        what is wrong with the files whose pairs were left out.
    """
    bad_files = [message for messages in pairs.bad_files.values() for message in messages]
    record = cache_file.with_suffix(".json")

    def encode(rows: list[int]) -> dict[str, list]:
        examples = []
        for row in rows:
            try:
                examples.append(pairs.load(row))
            except BadFileError as error:
                logger.warning(str(error))
                bad_files.append(str(error))
        encoded = {column: [example[column] for example in examples] for column in features if column in pairs.columns}
        for side in pairs.sides:
            values = [example[side] for example in examples]
            if values and not isinstance(pairs.reader, LatentReader):
                values = policy.encode(torch.stack(values)).cpu()
            encoded[f"{side}_latents"] = [value.numpy() for value in values]
        return encoded

    array = Array3D(shape, "float32") if len(shape) == 3 else Array4D(shape, "float32")
    kinds = {
        "prompt": Value("string"),
        ROW_COLUMN: Value("int64"),
        "label": Value("float64"),
        "margin": Value("float64"),
    }
    features = {column: kinds[column] for column in pairs.columns} | {f"{side}_latents": array for side in pairs.sides}
    cache_file.parent.mkdir(parents=True, exist_ok=True)
    latents = Dataset.from_dict({"row": pairs.rows}).map(
        encode,
        input_columns="row",
        remove_columns="row",
        batched=True,
        batch_size=batch_size,
        features=Features(features),
        new_fingerprint=cache_file.stem,
        cache_file_name=str(cache_file),
        load_from_cache_file=record.exists(),
        writer_batch_size=max(1, min(64, _WRITER_BUFFER // (8 * math.prod(shape)))),
        desc=f"Encoding {pairs.name}",
    )
    if record.exists():
        bad_files = json.loads(record.read_text(encoding="utf-8"))
    else:
        record.write_text(json.dumps(bad_files, indent=2), encoding="utf-8")
    return latents.with_format("torch"), bad_files


def is_encoded(cache_file: Path) -> bool:
    """Whether a run has finished this cache."""
    return cache_file.exists() and cache_file.with_suffix(".json").exists()
