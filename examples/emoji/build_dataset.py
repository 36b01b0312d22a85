# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Builds the emoji data set: every caption drawn in three artist styles, 64x64 RGB on white.

    python examples/emoji/build_dataset.py --packages_dir /tmp/npm                # the committed curated set
    python examples/emoji/build_dataset.py --packages_dir /tmp/npm --all --output_dir /tmp/emoji_all

The images come from three npm packages, which the script fetches with `npm pack` when the folder lacks them.
"""

import argparse
import io
import json
import random
import re
import subprocess
import tarfile
from pathlib import Path

from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage


HERE = Path(__file__).resolve().parent
PACKAGES = {
    "noto": "emoji-datasource-google@16.0.0",
    "twemoji": "emoji-datasource-twitter@16.0.0",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
}
STYLES = tuple(PACKAGES)
SPLITS = ("train", "validation", "test")
SKIPPED_CATEGORIES = ("Flags", "Component")
LICENSES = """# Licences of the images in `emoji.parquet`

The pictures were composited on white and resized to 64x64 pixels; nothing else was changed.

| `style` | artists | package | licence |
| --- | --- | --- | --- |
| `noto` | Noto Emoji, Google | npm `emoji-datasource-google` 16.0.0 | Apache-2.0 |
| `twemoji` | Twemoji, © Twitter, Inc and contributors | npm `emoji-datasource-twitter` 16.0.0 | CC-BY 4.0 |
| `fluent` | Fluent Emoji, © Microsoft Corporation | npm `@lobehub/fluent-emoji-3d` 1.1.0 | MIT |

Homes: <https://github.com/googlefonts/noto-emoji>, <https://github.com/jdecked/twemoji>,
<https://github.com/microsoft/fluentui-emoji>. Licence texts: <https://www.apache.org/licenses/LICENSE-2.0>,
<https://creativecommons.org/licenses/by/4.0/>, <https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE>.

The table of names (`emoji.json` of `emoji-datasource-google`) is MIT licensed, © Cal Henderson.

## MIT License (Fluent Emoji)

Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def package_path(packages_dir: Path, package: str) -> Path:
    """Returns the tarball of an npm package, fetching it with `npm pack` when it is not there yet."""
    name = package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz"
    if not (packages_dir / name).exists():
        packages_dir.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", package], cwd=packages_dir, check=True, stdout=subprocess.DEVNULL)
    return packages_dir / name


def read_members(path: Path, pattern: str) -> dict[str, bytes]:
    """Reads the files of a tarball whose name matches `pattern`, keyed by the pattern's first group."""
    members = {}
    with tarfile.open(path) as tar:
        for member in tar:
            match = re.fullmatch(pattern, member.name)
            if match:
                members[match.group(1)] = tar.extractfile(member).read()
    return members


def to_pixels(data: bytes, size: int = 64) -> PILImage.Image:
    """Decodes an image, puts it on white and resizes it to `size` x `size`."""
    image = PILImage.open(io.BytesIO(data)).convert("RGBA")
    canvas = PILImage.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    canvas = canvas.convert("RGB")
    return canvas if canvas.size == (size, size) else canvas.resize((size, size), PILImage.LANCZOS)


def read_captions(path: Path) -> dict[str, tuple[str, str]]:
    """Reads `captions.txt` as `{short_name: (caption, category)}`."""
    subjects = {}
    for line in path.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        category, items = line.split(":", 1)
        for item in items.split(","):
            short_name, _, caption = item.strip().partition("=")
            caption = caption or re.sub(r"[_-]", " ", short_name)
            if short_name in subjects or caption in {c for c, _ in subjects.values()}:
                raise ValueError(f"{path} names {item.strip()!r} twice.")
            subjects[short_name] = (caption, category)
    return subjects


