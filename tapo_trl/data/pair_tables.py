# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Tables of preference pairs, made of the columns of a dataset without a copy of its images and videos."""

import math
import os
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from transformers.utils import logging

from .columns import column_values, stored_column, stored_table
from .dimensions import LABEL_PREFIX
from .latents import SIDES


logger = logging.get_logger(__name__)

_MAX_LISTED = 8

SCORES = ("chosen_score", "rejected_score")
"""Columns of the scores of both sides, by which VideoDPO weights pairs."""


def quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def score_columns(options: dict[str, Any]) -> list[str]:
    scores = options.get("scores", [])
    return [scores] if isinstance(scores, str) else list(scores)


def report_left_out(total: int, number: int, reason: str, what: str = "Left out") -> None:
    if number > 0:
        logger.warning(f"{what} {number} of {total} rows, whose {reason}.")


# Pairs that stand in one row


def pairs_by_preference(dataset: Dataset, options: dict[str, Any], valid: np.ndarray) -> Dataset:
    """The first is preferred: columns get other names, and other columns stay."""
    names = {options["first"]: "chosen", options["second"]: "rejected", options["prompt"]: "prompt"}
    if "media_root" in options:
        table, rows = stored_table(dataset)
        dataset = with_media_root(table, [options["first"], options["second"]], options["media_root"]).select(rows)
    names = {column: name for column, name in names.items() if column != name}
    hidden = [name for name in names.values() if name in dataset.column_names and name not in names]
    dataset = dataset.remove_columns(hidden) if hidden else dataset
    if set(names) & set(names.values()):
        dataset = dataset.rename_columns(names)
    else:
        for column, name in names.items():
            dataset = dataset.rename_column(column, name)
    return dataset if valid.all() else dataset.select(np.flatnonzero(valid))


def pairs_by_position(dataset: Dataset, options: dict[str, Any], valid: np.ndarray) -> Dataset:
    """
    The table twice, one below the other, first with `first` as `chosen` and then with `second`, and the rows that are right:
    neither is a copy.
    """
    first, second, label = options["first"], options["second"], options["label"]
    meanings = options.get("label_values")
    preference = _labels(dataset, label, meanings, valid)
    labelled = ~np.isnan(preference)
    report_left_out(len(dataset), (valid & ~labelled).sum(), f"`{label}` is missing")
    outside = preference[labelled][(preference[labelled] < 0) | (preference[labelled] > 1)]
    if len(outside) > 0:
        raise ValueError(
            f"The column `{label}` (`label`) must hold values in [0, 1], how much `{first}` is preferred, but they reach "
            f"from {np.nanmin(preference)} to {np.nanmax(preference)}. If they mean something else, say it by `label_values`."
        )
    swapped = preference < 0.5

    columns = {f"{LABEL_PREFIX}{name}": column for name, column in _dimensions(dataset, options).items()}
    labels = {"label": np.where(preference == 0.5, 0.5, 1.0)}
    for name, column in columns.items():
        values = _labels(dataset, column, meanings, valid)
        labels[name] = np.where(swapped, 1 - values, values)

    fingerprint = Hasher.hash([dataset._fingerprint, sorted((name, str(value)) for name, value in options.items())])
    table, rows = stored_table(dataset)
    if "media_root" in options:
        table = with_media_root(table, [first, second], options["media_root"])
    table = table.select_columns(list(dict.fromkeys([options["prompt"], first, second])))
    if table.features[first] != table.features[second]:
        raise ValueError(
            f"`{first}` ({table.features[first]}) and `{second}` ({table.features[second]}) are of different types, so "
            "neither can take the place of the other: cast one of them with `dataset.cast_column`."
        )
    both = concatenate_datasets(
        [
            table.rename_columns({options["prompt"]: "prompt", chosen: "chosen", rejected: "rejected"})
            for chosen, rejected in ((first, second), (second, first))
        ]
    )
    beside = {}
    for name, values in labels.items():
        column = np.full(2 * len(table), np.nan)
        column[rows + len(table) * swapped] = values
        beside[name] = pa.array(column, mask=np.isnan(column))
    both = concatenate_datasets([both, Dataset(pa.table(beside), fingerprint=fingerprint)], axis=1)
    return both.select((rows + len(table) * swapped)[labelled], new_fingerprint=fingerprint)


