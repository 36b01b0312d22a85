# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Datasets: several by name, and columns as they are stored, whatever their format shows of them."""

import difflib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pyarrow as pa
from datasets import Array2D, Array3D, Array4D, Array5D, Dataset, Image, List, Value, Video


Splits = Dataset | dict[str, Dataset] | None


def named_splits(eval_dataset: Splits) -> dict[str, Dataset]:
    """The datasets, by what they are called in messages."""
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{name!r}]": split for name, split in eval_dataset.items()}
    return {} if eval_dataset is None else {"eval_dataset": eval_dataset}


def map_splits(function: Callable[[Dataset, str], Dataset], eval_dataset: Splits) -> Splits:
    """What `function` makes of each dataset and of what it is called in messages."""
    results = [function(split, name) for name, split in named_splits(eval_dataset).items()]
    if isinstance(eval_dataset, dict):
        return dict(zip(eval_dataset, results, strict=True))
    return results[0] if results else None


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


def require_columns(dataset: Dataset, columns: Iterable[tuple[str, str]], what: str) -> None:
    """
    Check that columns exist.

    Args:
        dataset ([`~datasets.Dataset`]): dataset.
        columns (`Iterable[tuple[str, str]]`): options, each with the column that it names.
        what (`str`): what the dataset is called at the start of the error message.

    Raises:
        ValueError: if one does not; with the nearest one that does.
    """
    for option, column in columns:
        if column not in dataset.column_names:
            near = difflib.get_close_matches(column, dataset.column_names, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise ValueError(f"{what} has no column `{column}` (`{option}`); it has {dataset.column_names}.{hint}")


def check_prompts(dataset: Dataset, name: str) -> None:
    """
    Raises:
        ValueError: if there are no rows, or if a `prompt` is no text.
    """
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty.")
    for row, prompt in enumerate(column_values(dataset, "prompt")):
        if not isinstance(prompt, str):
            raise ValueError(f"`{name}`, row {row}: `prompt` must be a string, got {prompt!r}.")


def without_decoding(dataset: Dataset, columns: Sequence[str]) -> Dataset:
    """The dataset with the files of the `columns` as they are and arrays as NumPy's."""
    arrays = []
    for column in columns:
        feature = dataset.features[column]
        innermost = feature
        while isinstance(innermost, List):
            innermost = innermost.feature
        if isinstance(feature, (Image, Video)):
            dataset = dataset.cast_column(column, type(feature)(decode=False))
        elif isinstance(feature, List) and isinstance(innermost, Image):
            dataset = dataset.cast_column(column, List(Image(decode=False)))
        elif isinstance(feature, (Array2D, Array3D, Array4D, Array5D)):
            arrays.append(column)
        elif (
            isinstance(feature, List) and isinstance(innermost, Value) and innermost.dtype not in ("string", "binary")
        ):
            arrays.append(column)
    return dataset.with_format("numpy", columns=arrays, output_all_columns=True) if arrays else dataset
