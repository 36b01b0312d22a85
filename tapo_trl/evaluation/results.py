# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Scores of public benchmarks, from the files that their own tools write."""

import json
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


def read_geneval(path: str | Path) -> dict[str, float]:
    """
    GenEval's scores from the `results.jsonl` of its `evaluation/evaluate_images.py`.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `dict[str, float]`: Share of correct images of each task, and `overall`, the mean over the tasks (not over the images).
    """
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows or any({"tag", "correct"} - set(row) for row in rows):
        raise ValueError(f"{path} is no result file of GenEval: every line needs `tag` and `correct`.")
    tasks = list(dict.fromkeys(row["tag"] for row in rows))
    scores = {task: mean(bool(row["correct"]) for row in rows if row["tag"] == task) for task in tasks}
    return {**scores, "overall": mean(scores.values())}


def read_compbench(path: str | Path) -> float:
    """
    The score of one category of T2I-CompBench++ from the `vqa_result.json` of its tools: the mean of its answers.

    Args:
        path (`str` or `Path`): The file.
    """
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not rows or any("answer" not in row for row in rows):
        raise ValueError(
            f"{path} is no result file of T2I-CompBench: it must be a list of `question_id` and `answer`."
        )
    return mean(float(row["answer"]) for row in rows)


def read_vbench(folder: str | Path) -> dict[str, float]:
    """
    VBench's scores from the `*_eval_results.json` files of a folder.

    Args:
        folder (`str` or `Path`): Where `vbench evaluate` wrote them.

    Returns:
        `dict[str, float]`: Each dimension as the tool reports it and, if all 16 are there, `quality`, `semantic` and `total`.
    """
    scores: dict[str, float] = {}
    for file in sorted(Path(folder).glob("*_eval_results.json")):
        for dimension, result in json.loads(file.read_text(encoding="utf-8")).items():
            if dimension in scores:
                raise ValueError(f"{folder} has two results of `{dimension}`: keep one of them.")
            scores[dimension] = float(result[0])
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