def _dimensions(dataset: Dataset, options: dict[str, Any]) -> Mapping[str, str]:
    """Column of each dimension."""
    if "dimensions" in options:
        return options["dimensions"]
    numbers = [
        name
        for name, feature in dataset.features.items()
        if isinstance(feature, Value) and feature.dtype.startswith(("float", "int", "uint"))
    ]
    own = {options["label"], _label_of_second(options["first"], options["second"], options["label"])}
    names = [name for name in numbers if name.startswith(LABEL_PREFIX) and name not in own]
    # `label_0`, `label_1` are labels of sides, not of dimensions
    return {name.removeprefix(LABEL_PREFIX): name for name in names if not name.removeprefix(LABEL_PREFIX).isdigit()}


def _label_of_second(first: str, second: str, label: str) -> str | None:
    """`label_1` for `jpg_0`, `jpg_1` and `label_0`, `label_right` for `left`, `right` and `label_left`."""
    start = len(os.path.commonprefix([first, second]))
    end = len(os.path.commonprefix([first[start:][::-1], second[start:][::-1]]))
    of_first, of_second = first[start : len(first) - end], second[start : len(second) - end]
    head, found, tail = label.rpartition(of_first) if of_first else ("", "", "")
    return head + of_second + tail if found else None


def _labels(
    dataset: Dataset, column: str, meanings: Mapping[Any, float | None] | None, valid: np.ndarray
) -> np.ndarray:
    """Values of a column as numbers of shape `(number of rows,)`, NaN for those that are missing or not valid."""
    feature, values = dataset.features[column], column_values(dataset, column)
    if isinstance(feature, ClassLabel) and meanings is not None:
        values = [None if value is None else feature.int2str(value) for value in values]
    known = None if meanings is None else {str(value): meaning for value, meaning in meanings.items()}
    numbers, unknown = np.full(len(values), np.nan), {}
    for row in np.flatnonzero(valid):
        value = values[row]
        if value is None or value != value:
            continue
        word = next((word for word in _words(value) if word in known), None) if known is not None else None
        if word is not None:
            numbers[row] = math.nan if known[word] is None else known[word]
        elif known is None and isinstance(value, (int, float)):
            numbers[row] = value
        else:
            unknown.setdefault(str(value), value)
    if unknown:
        listed = list(unknown.values())[:_MAX_LISTED]
        raise ValueError(
            f"The column `{column}` holds {listed}, "
            + (
                "which are no numbers"
                if meanings is None
                else f"and `label_values` only tells what {list(meanings)} mean"
            )
            + ": say by `label_values` how much the first is preferred, such as `{'left': 1, 'right': 0, 'tie': 0.5}`, with "
            "`None` for rows to leave out."
        )
    return numbers


def _words(value: Any) -> list[str]:
    """How a value is written as a key of `label_values`, in Python, JSON or YAML: 1.0 is also 1, and `True` is `true`."""
    if isinstance(value, bool):
        return [str(value), str(value).lower()]
    if isinstance(value, (int, float)) and math.isfinite(value) and value == int(value):
        return [str(int(value)), str(float(value))]
    return [str(value)]


def flags(dataset: Dataset, column: str) -> np.ndarray:
    values = column_values(dataset, column)
    wrong = [value for value in values if value not in (None, False, True)]
    if wrong:
        raise ValueError(f"The column `{column}` (`valid_column`) must hold booleans, got {wrong[0]!r}.")
    return np.array([bool(value) for value in values], dtype=bool)


# Pairs of what is scored by itself


