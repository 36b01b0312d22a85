# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Preference pairs of real clips: an annotator who likes clean clips that show what the prompt says.

    python examples/moving_emoji/make_pairs.py --output_dir runs/moving_emoji/pairs

Writes nearly lossless videos (H.264, RGB) to `OUTPUT_DIR/videos` and, for the prompts of each split, `train.parquet`,
`validation.parquet` and `test.parquet` with the columns `prompt`, `chosen`, `rejected` (absolute paths of videos) and
`kind`. The chosen clip is always clean and right; by `kind`, the rejected one is

- `jerky` or `distorted`: the same subject and direction, with this fault;
- `subject` or `direction`: a clean clip of another subject or another direction;
- `colour`: the same subject and direction in too strong or wrong colours. The model draws no such clips; without these
  pairs "not faded" is all that a reward learns of colour, and the policy becomes garish.
"""

import argparse
import random
import time
from pathlib import Path

import av
import numpy as np
from clips import (
    DIRECTIONS,
    FPS,
    HERE,
    KINDS,
    SUBJECTS,
    draw_clip,
    load_subjects,
    miscolour,
    parse_prompt,
    split_prompts,
)
from datasets import Dataset


FAULTS = ("jerky", "distorted", "subject", "direction", "colour")


def write_video(frames: np.ndarray, path: Path, crf: int) -> None:
    """Writes frames `[F, H, W, 3]` (uint8) as an MP4 file; `crf` 0 is lossless."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=FPS, options={"crf": str(crf), "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def make_pairs(prompts: list[str], counts: dict[str, int], folder: Path, crf: int, rng: random.Random) -> list[dict]:
    """
    Args:
        prompts (`list[str]`): prompts of one split.
        counts (`dict[str, int]`): pairs of each kind in `FAULTS` per prompt.
        folder (`Path`): receives the videos.
        crf (`int`): compression of the videos, 0 for none.
        rng (`random.Random`): source of the random choices.
    """
    subjects, rows = load_subjects(), []

    def video(name: str, subject: str, direction: str, fault: str | None = None) -> str:
        path = folder / f"{name}.mp4".replace(" ", "_")
        frames = draw_clip(subjects[subject], direction, fault if fault in KINDS else "clean", rng)
        write_video(miscolour(frames, rng) if fault == "colour" else frames, path, crf)
        return str(path.resolve())

    for prompt in prompts:
        subject, direction = parse_prompt(prompt)
        for fault, count in counts.items():
            for i in range(count):
                name = f"{subject} {direction} {fault} {i}"
                if fault == "subject":
                    wrong = (rng.choice([other for other in SUBJECTS if other != subject]), direction)
                elif fault == "direction":
                    wrong = (subject, rng.choice([other for other in DIRECTIONS if other != direction]))
                else:
                    wrong = (subject, direction, fault)
                chosen, rejected = video(f"{name} chosen", subject, direction), video(f"{name} rejected", *wrong)
                rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "kind": fault})
    rng.shuffle(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE.parents[1] / "runs" / "moving_emoji" / "pairs")
    parser.add_argument("--crf", type=int, default=0, help="Compression of the videos; 0 is lossless.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    start = time.perf_counter()
    (args.output_dir / "videos").mkdir(parents=True, exist_ok=True)
    for split, prompts in split_prompts().items():
        per_prompt = (2, 1, 1, 1, 2) if split == "train" else (1, 1, 1, 1, 1)
        counts = dict(zip(FAULTS, per_prompt, strict=True))
        rows = make_pairs(prompts, counts, args.output_dir / "videos", args.crf, random.Random(f"{split} {args.seed}"))
        Dataset.from_list(rows).to_parquet(args.output_dir / f"{split}.parquet")
        print(f"{split}: {len(rows)} pairs of {len(prompts)} prompts")
    print(f"{time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    main()
