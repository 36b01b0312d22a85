# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The words of the world, and pictures of them: sharp or blurred, spelled right or wrong."""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont


HERE = Path(__file__).resolve().parent
HEIGHT, WIDTH = 32, 96
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Debian's packages fonts-dejavu-core and fonts-liberation
FONTS = (
    "dejavu/DejaVuSans-Bold.ttf",
    "dejavu/DejaVuSerif-Bold.ttf",
    "dejavu/DejaVuSansMono-Bold.ttf",
    "liberation/LiberationSans-Bold.ttf",
    "liberation/LiberationSerif-Bold.ttf",
)
INKS = ((20, 20, 20), (150, 20, 30), (20, 60, 150), (10, 100, 50), (110, 40, 130))


def read_words(split: str) -> list[str]:
    """The words of `train`, `validation` or `test`."""
    return (HERE / "prompts" / f"{split}.txt").read_text(encoding="utf-8").replace('"', "").split()


def prompt_of(word: str) -> str:
    return f'"{word}"'


def misspell(word: str, rng: random.Random) -> str:
    """The word with another letter in one place, or with two neighbours swapped."""
    place = rng.randrange(len(word))
    if rng.random() < 0.3 and place + 1 < len(word) and word[place] != word[place + 1]:
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    return word[:place] + rng.choice(LETTERS.replace(word[place], "")) + word[place + 1 :]


def render(
    word: str, font: str, ink: tuple[int, int, int], blur: float = 0.0, fonts_dir: str = "/usr/share/fonts/truetype"
) -> Image.Image:
    """A picture of the word in capitals, as large as fits."""
    word, size = word.upper(), 26
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    canvas = ImageDraw.Draw(picture)
    while canvas.textlength(word, ImageFont.truetype(f"{fonts_dir}/{font}", size)) > WIDTH - 6:
        size -= 1
    middle = (WIDTH // 2, HEIGHT // 2)
    canvas.text(middle, word, fill=ink, font=ImageFont.truetype(f"{fonts_dir}/{font}", size), anchor="mm")
    return picture.filter(ImageFilter.GaussianBlur(blur)) if blur else picture


def draw(word: str, rng: random.Random, misspelled: float = 0.45, blurred: float = 0.4) -> Image.Image:
    """
    A picture from which the pipeline learns: in a random font and ink, and often bad.

    Args:
        word (`str`): The word of the prompt.
        rng (`random.Random`): The source of chance.
        misspelled (`float`, *optional*, defaults to `0.45`): Probability of a wrong letter.
        blurred (`float`, *optional*, defaults to `0.4`): Probability of a blur.
    """
    shown = misspell(word, rng) if rng.random() < misspelled else word
    blur = rng.uniform(0.8, 2.0) if rng.random() < blurred else 0.0
    return render(shown, rng.choice(FONTS), rng.choice(INKS), blur)


def to_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """Pictures `[N, 3, 32, 96]` in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 255.0