def split_captions(subjects: list[tuple[str, str]], held_out_share: float, seed: int) -> dict[str, str]:
    """
    Deals the captions to `validation` (for choosing settings), `test` (for the number that is reported) and `train`: to each of
    the first two the same share of every category.
    """
    generator = random.Random(seed)
    splits = {}
    for split in ("validation", "test"):
        for category in sorted({category for _, category in subjects}):
            captions = sorted(caption for caption, other in subjects if other == category)
            left = [caption for caption in captions if caption not in splits]
            count = max(1, round(held_out_share * len(captions)))
            splits |= dict.fromkeys(generator.sample(left, min(count, len(left))), split)
    return {caption: splits.get(caption, "train") for caption, _ in subjects}


def load_images(packages_dir: Path) -> tuple[list[dict], dict[str, dict[str, bytes]]]:
    """Reads the emoji table and the encoded pictures of every style, keyed by lower-case code points."""
    paths = {style: package_path(packages_dir, package) for style, package in PACKAGES.items()}
    table = json.loads(read_members(paths["noto"], r"package/(emoji\.json)")["emoji.json"])
    images = {
        "noto": read_members(paths["noto"], r"package/img/google/64/(.*)\.png"),
        "twemoji": read_members(paths["twemoji"], r"package/img/twitter/64/(.*)\.png"),
        "fluent": read_members(paths["fluent"], r"package/assets/(.*)\.webp"),
    }
    return table, images


def build_rows(table: list[dict], images: dict, subjects: dict | None, held_out_share: float, seed: int) -> list[dict]:
    """Makes the rows of the data set; `subjects=None` takes every emoji that exists in all three styles."""
    found = {}
    for entry in table:
        short_name, code = entry["short_name"], entry["image"][: -len(".png")]
        if subjects is not None and short_name not in subjects:
            continue
        if subjects is None and entry["category"] in SKIPPED_CATEGORIES:
            continue
        keys = (code, code.replace("-fe0f", ""), entry["unified"].lower())
        pictures = {style: next((images[style][k] for k in keys if k in images[style]), None) for style in STYLES}
        if None in pictures.values():
            if subjects is not None:
                raise ValueError(f"No picture of {short_name!r} in every style.")
            continue
        caption = (entry["name"] or short_name).lower().replace("_", " ")
        caption, category = subjects[short_name] if subjects is not None else (caption, entry["category"].lower())
        found[caption] = (category, pictures)
    if subjects is not None and len(found) < len(subjects):
        raise ValueError(f"Unknown short names: {sorted(set(subjects) - {e['short_name'] for e in table})}")
    splits = split_captions([(name, category) for name, (category, _) in found.items()], held_out_share, seed)
    rows = []
    for caption, (category, pictures) in sorted(found.items()):
        for style in STYLES:
            buffer = io.BytesIO()
            to_pixels(pictures[style]).save(buffer, format="WEBP", lossless=True, method=4, quality=80)
            row = {"prompt": caption, "category": category, "style": style}
            rows.append({**row, "image": {"bytes": buffer.getvalue(), "path": None}})
            rows[-1]["split"] = splits[caption]
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages_dir", type=Path, default=Path("npm_packages"), help="Folder of the npm tarballs.")
    parser.add_argument("--output_dir", type=Path, default=None, help="Default: `data/` beside this script.")
    parser.add_argument("--all", action="store_true", help="Take every emoji (for training the judges).")
    parser.add_argument("--held_out_share", type=float, default=0.25, help="Of `validation` and of `test`, each.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    if args.all and args.output_dir is None:
        parser.error("--all needs an --output_dir outside the repository.")
    output_dir = args.output_dir or HERE / "data"
    output_dir.mkdir(parents=True, exist_ok=True)
    table, images = load_images(args.packages_dir)
    subjects = None if args.all else read_captions(HERE / "captions.txt")
    rows = build_rows(table, images, subjects, args.held_out_share, args.seed)
    features = {name: Value("string") for name in ("prompt", "category", "style")}
    features = Features({**features, "image": Image(), "split": Value("string")})
    path = output_dir / "emoji.parquet"
    Dataset.from_list(rows, features=features).to_parquet(path)
    (output_dir / "LICENSES.md").write_text(LICENSES)
    captions = {split: len({row["prompt"] for row in rows if row["split"] == split}) for split in SPLITS}
    print(f"{path}: {len(rows)} rows, captions {captions}, {path.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
