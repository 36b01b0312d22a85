# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Datasets as they are published, brought into the columns `prompt`, `chosen` and `rejected` without copying a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from .columns import refuse_transform, require_columns
from .pair_tables import (
    flags,
    pairs_by_position,
    pairs_by_preference,
    pairs_of_scores,
    quoted,
    report_left_out,
    score_columns,
)


# Column that says whether a row has a label at all, in Pick-a-Pic and what is derived from it
_DEFAULT_VALID_COLUMN = "has_label"

# Keyword arguments of `to_preference_pairs` for datasets with these columns
PAIR_PRESETS: dict[str, dict[str, Any]] = {
    "pickapic": {
        "first": "jpg_0",
        "second": "jpg_1",
        "label": "label_0",
        "prompt": "caption",
        "valid_column": "has_label",
    },
    "hpdv2": {"media": "image_path", "scores": "human_preference"},
    "hpdv2_test": {"media": "image_path", "scores": "rank", "lower_is_better": True},
    "hpdv3": {"first": "path1", "second": "path2"},
    "genai_bench_image": {
        "first": "left_image",
        "second": "right_image",
        "label": "vote_type",
        "label_values": {"leftvote": 1, "rightvote": 0, "tievote": 0.5, "bothbad_vote": 0.5},
    },
    "genai_bench_video": {
        "first": "left_video",
        "second": "right_video",
        "label": "vote_type",
        "label_values": {"leftvote": 1, "rightvote": 0, "tievote": 0.5, "bothbad_vote": 0.5},
    },
    "videogen_rewardbench": {
        "first": "path_A",
        "second": "path_B",
        "label": "Overall",
        "label_values": {"A": 1, "B": 0, "same": 0.5, "invalid": None},
        "dimensions": {"visual_quality": "VQ", "motion_quality": "MQ", "text_alignment": "TA"},
    },
    "videofeedback": {
        "media": "video link",
        "scores": [
            "visual quality",
            "temporal consistency",
            "dynamic degree",
            "text-to-video alignment",
            "factual consistency",
        ],
        "prompt": "text prompt",
    },
}