def pairs_of_scores(dataset: Dataset, options: dict[str, Any], valid: np.ndarray) -> Dataset:
    """All pairs of each prompt's (or row's) media. Paths and addresses are the only media that they repeat."""
    media = options["media"]
    feature = dataset.features[media]
    listed = isinstance(feature, List)
    kind = feature.feature if listed else feature
    if not (isinstance(kind, Value) and kind.dtype in ("string", "large_string")):
        raise ValueError(
            f"The column `{media}` (`media`) must hold paths or addresses, or lists of those, got {feature}: pairs of rows "
            "would copy anything else. Write the files to disk, and give their paths."
        )
    prompts, paths = column_values(dataset, options["prompt"]), column_values(dataset, media)
    columns = {name: column_values(dataset, name) for name in score_columns(options)}
    groups: dict[Any, list[tuple[str, list[float]]]] = {}
    unusable = 0
    for row in np.flatnonzero(valid):
        values = [column[row] for column in columns.values()]
        if prompts[row] is None or _is_missing(paths[row], *values):
            unusable += 1
        elif not listed:
            groups.setdefault(prompts[row], []).append((paths[row], [_score(value, row) for value in values]))
        else:
            if any(not isinstance(value, list) or len(value) != len(paths[row]) for value in values):
                raise ValueError(f"Row {row}: `{media}` and {quoted(list(columns))} must be lists of the same length.")
            scored = zip(paths[row], zip(*values, strict=True), strict=True)
            there = [(path, each) for path, each in scored if not _is_missing(path, *each)]
            unusable += len(there) < len(paths[row])
            groups[prompts[row], row] = [(path, [_score(value, row) for value in each]) for path, each in there]
    report_left_out(
        len(dataset),
        unusable,
        f"prompt, `{media}` or scores are missing",
        "Left out (in part)" if listed else "Left out",
    )

    names = [f"{LABEL_PREFIX}{name.replace(' ', '_')}" for name in columns] if len(columns) > 1 else []
    pairs: dict[str, list] = {name: [] for name in ("prompt", "chosen", "rejected", "label", *SCORES, *names)}
    sign = -1 if options.get("lower_is_better") else 1
    for key, members in groups.items():
        for one, other in combinations(members, 2):
            difference = sign * (math.fsum(one[1]) - math.fsum(other[1]))
            winner, loser = (other, one) if difference < 0 else (one, other)
            for name, side in zip(SCORES, (winner, loser), strict=True):
                pairs[name].append(sign * math.fsum(side[1]) / len(columns))
            pairs["prompt"].append(key[0] if listed else key)
            pairs["chosen"].append(winner[0])
            pairs["rejected"].append(loser[0])
            pairs["label"].append(0.5 if difference == 0 else 1.0)
            for name, high, low in zip(names, winner[1], loser[1], strict=bool(names)):
                pairs[name].append(0.5 + 0.5 * sign * np.sign(high - low))
    fingerprint = Hasher.hash([dataset._fingerprint, sorted((name, str(value)) for name, value in options.items())])
    strings = {name: pa.array(values, pa.string()) for name, values in pairs.items() if name in ("prompt", *SIDES)}
    table = pa.table(strings | {name: pa.array(pairs[name], pa.float64()) for name in ("label", *SCORES, *names)})
    result = Dataset(table, fingerprint=fingerprint)
    return result if "media_root" not in options else with_media_root(result, list(SIDES), options["media_root"])


def _is_missing(*values: Any) -> bool:
    return any(value is None or value != value for value in values)


def _score(value: Any, row: int) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"Row {row}: a score must be a finite number, got {value!r}.")
    return value


# Folders


def with_media_root(dataset: Dataset, columns: list[str], root: str | Path) -> Dataset:
    """The dataset with paths, or lists of paths, that start from `root`. Only paths are copied."""
    replaced = {}
    for column in dict.fromkeys(columns):
        feature = dataset.features[column]
        kind = feature.feature if isinstance(feature, List) else feature
        if not (isinstance(kind, Value) and kind.dtype in ("string", "large_string")):
            raise ValueError(f"`media_root` needs paths, but the column `{column}` holds {feature}.")
        values = [_from_root(value, root) for value in column_values(dataset, column)]
        replaced[column] = pa.array(values, stored_column(dataset, column).type)
    order = dataset.column_names
    beside = Dataset(pa.table(replaced), fingerprint=Hasher.hash([dataset._fingerprint, sorted(replaced), str(root)]))
    if len(replaced) == len(order):
        return beside
    rest = dataset.remove_columns(list(replaced))
    return concatenate_datasets([rest, beside], axis=1).select_columns(order)


def _from_root(value: str | list | None, root: str | Path) -> str | list | None:
    if isinstance(value, list):
        return [_from_root(each, root) for each in value]
    return value if value is None or "://" in value else os.path.join(root, value)
