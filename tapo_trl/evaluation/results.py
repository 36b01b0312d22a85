# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Scores of public benchmarks, from the files that their own tools write."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any


# Dimensions of VBench: weight, and the range that is mapped to [0, 1] (`scripts/constant.py` of Vchitect/VBench)
_VBENCH_QUALITY = {
    "subject_consistency": (1.0, 0.1462, 1.0),
    "background_consistency": (1.0, 0.2615, 1.0),
    "temporal_flickering": (1.0, 0.6293, 1.0),
    "motion_smoothness": (1.0, 0.706, 0.9975),
    "dynamic_degree": (0.5, 0.0, 1.0),
    "aesthetic_quality": (1.0, 0.0, 1.0),
    "imaging_quality": (1.0, 0.0, 1.0),
}
_VBENCH_SEMANTIC = {
    "object_class": (1.0, 0.0, 1.0),
    "multiple_objects": (1.0, 0.0, 1.0),
    "human_action": (1.0, 0.0, 1.0),
    "color": (1.0, 0.0, 1.0),
    "spatial_relationship": (1.0, 0.0, 1.0),
    "scene": (1.0, 0.0, 0.8222),
    "appearance_style": (1.0, 0.0009, 0.2855),
    "temporal_style": (1.0, 0.0, 0.364),
    "overall_consistency": (1.0, 0.0, 0.364),
}
VBENCH_DIMENSIONS = (*_VBENCH_QUALITY, *_VBENCH_SEMANTIC)
_QUALITY_WEIGHT = 4  # to 1 of the semantic score


def _read(path: str | Path, tool: str, what: str) -> str:
    """The text of a result file, or one error for whatever cannot be one."""
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder, but the results of {tool} are {what}: name the file.")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no result file of {tool}: it is no text ({error}).") from error


def _parse(texts: Iterable[str], path: str | Path, tool: str) -> list[Any]:
    try:
        return [json.loads(text) for text in texts]
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is no result file of {tool}: it is no JSON ({error}). Did the tool stop while it wrote it?"
        ) from error


def _score(value: Any, where: str) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {value!r} is no number.") from error
    if not math.isfinite(score):
        raise ValueError(f"{where}: {value!r} is not finite.")
    return score


def read_geneval(path: str | Path) -> dict[str, float]:
    """
    GenEval's scores from the `results.jsonl` of its `evaluation/evaluate_images.py`.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `dict[str, float]`: Share of correct images of each task, and `overall`, the mean over the tasks (not over the images).

    Raises:
        ValueError: if it is another or a broken file.
    """
    lines = _read(path, "GenEval", "one .jsonl file").splitlines()
    rows = _parse([line for line in lines if line.strip()], path, "GenEval")
    if not rows or not all(isinstance(row, dict) and {"tag", "correct"} <= set(row) for row in rows):
        raise ValueError(f"{path} is no result file of GenEval: every line needs `tag` and `correct`.")
    wrong = [row["correct"] for row in rows if row["correct"] not in (True, False)]
    if wrong:
        raise ValueError(f"{path} is no result file of GenEval: `correct` must be true or false, but is {wrong[0]!r}.")
    tasks = list(dict.fromkeys(row["tag"] for row in rows))
    scores = {task: mean(bool(row["correct"]) for row in rows if row["tag"] == task) for task in tasks}
    return {**scores, "overall": mean(scores.values())}


def read_compbench(path: str | Path) -> float:
    """
    The score of one category of T2I-CompBench++ from the `vqa_result.json` of its tools: the mean of its answers.

    Args:
        path (`str` or `Path`): The file.

    Raises:
        ValueError: if it is another or a broken file.
    """
    (rows,) = _parse([_read(path, "T2I-CompBench", "one .json file")], path, "T2I-CompBench")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "answer" in row for row in rows):
        raise ValueError(
            f"{path} is no result file of T2I-CompBench: it must be a list of `question_id` and `answer`."
        )
    return mean(_score(row["answer"], f"{path}, entry {number}, `answer`") for number, row in enumerate(rows, 1))


def read_vbench(folder: str | Path) -> dict[str, float]:
    """
    VBench's scores from the `*_eval_results.json` files of a folder.

    Args:
        folder (`str` or `Path`): Where `vbench evaluate` wrote them.

    Returns:
        `dict[str, float]`: Each dimension as the tool reports it and, if all 16 are there, `quality`, `semantic` and `total`.

    Raises:
        ValueError: if there is no result, or a broken one, or two of one dimension.
    """
    scores: dict[str, float] = {}
    if Path(folder).is_file():
        raise ValueError(f"{folder} is a file: name the folder of the `*_eval_results.json` files of VBench.")
    for file in sorted(Path(folder).glob("*_eval_results.json")):
        (results,) = _parse([_read(file, "VBench", "one .json file")], file, "VBench")
        if not isinstance(results, dict) or not all(isinstance(part, list) and part for part in results.values()):
            raise ValueError(
                f"{file} is no result file of VBench: it must be an object `{{dimension: [score, ...]}}`."
            )
        for dimension, result in results.items():
            if dimension in scores:
                raise ValueError(f"{folder} has two results of `{dimension}`: keep one of them.")
            scores[dimension] = _score(result[0], f"{file}, `{dimension}`")
    if not scores:
        raise ValueError(f"{folder} has no `*_eval_results.json` of VBench.")
    return {**scores, **(vbench_total(scores) if set(VBENCH_DIMENSIONS) <= set(scores) else {})}


def vbench_total(scores: dict[str, float]) -> dict[str, float]:
    """
    VBench's total: (4 quality + semantic) / 5, each a weighted mean of dimensions that are mapped to [0, 1].

    Args:
        scores (`dict[str, float]`): The 16 dimensions, each in [0, 1] as VBench reports it.

    Returns:
        `dict[str, float]`: `quality`, `semantic` and `total`.

    Raises:
        ValueError: if a dimension is missing. (VBench's own script counts it as 0.)
    """
    missing = [name for name in VBENCH_DIMENSIONS if name not in scores]
    if missing:
        raise ValueError(f"VBench's total needs all 16 dimensions, and {missing} are missing.")

    def weighted(dimensions: dict[str, Any]) -> float:
        parts = [w * (scores[name] - low) / (high - low) for name, (w, low, high) in dimensions.items()]
        return sum(parts) / sum(w for w, _, _ in dimensions.values())

    quality, semantic = weighted(_VBENCH_QUALITY), weighted(_VBENCH_SEMANTIC)
    total = (_QUALITY_WEIGHT * quality + semantic) / (_QUALITY_WEIGHT + 1)
    return {"quality": quality, "semantic": semantic, "total": total}
