# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = [
#     "tapo-trl[rewards,video]",
# ]
# ///

"""
Check a pretrained reward with its real weights: load it, rate a picture, and compare with a published number where there is one.

```bash
python examples/check_reward.py clip
python examples/check_reward.py pickscore --image photo.png --prompt "two cats on a sofa"
python examples/check_reward.py videoreward --image clip.mp4 --prompt "a cat runs"
```

It downloads weights and pictures, so it needs a network once. The exit status is 1 if a score is not the published one.
"""

import argparse
import io
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from PIL import Image, ImageDraw, ImageFont

from tapo_trl import get_reward
from tapo_trl.data.images import ImageReader
from tapo_trl.data.videos import read_video
from tapo_trl.evaluation.scores import VIDEOS
from tapo_trl.rewards.pretrained import reward_class


CATS = "http://images.cocodataset.org/val2017/000000039769.jpg"
OCEAN = "a painting of an ocean with clouds and birds, day time, low depth field effect"
OCEANS = "https://raw.githubusercontent.com/THUDM/ImageReward/main/assets/images/{}.webp"


@dataclass
class Check:
    """
    Published scores.

    Args:
        images (`list[str]`): addresses of the pictures.
        prompts (`list[str]`): one per picture.
        expected (`list[float]`): the published scores.
        tolerance (`float`): half precision and other hardware change this much.
        source (`str`): where they are published.
        kwargs (`dict`): arguments of [`get_reward`].
    """

    images: list[str]
    prompts: list[str]
    expected: list[float]
    tolerance: float
    source: str
    kwargs: dict = field(default_factory=dict)


CHECKS = {
    "clip": Check(
        [CATS] * 2,
        ["a photo of a cat", "a photo of a dog"],
        [24.5701, 19.3049],
        0.05,
        "the test of CLIPModel in transformers, of the smaller CLIP",
        {"weights": "openai/clip-vit-base-patch32"},
    ),
    "hpsv2.1": Check(
        ["https://raw.githubusercontent.com/tgxs002/HPSv2/master/assets/demo_image.jpg"],
        ["A cat with two horns on its head"],
        [28.76],
        0.1,
        "issue 27 of tgxs002/HPSv2, of the weights of v2.0",
        {"weights": "HPS_v2_compressed.pt"},
    ),
    "imagereward": Check(
        [OCEANS.format(number) for number in (1, 2, 3, 4)],
        [OCEAN] * 4,
        [0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492],
        0.02,
        "the README of THUDM/ImageReward",
    ),
    "ocr": Check(
        ["drawn here"], ['a card that says "Hello World"'], [1.0], 0.0, "the definition: the text is in the picture"
    ),
}


def read_image(place: str) -> torch.Tensor:
    """A picture from a file or an address, of shape `(1, 3, H, W)`; or a card with a text."""
    if place == "drawn here":
        image = Image.new("RGB", (512, 256), "white")
        ImageDraw.Draw(image).text((60, 90), "Hello World", fill="black", font=ImageFont.load_default(60))
    elif "://" in place:
        with urllib.request.urlopen(place, timeout=60) as response:
            image = Image.open(io.BytesIO(response.read()))
    else:
        image = Image.open(place)
    return ImageReader(image.height, image.width).load(image)[None]


def read_file(place: str) -> torch.Tensor:
    """A picture, see [`read_image`], or a video from a file, of shape `(1, 3, F, H, W)`."""
    return read_video(place)[None] if Path(place).suffix.lower() in VIDEOS else read_image(place)


def frames_per_second(file: str) -> float:
    """Those of a video file."""
    import av

    with av.open(file) as container:
        return float(container.streams.video[0].average_rate)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare a pretrained reward with published scores.")
    parser.add_argument("name", help="name of a reward, such as pickscore; `tapo-trl rewards` lists them")
    parser.add_argument("--image", help="a picture of yours, or a video file")
    parser.add_argument("--prompt", help="its prompt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    scorer = reward_class(args.name)
    low, high = scorer.score_range
    print(f"{args.name}: usual range {low:g} to {high:g}, licence {scorer.license}, {scorer.citation}")
    check = CHECKS.get(args.name)
    if scorer.reads == "video" and Path(args.image or "").suffix.lower() not in VIDEOS:
        parser.error(f"{args.name} reads videos: give one, `--image clip.mp4 --prompt 'what it shows'`")
    if args.image is not None or check is None:
        kwargs = {"fps": frames_per_second(args.image)} if scorer.reads == "video" else {}
        reward = get_reward(args.name, **kwargs)
        image, prompt = args.image or CATS, args.prompt or "two cats on a sofa"
        score = reward(read_file(image).to(args.device), [prompt]).item()
        print(f"{score:9.4f}  {image}, {prompt!r}. No published score is known for it.")
        return 0

    kwargs = dict(check.kwargs)
    if str(kwargs.get("weights", "")).endswith(".pt"):
        kwargs["weights"] = hf_hub_download(scorer.weights, kwargs["weights"])
    reward, is_same = get_reward(args.name, **kwargs), True
    for place, prompt, expected in zip(check.images, check.prompts, check.expected, strict=True):
        score = reward(read_image(place).to(args.device), [prompt]).item()
        is_same &= abs(score - expected) <= check.tolerance
        print(f"{score:9.4f}  published {expected:.4f}  {place}, {prompt!r}")
    print(f"{'As' if is_same else 'NOT as'} in {check.source}.")
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
