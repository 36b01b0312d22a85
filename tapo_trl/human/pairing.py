# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Which media of a study are compared."""

import hashlib
import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.utils import logging

from ..data.videos import read_video
from .sources import find_medium
from .study import TEXT_ALIGNMENT, Pair, Study, is_video
from .votes import current_votes, read_events


logger = logging.get_logger(__name__)


def make_pairs(
    study: Study,
    prompts: Sequence[dict[str, Any]],
    matches: Sequence[tuple[str, str]],
    *,
    gold: int = 0,
    repeats: int = 0,
) -> list[Pair]:
    """
    Pair the media of each prompt, and write `pairs.jsonl`. Prompts that lack a medium are left out.

    Args:
        study ([`Study`]): The study.
        prompts (`Sequence[dict]`): Rows of `prompts.jsonl`.
        matches (`Sequence[tuple[str, str]]`): Names of the sources that are compared.
        gold (`int`, *optional*, defaults to `0`): Number of pairs with a known answer: a medium of the prompt, and one of the same source that
            shows another prompt. Needs the dimension `text_alignment`.
        repeats (`int`, *optional*, defaults to `0`): Number of pairs that come twice, with the sides swapped.

    Returns:
        `list[Pair]`: The pairs.

    Raises:
        ValueError: if votes have been given on pairs that would go.
    """
    rng, pairs = random.Random(study.seed), []
    for first, second in matches:
        for row in prompts:
            sources = [first, second]
            # Which of the two is medium 0 must not be the same for all prompts
            if hashlib.sha256(f"{study.seed} {first} {second} {row['prompt_id']}".encode()).digest()[0] % 2:
                sources.reverse()
            media = [find_medium(study.folder / "media" / source, row["prompt_id"]) for source in sources]
            if None not in media:
                pairs.append(_pair(study, row, media, sources))
    if not pairs:
        raise ValueError(f"{study.folder} has no prompt with media of two sources.")
    number = len(pairs)
    pairs += _gold_pairs(study, prompts, [name for match in matches for name in match], gold, rng)
    for pair in rng.sample(pairs[:number], min(repeats, number)):
        pairs.append(Pair(**{**vars(pair), "pair_id": f"{pair.pair_id}-again", "repeat_of": pair.pair_id}))
    _check_votes(study, pairs)
    study.write_pairs(pairs)
    return pairs


def _pair(study: Study, row: dict[str, Any], media: Sequence[Path], sources: Sequence[str]) -> Pair:
    files = [str(file.relative_to(study.folder)) for file in media]
    name = hashlib.sha256(" ".join(files).encode()).hexdigest()[:12]  # tells no source
    return Pair(name, row["prompt_id"], row["prompt"], *files, *sources)


def _gold_pairs(
    study: Study, prompts: Sequence[dict[str, Any]], sources: Sequence[str], number: int, rng: random.Random
) -> list[Pair]:
    if not number:
        return []
    if TEXT_ALIGNMENT.name not in study.dimension_names:
        raise ValueError(
            "`gold` needs a dimension `text_alignment`: its known answers are media that show another prompt."
        )
    pairs = []
    for index in range(number):
        source = sources[index % len(sources)]
        folder = study.folder / "media" / source
        shown = [row for row in prompts if find_medium(folder, row["prompt_id"])]
        if len(shown) < 2:
            raise ValueError(f"`gold` needs media of two prompts of {source}.")
        right, wrong = rng.sample(shown, 2)
        media = [find_medium(folder, row["prompt_id"]) for row in (right, wrong)]
        first = rng.randrange(2)
        pair = _pair(study, right, media[::-1] if first else media, [source, source])
        known = {TEXT_ALIGNMENT.name: 0.0 if first else 1.0}
        pairs.append(Pair(**{**vars(pair), "pair_id": f"{pair.pair_id}-{index}", "gold": known}))
    return pairs


def _check_votes(study: Study, pairs: Sequence[Pair]) -> None:
    file = study.folder / "pairs.jsonl"
    if not file.exists() or not (study.folder / "votes.jsonl").exists():
        return
    votes = current_votes(read_events(study.folder / "votes.jsonl", study.dimension_names, study.guideline_hash))
    kept = {pair.pair_id: pair for pair in pairs}
    lost = {vote["pair_id"] for vote in votes if vote["pair_id"] not in kept}
    if lost:
        raise ValueError(
            f"{len(lost)} pairs of {file} with votes would go: start another study, or keep the sources, `gold`, `repeats` and seed."
        )


def matches_of(sources: Sequence[str], compare: str) -> list[tuple[str, str]]:
    """`"all"`: each source with each other one; `"first"`: the first one with each other one."""
    if len(sources) < 2:
        raise ValueError("A study compares at least two sources.")
    return list(combinations(sources, 2)) if compare == "all" else [(sources[0], name) for name in sources[1:]]


def describe_shape(file: Path) -> str:
    """Size, and number of frames of a video, as people could tell sources apart by it."""
    if is_video(file):
        _, frames, height, width = read_video(file).shape
        return f"{width} x {height}, {frames} frames"
    with Image.open(file) as picture:
        return f"{picture.width} x {picture.height}"


def warn_of_different_shapes(study: Study, pairs: Sequence[Pair]) -> None:
    """Without a view, media of other sizes or lengths tell which source made them."""
    if study.view is not None or not pairs:
        return
    shapes = {
        source: describe_shape(study.folder / medium)
        for pair in pairs[:20]
        for source, medium in zip(pair.sources, pair.media, strict=True)
    }
    if len(set(shapes.values())) > 1:
        listed = "; ".join(f"{source}: {shape}" for source, shape in shapes.items())
        logger.warning(
            f"The sources can be told apart by the shape of their media ({listed}). Set `view` in study.yaml, such as {{height: 480, width: 832, "
            "num_frames: 81, fps: 16}, so that people see what training will read."
        )
