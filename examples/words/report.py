# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
What training on the reward `ocr` did to the words model: the same words and seeds before and after.

    python examples/words/report.py --loras TAPO=runs/words/tapo Flow-GRPO=runs/words/grpo

RapidOCR gave the reward. Tesseract (Debian's package tesseract-ocr) judges: nothing was trained with it. Writes `metrics.json` and
`before_after.png`, and prints a table.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from words import HEIGHT, HERE, WIDTH, prompt_of, read_words

from tapo_trl import get_reward, load_policy
from tapo_trl.media.pictures import images_to_pil
from tapo_trl.policies.sampling import generate_samples
from tapo_trl.rewards.pretrained.ocr import edit_distance


def read_with_tesseract(images: torch.Tensor) -> list[str]:
    """What Tesseract reads in each of the images `[N, 3, 32, 96]`, one word per image, lower case."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for index, picture in enumerate(images_to_pil(images)):
            border = Image.new("RGB", (WIDTH + 32, HEIGHT + 32), "white")
            border.paste(picture, (16, 16))
            files.append(f"{folder}/{index:05d}.png")
            border.resize((border.width * 3, border.height * 3), Image.Resampling.BICUBIC).save(files[-1])
        listing = Path(folder) / "files.txt"
        listing.write_text("\n".join(files))
        options = ["--psm", "8", "-c", "tessedit_char_whitelist=ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
        try:
            result = subprocess.run(
                ["tesseract", str(listing), "stdout", *options], capture_output=True, text=True, check=True
            )
        except FileNotFoundError:
            raise SystemExit("The report needs Tesseract: `apt-get install tesseract-ocr`.") from None
    return [page.strip().lower() for page in result.stdout.split("\f")[: len(files)]]


def tesseract_reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Share of the letters that Tesseract reads right, for `--guard_reward report:tesseract_reward`."""
    words = [prompt.strip('"') for prompt in prompts]
    read = read_with_tesseract(images)
    distances = [edit_distance(seen, word) / len(word) for seen, word in zip(read, words, strict=True)]
    return 1 - torch.tensor(distances).clamp(max=1)


def sharpness(images: torch.Tensor) -> float:
    """Mean size of the Laplacian of the brightness: it falls when edges are blurred."""
    brightness = images.mean(dim=1)
    neighbours = sum(brightness.roll(shift, dim) for shift in (-1, 1) for dim in (1, 2))
    return (4 * brightness - neighbours)[:, 1:-1, 1:-1].abs().mean().item()


def measure(images: torch.Tensor, words: list[str]) -> dict[str, float]:
    read = read_with_tesseract(images)
    distances = [edit_distance(seen, word) for seen, word in zip(read, words, strict=True)]
    rewards = get_reward("ocr", detect=False)(images, [prompt_of(word) for word in words])
    return {
        "reward (RapidOCR)": rewards.mean().item(),
        "right (RapidOCR)": (rewards == 1).float().mean().item(),
        "right (Tesseract)": sum(distance == 0 for distance in distances) / len(words),
        "wrong letters (Tesseract)": sum(distances) / len(words),
        "sharpness": sharpness(images),
    }


def draw_picture(results: dict[str, torch.Tensor], words: list[str], path: Path, rows: int = 10, columns: int = 4):
    """A column of pictures per model: some words, the same seeds."""
    scale, label, top, gap = 1, 70, 24, 24
    block = columns * WIDTH * scale
    picture = Image.new("RGB", (label + len(results) * (block + gap), top + rows * HEIGHT * scale), "white")
    canvas = ImageDraw.Draw(picture)
    for row, word in enumerate(words[:rows]):
        canvas.text((6, top + row * HEIGHT + 10), word, fill="black")
    for number, (name, images) in enumerate(results.items()):
        left = label + number * (block + gap)
        canvas.text((left, 6), name, fill="black")
        for row in range(rows):
            for column in range(columns):
                cell = images_to_pil(images[column * len(words) + row][None])[0]
                picture.paste(cell, (left + column * WIDTH, top + row * HEIGHT))
    picture.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(HERE / "pipeline"))
    parser.add_argument("--loras", nargs="+", default=["TAPO=runs/words/tapo"], help="NAME=FOLDER of each training.")
    parser.add_argument("--output_dir", default="report/words", type=Path)
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--seeds", type=int, default=8, help="Pictures per word.")
    parser.add_argument("--num_inference_steps", type=int, default=12)
    args = parser.parse_args()

    words = read_words(args.split)
    policy = load_policy(args.base)
    repeated = words * args.seeds

    def draw() -> torch.Tensor:
        return generate_samples(
            policy,
            policy.transformer,
            [prompt_of(word) for word in repeated],
            lambda prompts: policy.encode_prompts(prompts, 1),
            "",
            latent_shape=policy.latent_shape(HEIGHT, WIDTH),
            num_inference_steps=args.num_inference_steps,
            guidance_scale=1.0,
            seed=0,
            batch_size=64,
        )

    pictures = {"before": draw()}
    for entry in args.loras:
        name, _, folder = entry.partition("=")
        policy.pipeline.load_lora_weights(folder)
        pictures[f"after {name}"] = draw()
        policy.pipeline.unload_lora_weights()
    metrics = {name: measure(images, repeated) for name, images in pictures.items()}

    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw_picture(pictures, words, args.output_dir / "before_after.png")
    print(
        f"{f'{len(words)} words of `{args.split}`, {args.seeds} pictures each':44}"
        + "".join(f"{n:>18}" for n in metrics)
    )
    for key in metrics["before"]:
        print(f"{key:44}" + "".join(f"{values[key]:18.3f}" for values in metrics.values()))
    print(f"\nPicture: {args.output_dir / 'before_after.png'}")


if __name__ == "__main__":
    main()
