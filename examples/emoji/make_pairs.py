# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
Preference pairs of real emoji: an annotator who likes the 3D style, and the right picture over a wrong one.

    python examples/emoji/make_pairs.py

Writes, beside this script, `pairs/SPLIT.parquet` (`prompt`, `chosen`, `rejected`, `kind`) and `prompts/SPLIT.txt` for the
splits `train`, `validation` (for choosing settings) and `test` (for the number that is reported), which share no caption. Two
pairs of each kind per caption:

- `style`: the caption drawn in the preferred style is chosen over each of the two other styles;
- `subject`: a picture of the caption is chosen over a picture of another caption, both in the same other style or both
  in the preferred one.
"""

import argparse
import random
from pathlib import Path

from datasets import Dataset, Features, Image, Value, load_dataset


HERE = Path(__file__).resolve().parent
FEATURES = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image(), "kind": Value("string")})


def make_pairs(images: dict[tuple[str, str], dict], preferred_style: str, seed: int) -> list[dict]:
    """
    Args:
        images (`dict`): encoded image by `(caption, style)`.
        preferred_style (`str`): style that wins.
        seed (`int`): seed of the wrong captions.
    """
    rng = random.Random(seed)
    captions = sorted({caption for caption, _ in images})
    others = sorted({style for _, style in images} - {preferred_style})
    rows = []
    for caption in captions:
        chosen = images[caption, preferred_style]
        for style in others:
            rows.append((caption, chosen, images[caption, style], "style"))
        for style in (preferred_style, rng.choice(others)):
            wrong = rng.choice([other for other in captions if other != caption])
            rows.append((caption, images[caption, style], images[wrong, style], "subject"))
    rng.shuffle(rows)
    return [dict(zip(FEATURES, row, strict=True)) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preferred_style", default="fluent", choices=["fluent", "noto", "twemoji"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    emoji = load_dataset("parquet", data_files=str(HERE / "data" / "emoji.parquet"), split="train")
    emoji = emoji.cast_column("image", Image(decode=False))
    for folder in ("pairs", "prompts"):
        (HERE / folder).mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        rows = [row for row in emoji if row["split"] == split]
        images = {(row["prompt"], row["style"]): row["image"] for row in rows}
        pairs = Dataset.from_list(make_pairs(images, args.preferred_style, args.seed), features=FEATURES)
        pairs.to_parquet(HERE / "pairs" / f"{split}.parquet")
        captions = sorted({row["prompt"] for row in rows})
        (HERE / "prompts" / f"{split}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
        print(f"{split}: {len(pairs)} pairs of {len(captions)} captions, {args.preferred_style!r} preferred")


if __name__ == "__main__":
    main()