def to_preference_pairs(
    dataset: Dataset,
    *,
    preset: str | None = None,
    first: str | None = None,
    second: str | None = None,
    label: str | None = None,
    prompt: str | None = None,
    label_values: Mapping[Any, float | None] | None = None,
    dimensions: Mapping[str, str] | None = None,
    media: str | None = None,
    scores: str | Sequence[str] | None = None,
    lower_is_better: bool | None = None,
    valid_column: str | None = None,
    media_root: str | Path | None = None,
) -> Dataset:
    """
    Convert a preference dataset to the columns that [`SLRMTrainer`] and [`DiffusionDPOTrainer`] read.

    Images and videos are neither read nor copied, and nothing is written: the result is a view of the columns of
    `dataset`, with row indices and labels in memory. There are three forms:

    - `first`, `second` and `label`: two columns of images or videos, and how much the first is preferred.
    - `first` and `second`: the first is preferred. Columns `margin`, `label` and `label_<dimension>` stay as they are.
    - `media` and `scores`: items with individual scores. If `media` contains one path or address per row, all rows of
      a prompt are paired; if it contains a list, all members of the list. The item with the higher score is preferred;
      with several `scores`, the one with the higher mean.

    ```python
    from datasets import load_dataset
    from tapo_trl import to_preference_pairs

    votes = load_dataset("TIGER-Lab/GenAI-Bench", "video_generation", split="test")
    pairs = to_preference_pairs(
        votes,
        first="left_video",
        second="right_video",
        label="vote_type",
        label_values={"leftvote": 1, "rightvote": 0, "tievote": 0.5, "bothbad_vote": 0.5},
    )
    pairs = to_preference_pairs(votes, preset="genai_bench_video")  # the same
    ```

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset. Its format does not matter.
        preset (`str`, *optional*):
            Name of a set of the arguments below, one of `PAIR_PRESETS`. Arguments that are given take precedence.
        first (`str`, *optional*):
            Column of the first images or videos, in any form that the trainers read.
        second (`str`, *optional*):
            Column of the second ones.
        label (`str`, *optional*):
            Column that tells how much the first is preferred: 1 the first, 0 the second, 0.5 a tie. Values between count as
            the nearer of 0 and 1. Rows without a label (null or NaN) are left out, and counted in a warning.
        prompt (`str`, *optional*, defaults to `"prompt"`):
            Column of the prompts.
        label_values (`dict`, *optional*):
            What the values of `label` and of `dimensions` mean, such as `{"A": 1, "B": 0, "same": 0.5, "invalid": None}`.
            `None` is no label.
        dimensions (`dict[str, str]`, *optional*):
            Columns with a label per dimension, such as `{"visual_quality": "VQ"}`, which become `label_<dimension>`.
            Defaults to the columns that are called so and hold numbers, without that of the label itself and of the other
            side (`label_1` beside `label_0`).
        media (`str`, *optional*):
            Column of paths or addresses, or of lists of those, that `scores` are about.
        scores (`str` or `list[str]`, *optional*):
            Columns of numbers, or of lists as long as those of `media`. Several become `label_<dimension>`, too, with `_` for
            spaces.
        lower_is_better (`bool`, *optional*):
            Whether the lower of `scores` wins, as with ranks.
        valid_column (`str`, *optional*):
            Column of booleans; the rows where it is false are left out. Defaults to `has_label`, where there is such a
            column.
        media_root (`str` or `Path`, *optional*):
            Folder that relative paths start from, or the address of a folder of a dataset on the Hub, such as
            `https://huggingface.co/datasets/OWNER/NAME/resolve/main`.

    Returns:
        [`~datasets.Dataset`]: columns `prompt`, `chosen`, `rejected`, `label` (float64; 1, or 0.5 for a tie) where there are
        labels or scores, and `label_<dimension>` (float64, how much the chosen is preferred), in the order of `dataset`. Of
        `scores`, also `chosen_score` and `rejected_score` (float64, their mean; negated if `lower_is_better`), by which
        `variant="video_dpo"` of [`DiffusionDPOConfig`] weights pairs.

    Raises:
        TypeError: if `dataset` is not a [`~datasets.Dataset`].
        ValueError: if a column is missing, a value has no meaning, or no pair is left; the message names the argument.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`dataset` must be a `datasets.Dataset`, got `{type(dataset).__name__}`: give one split of it."
        )
    refuse_transform(dataset, "dataset")
    options = dict(
        first=first, second=second, label=label, prompt=prompt, label_values=label_values, dimensions=dimensions,
        media=media, scores=scores, lower_is_better=lower_is_better, valid_column=valid_column, media_root=media_root,
    )  # fmt: skip
    options = {**_preset(preset), **{name: value for name, value in options.items() if value is not None}}
    _check_options(options)
    if "valid_column" not in options and _DEFAULT_VALID_COLUMN in dataset.column_names:
        options["valid_column"] = _DEFAULT_VALID_COLUMN
    options.setdefault("prompt", "prompt")
    require_columns(dataset, _named_columns(options), "The dataset")

    valid = np.ones(len(dataset), dtype=bool)
    if "valid_column" in options:
        valid = flags(dataset, options["valid_column"])
        report_left_out(len(dataset), (~valid).sum(), f"`{options['valid_column']}` is false")
    if "media" in options:
        pairs = pairs_of_scores(dataset, options, valid)
    elif "label" in options:
        pairs = pairs_by_position(dataset, options, valid)
    else:
        pairs = pairs_by_preference(dataset, options, valid)
    if len(pairs) == 0:
        raise ValueError(
            "No pair is left of the dataset: none of its rows has a label (or two media and their scores)."
        )
    return pairs


def preset_hint(column_names: list[str], argument: str) -> str:
    """A sentence for error messages that names the presets which fit these columns, or nothing."""
    fitting = []
    for name, options in PAIR_PRESETS.items():
        if {column for _, column in _named_columns({"prompt": "prompt"} | options)} <= set(column_names):
            fitting.append(f"`{argument}={name!r}`")
    return f" It has the columns of {' and '.join(fitting)}." if fitting else ""


def _preset(name: str | None) -> dict[str, Any]:
    if name is not None and name not in PAIR_PRESETS:
        raise ValueError(f"`preset` must be one of {sorted(PAIR_PRESETS)}, got {name!r}.")
    return {} if name is None else PAIR_PRESETS[name]


def _check_options(options: dict[str, Any]) -> None:
    by_score = [name for name in ("media", "scores", "lower_is_better") if name in options]
    by_position = [name for name in ("first", "second", "label", "label_values", "dimensions") if name in options]
    if by_score and by_position:
        raise ValueError(f"{quoted(by_score)} and {quoted(by_position)} exclude each other: pairs or scores.")
    needed = ("media", "scores") if by_score else ("first", "second")
    missing = [name for name in needed if name not in options]
    if missing:
        raise ValueError(
            f"{quoted(missing)} is missing: `first` and `second`, or `media` and `scores`, or a `preset`."
        )
    if by_position and options["first"] == options["second"]:
        raise ValueError(f"`first` and `second` are the same column, `{options['first']}`: there is no pair.")
    without = [name for name in ("label_values", "dimensions") if name in options and "label" not in options]
    if without:
        raise ValueError(f"{quoted(without)} needs `label`, the column that tells which side is preferred.")
    wrong = [
        value
        for value in options.get("label_values", {}).values()
        if value is not None and not (isinstance(value, (int, float)) and 0 <= value <= 1)
    ]
    if wrong:
        raise ValueError(
            f"`label_values` must map to numbers from 0 to 1, or to `None` for no label, got {wrong[0]!r}."
        )


def _named_columns(options: dict[str, Any]) -> list[tuple[str, str]]:
    """The columns that the options name, each with its option."""
    names = [name for name in ("prompt", "first", "second", "label", "media", "valid_column") if name in options]
    return [
        *((name, options[name]) for name in names),
        *(("scores", column) for column in score_columns(options)),
        *((f"dimensions[{name!r}]", column) for name, column in options.get("dimensions", {}).items()),
    ]
