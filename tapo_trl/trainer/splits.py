# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""`eval_dataset`s: none, one dataset, or several by name."""

from collections.abc import Callable

from datasets import Dataset


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
