# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
Exported votes of simulate_votes.py beside true labels that are wrong as often.

    python examples/emoji/flip_labels.py runs/emoji/preferences runs/emoji/flipped --seed 0

Writes the pairs of the split `train` with as many ties and wrong labels as the votes gave, on other, random pairs.
"""

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any


METADATA = "train/metadata.jsonl"


def chosen_end(row: dict[str, Any]) -> str:
    """How the file of the right side ends: simulate_votes.py puts it first in every second pair."""
    return f"_{int(row['pair_id']) % 2}.webp"


def kind_of(row: dict[str, Any]) -> str:
    if row["label"] == 0.5:
        return "tie"
    return "right" if row["chosen_file_name"].endswith(chosen_end(row)) else "wrong"


def flip(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Rows with the true labels, but for as many ties and wrong ones as they had, at random."""
    kinds = [kind_of(row) for row in rows]
    generator, flipped = random.Random(f"flip {seed}"), []
    for row, kind in zip(rows, generator.sample(kinds, len(kinds)), strict=True):
        right, other = sorted(
            (row["chosen_file_name"], row["rejected_file_name"]), key=lambda name: not name.endswith(chosen_end(row))
        )
        if kind == "wrong" or (kind == "tie" and generator.random() < 0.5):
            right, other = other, right
        label = 0.5 if kind == "tie" else 1.0
        flipped.append(
            {"prompt": row["prompt"], "chosen_file_name": right, "rejected_file_name": other, "label": label}
        )
    return flipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="Folder that `tapo-trl votes --output_dir` wrote.")
    parser.add_argument("output_dir", type=Path, help="Folder of the new pairs.")
    parser.add_argument("--seed", default=0, type=int)
    args = parser.parse_args()
    rows = [json.loads(line) for line in (args.export / METADATA).read_text(encoding="utf-8").splitlines()]
    shutil.copytree(args.export / "train", args.output_dir / "train")
    lines = [json.dumps(row) + "\n" for row in flip(rows, args.seed)]
    (args.output_dir / METADATA).write_text("".join(lines), encoding="utf-8")
    kinds = [kind_of(row) for row in rows]
    print(f"{args.output_dir}: {', '.join(f'{kinds.count(kind)} {kind}' for kind in ('right', 'wrong', 'tie'))}")


if __name__ == "__main__":
    main()
