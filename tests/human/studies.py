# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Small studies, and people who vote with a known accuracy."""

import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tapo_trl.data.videos import write_video
from tapo_trl.human.study import Dimension, Pair, Study


QUALITY = Dimension("visual_quality", "Which looks better?", "Look at sharpness.")
ALIGNMENT = Dimension("text_alignment", "Which shows the text better?")


def add_media(folder: Path, name: str, videos: bool = False, size: int = 32) -> str:
    """A picture or a clip of one second, of its own colour."""
    rng = np.random.default_rng(abs(hash(name)) % 2**32)
    medium = f"media/{name}" + (".mp4" if videos else ".png")
    (folder / medium).parent.mkdir(parents=True, exist_ok=True)
    color = rng.integers(0, 255, 3).astype(np.uint8)
    if videos:
        frames = torch.from_numpy(color / 255).float()[:, None, None, None].expand(3, 8, size, size).clone()
        for frame in range(8):
            frames[:, frame, :, frame * size // 8 : (frame + 1) * size // 8] = 1.0
        write_video(folder / medium, frames, 8)
    else:
        Image.fromarray(np.broadcast_to(color, (size, size, 3)).copy()).save(folder / medium)
    return medium


def make_study(
    folder: Path, num_pairs: int = 6, videos: bool = False, gold: int = 0, repeats: int = 0, **settings
) -> Study:
    """A study of two sources."""
    study = Study(dimensions=[QUALITY, ALIGNMENT], **settings)
    study.save(folder)
    pairs = []
    for number in range(num_pairs):
        media = [add_media(folder, f"{source}/{number:04d}", videos) for source in "ab"]
        known = dict.fromkeys(study.dimension_names, 1.0) if number >= num_pairs - gold else None
        pairs.append(Pair(f"{number:04d}", f"p{number:04d}", f"prompt {number}", *media, "a", "b", gold=known))
    for number in range(repeats):
        pair = pairs[number]
        pairs.append(
            Pair(f"r{number:04d}", pair.prompt_id, pair.prompt, *pair.media, *pair.sources, repeat_of=pair.pair_id)
        )
    study.write_pairs(pairs)
    return study


def vote(annotator: str, pair_id: str, label: float | dict = 1.0, kind: str = "vote", **more) -> dict:
    """An event with an id of its own."""
    event = {"id": f"{annotator} {pair_id} {next(_NUMBERS)}", "kind": kind, "annotator": annotator, "pair_id": pair_id}
    if kind == "vote":
        event["labels"] = label if isinstance(label, dict) else {"visual_quality": label, "text_alignment": label}
    return event | more


_NUMBERS = itertools.count()
