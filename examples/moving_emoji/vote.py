# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
Simulated people vote in a study of moving-emoji clips, with known accuracy, ties and bias to the left.

    python examples/moving_emoji/vote.py runs/moving_emoji/loop/pairs --people 3 --accuracy 0.85

The right answers come from the judges of this world: the better visual quality is that of the clip which is less probably distorted, the
better motion that of the clip which is less probably jerky, and the better text alignment that of the clip which shows the subject with a
higher probability and moves where the prompt says. Clips that differ by less than `--margin` are equally good.
"""

import argparse
from pathlib import Path

import torch
from clip_judges import direction_hits, load_judges
from clips import FPS, FRAMES, KINDS, SIZE
from simulate_votes import add_people, vote  # of the emoji world, which `clip_judges` puts on the path

from tapo_trl.data.videos import VideoReader
from tapo_trl.human.study import Study
from tapo_trl.human.votes import FIRST, SECOND, TIE


def rate(clips: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
    """How good clips `[B, 3, 9, 48, 48]` in [-1, 1] are, `[B]` in [0, 1] by dimension."""
    quality_judge, subject_judge = load_judges()
    kinds = quality_judge.probabilities(clips)
    return {
        "visual_quality": 1 - kinds[:, KINDS.index("distorted")],
        "motion_consistency": 1 - kinds[:, KINDS.index("jerky")],
        "text_alignment": subject_judge.probabilities(clips, prompts) * direction_hits(clips, prompts),
    }


def true_answers(study: Study, margin: float) -> dict[str, dict[str, float]]:
    """The right answer to each question on each pair. Known answers are right."""
    pairs, reader = study.read_pairs(), VideoReader(SIZE, SIZE, FRAMES, FPS)
    prompts = [pair.prompt for pair in pairs]
    first, second = (
        rate(torch.stack([reader.load(study.folder / medium, medium) for medium in media]) * 2 - 1, prompts)
        for media in zip(*(pair.media for pair in pairs), strict=True)
    )
    truths: dict[str, dict[str, float]] = {}
    for row, pair in enumerate(pairs):
        differences = {name: (first[name][row] - second[name][row]).item() for name in study.dimension_names}
        truths[pair.pair_id] = {
            name: TIE if abs(value) < margin else FIRST if value > 0 else SECOND for name, value in differences.items()
        } | (pair.gold or {})
    return truths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument(
        "--margin", default=0.1, type=float, help="Largest difference, in [0, 1], of equally good clips."
    )
    add_people(parser)
    args = parser.parse_args()
    study = Study.load(args.study)
    vote(args, study, true_answers(study, args.margin))


if __name__ == "__main__":
    main()
