# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Columns of a dataset as they are stored, whatever its format shows of them."""

import numpy as np
import pyarrow as pa
from datasets import Dataset


def refuse_transform(dataset: Dataset, name: str) -> None:
    """
    Args:
        dataset ([`~datasets.Dataset`]): dataset.
        name (`str`): what it is called in the error message.

    Raises:
        ValueError: if rows are changed when they are read (`set_transform`, `with_transform`).
    """
    if dataset.format["type"] == "custom":
        raise ValueError(
            f"`{name}` has a transform (`set_transform` or `with_transform`), which changes rows each time they are read; "
            f"they are read more than once here, and must be the same. Apply it beforehand with `{name}.map(...)`, or "
            f"take it off with `{name}.with_format(None)`."
        )


def stored_column(dataset: Dataset, column: str) -> pa.ChunkedArray:
    """A column in Arrow's form, in the order of the rows."""
    stored = dataset.data.column(column)
    return stored if dataset._indices is None else stored.take(dataset._indices.column(0))


def stored_table(dataset: Dataset) -> tuple[Dataset, np.ndarray]:
    """What `dataset` selects its rows from, and the numbers of those rows: `table.select(rows)` is `dataset`."""
    rows = np.arange(len(dataset)) if dataset._indices is None else dataset._indices.column(0).to_numpy()
    return Dataset(dataset.data, info=dataset.info.copy(), fingerprint=dataset._fingerprint), rows.astype(np.int64)


def column_values(dataset: Dataset, column: str) -> list:
    """A column as Python's own objects. For columns without images or videos."""
    return stored_column(dataset, column).to_pylist()
