# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The clips of the moving-emoji world: an emoji that moves across nine frames, clean or with a fault.

    subjects = load_subjects()
    frames = draw_clip(subjects["panda face"], "left", "clean", random.Random(0))  # uint8 [9, 48, 48, 3]

Run as a script it writes the prompts of the three splits to `prompts/`.

A prompt names the subject and the direction, never the kind of the clip, so a model of these clips draws all three.
"""

import random
from functools import cache
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from PIL import Image


HERE = Path(__file__).resolve().parent
EMOJI_DATA = HERE.parent / "emoji" / "data" / "emoji.parquet"
STYLE = "noto"
SUBJECTS = (
    *("panda face", "frog face", "pig face", "lion face", "penguin", "ladybug", "octopus", "butterfly"),
    *("red apple", "strawberry", "watermelon", "doughnut", "hamburger", "avocado", "sunflower", "cactus"),
    *("bus", "rocket", "fire", "rainbow", "soccer ball", "robot face", "wrapped gift", "ghost"),
)
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (rows, columns) per unit
KINDS = ("clean", "jerky", "distorted")
FRAMES, SIZE, FPS = 9, 48, 8
STEP = 2  # pixels from frame to frame
PICTURE_SIZE = 28
# The first and the last frame of a jerky clip are in their place, so that its direction stays defined; between them
# the clip leaps back and forth.
JERKY_ORDERS = (
    (0, 5, 2, 7, 1, 6, 3, 4, 8),
    (0, 6, 1, 4, 7, 2, 5, 3, 8),
    (0, 4, 7, 3, 6, 1, 5, 2, 8),
    (0, 7, 3, 6, 2, 5, 1, 4, 8),
)


@cache
def load_subjects(path: Path = EMOJI_DATA, style: str = STYLE) -> dict[str, Image.Image]:
    """Reads the pictures of the subjects, 64x64 RGB on white, from the emoji data set."""
    dataset = load_dataset("parquet", data_files=str(path), split="train")
    rows = dataset.filter(lambda row: row["style"] == style and row["prompt"] in SUBJECTS)
    pictures = dict(zip(rows["prompt"], (image.convert("RGB") for image in rows["image"]), strict=True))
    return {subject: pictures[subject] for subject in SUBJECTS}


def all_prompts() -> list[str]:
    """Every subject in every direction."""
    return [f"{subject} moving {direction}" for subject in SUBJECTS for direction in DIRECTIONS]


def parse_prompt(prompt: str) -> tuple[str, str]:
    """The subject and the direction of a prompt."""
    subject, _, direction = prompt.partition(" moving ")
    return subject, direction


def split_prompts() -> dict[str, list[str]]:
    """
    The prompts for preference training (`train`), for choosing its settings (`validation`) and for the reported numbers
    (`test`): of every subject two directions, one and one, each direction equally often in each split.
    """
    directions, splits = list(DIRECTIONS), {"train": [], "validation": [], "test": []}
    for i, subject in enumerate(SUBJECTS):
        test, validation = i % 4, (i + 1 + i // 4 % 3) % 4
        for j, direction in enumerate(directions):
            name = "test" if j == test else "validation" if j == validation else "train"
            splits[name].append(f"{subject} moving {direction}")
    return splits


def distort(frames: np.ndarray) -> np.ndarray:
    """Blocks of 4x4 pixels and washed-out colours: uint8 [F, H, W, 3] to the same."""
    count, height, width, _ = frames.shape
    blocks = frames.reshape(count, height // 4, 4, width // 4, 4, 3).mean(axis=(2, 4))
    grey = blocks.mean(axis=-1, keepdims=True)
    faded = 255 - 0.75 * (255 - (grey + 0.35 * (blocks - grey)))
    return faded.repeat(4, axis=1).repeat(4, axis=2).round().astype(np.uint8)


def miscolour(frames: np.ndarray, rng: random.Random) -> np.ndarray:
    """Too strong colours with a random cast: uint8 `[F, H, W, 3]` to the same. White stays white."""
    gains = np.array([rng.uniform(0.4, 1.6) for _ in range(3)])
    ink = 255.0 - frames
    grey = ink.mean(axis=-1, keepdims=True)
    ink = (grey + rng.uniform(1.0, 2.0) * (ink - grey)) * gains
    return (255 - ink).clip(0, 255).round().astype(np.uint8)


def draw_clip(picture: Image.Image, direction: str, kind: str, rng: random.Random) -> np.ndarray:
    """
    Draws one clip with a random start and, if jerky, a random order. All places are even, which spares the small
    autoencoder half of the pixel shifts.

    Args:
        picture (`PIL.Image.Image`): subject on white.
        direction (`str`): key of `DIRECTIONS`.
        kind (`str`): one of `KINDS`.
        rng (`random.Random`): source of the random choices.

    Returns:
        `np.ndarray` of type uint8 and shape `[9, 48, 48, 3]`.
    """
    size = PICTURE_SIZE
    pixels = np.asarray(picture.resize((size, size), Image.LANCZOS))
    order = rng.choice(JERKY_ORDERS) if kind == "jerky" else range(FRAMES)
    free = SIZE - size
    along, across = rng.choice(range(0, free - STEP * (FRAMES - 1) + 1, 2)), free // 2 + rng.choice((-4, -2, 0, 2, 4))
    rows, columns = DIRECTIONS[direction]
    if rows + columns < 0:  # mirrored: it starts at the far side
        along = free - along
    frames = np.full((FRAMES, SIZE, SIZE, 3), 255, dtype=np.uint8)
    for frame, place in zip(frames, order, strict=True):
        moved = along + (rows + columns) * STEP * place
        top, left = (moved, across) if rows else (across, moved)
        frame[top : top + size, left : left + size] = pixels
    return distort(frames) if kind == "distorted" else frames


def to_tensor(clips: list[np.ndarray]) -> torch.Tensor:
    """Clips as the model sees them: `[B, 3, 9, 48, 48]` in [-1, 1]."""
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def random_batch(count: int, rng: random.Random) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """Random clips `[B, 3, 9, 48, 48]` in [-1, 1], their prompts, and the numbers of their kinds `[B]`."""
    subjects = load_subjects()
    prompts = [rng.choice(all_prompts()) for _ in range(count)]
    kinds = [rng.randrange(len(KINDS)) for _ in range(count)]
    clips = []
    for prompt, kind in zip(prompts, kinds, strict=True):
        subject, direction = parse_prompt(prompt)
        clips.append(draw_clip(subjects[subject], direction, KINDS[kind], rng))
    return to_tensor(clips), prompts, torch.tensor(kinds)


def save_strips(clips: torch.Tensor, path: Path | str, columns: int = 1, scale: int = 1) -> None:
    """Writes clips `[N, 3, F, H, W]` in [-1, 1] as one PNG: the frames of a clip side by side, `columns` clips a row."""
    clips = (clips.detach().float().cpu().clamp(-1, 1) + 1) / 2
    clips = torch.nn.functional.pad(clips, (0, 1, 0, 1), value=0.8)  # a thin grey line between the frames
    strips = (clips.permute(0, 3, 2, 4, 1).flatten(2, 3) * 255).round().byte().numpy()  # [N, H, F * W, 3]
    blank = np.full_like(strips[:1], 255)
    strips = np.concatenate([strips, *[blank] * (-len(strips) % columns)])
    sheet = np.concatenate([np.concatenate(strips[i : i + columns], 1) for i in range(0, len(strips), columns)])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(sheet)
    image.resize((image.width * scale, image.height * scale), Image.NEAREST).save(path)


def main() -> None:
    (HERE / "prompts").mkdir(exist_ok=True)
    for name, prompts in split_prompts().items():
        (HERE / "prompts" / f"{name}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
