# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Scores that another program computed and wrote to a file."""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


YES, NO = ("yes", "1", "true"), ("no", "0", "-1", "false")


def scores_from_file(
    path: str | Path, key: str = "score", id_key: str = "id", weights: Sequence[float] | None = None
) -> dict[str, float]:
    """
    Read scores by id from a file, for a reward model that runs in an environment of its own, such as LiFT-Critic or VisionReward.

    ```python
    from tapo_trl.metrics import PreferenceAccuracy, scores_from_file

    scores = scores_from_file("visionreward.csv", id_key="video")
    margins = [scores[pair["left"]] - scores[pair["right"]] for pair in pairs]
    labels = [pair["label"] for pair in pairs]
    PreferenceAccuracy().compute(
        predictions=margins, references=labels, zero_margin="wrong", tie_threshold="videoalign"
    )
    ```

    Args:
        path (`str` or `Path`):
            `.csv` with a header; `.jsonl`, an object on each line; or `.json`, a list of objects or an object
            `{id: score}` or `{id: object}`.
        key (`str`, *optional*, defaults to `"score"`): column, or name in the objects, of the score.
        id_key (`str`, *optional*, defaults to `"id"`): column, or name in the objects, of the id.
        weights (`Sequence[float]`, *optional*):
            if given, `key` holds answers to as many questions instead, a list of yes (also true and 1) and no (false, 0, -1); the
            score is the mean of the weights, with a minus where the answer is no: VisionReward's.

    Returns:
        `dict[str, float]`: score of each id.

    Raises:
        ValueError: if a score is missing, no finite number, or there twice.
        OSError: if the file cannot be read.
    """
    scores: dict[str, float] = {}
    for place, row in _rows(Path(path), key, id_key):
        for name in (id_key, key):
            if row.get(name) in (None, ""):
                raise ValueError(f"`{path}`, {place}: there is no `{name}`. It has {', '.join(map(str, row))}.")
        where = f"`{path}`, {place}, `{key}` of `{row[id_key]}`"
        score = _number(row[key], where) if weights is None else _weighted(row[key], weights, where)
        if scores.setdefault(str(row[id_key]), score) != score:
            raise ValueError(f"{where}: the id has two scores, {scores[str(row[id_key])]} and {score}.")
    if not scores:
        raise ValueError(f"`{path}` has no scores.")
    return scores


def _rows(path: Path, key: str, id_key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            yield from ((f"row {number}", row) for number, row in enumerate(csv.DictReader(file), 1))
        elif path.suffix in (".json", ".jsonl"):
            try:
                content = (
                    [json.loads(line) for line in file if line.strip()] if path.suffix == ".jsonl" else json.load(file)
                )
            except ValueError as error:
                raise ValueError(f"`{path}` is no {path.suffix[1:].upper()}: {error}") from error
            yield from _objects(content, path, key, id_key)
        else:
            raise ValueError(f"`{path}` must end with .csv, .json or .jsonl.")


def _objects(content: Any, path: Path, key: str, id_key: str) -> Iterable[tuple[str, dict[str, Any]]]:
    if isinstance(content, dict):
        content = [
            {id_key: name, **(value if isinstance(value, dict) else {key: value})} for name, value in content.items()
        ]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError(f"`{path}` must hold a list of objects, or an object with ids.")
    return [(f"entry {number}", row) for number, row in enumerate(content, 1)]


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {value!r} is no number.") from error
    if not math.isfinite(number):
        raise ValueError(f"{where}: {value!r} is not finite.")
    return number


def _weighted(answers: Any, weights: Sequence[float], where: str) -> float:
    if isinstance(answers, str):  # a cell of a table
        answers = answers.strip("[] ").replace(",", " ").split()
    if not isinstance(answers, list) or len(answers) != len(weights):
        raise ValueError(f"{where}: {len(weights)} answers are needed, one for each of `weights`.")
    words = [str(answer).strip("'\"").lower() for answer in answers]
    wrong = [word for word in words if word not in (*YES, *NO)]
    if wrong:
        raise ValueError(f"{where}: an answer must be yes or no, but one is {wrong[0]!r}.")
    signs = (1 if word in YES else -1 for word in words)
    return sum(sign * weight for sign, weight in zip(signs, weights, strict=True)) / len(weights)
