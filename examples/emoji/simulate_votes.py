# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
A study of the emoji pairs with simulated people, whose accuracy, ties and bias to the left are known.

    python examples/emoji/make_pairs.py
    python examples/emoji/simulate_votes.py --study runs/emoji/study --people 3 --accuracy 0.8
    tapo-trl votes runs/emoji/study --output_dir runs/emoji/preferences

`tapo-trl votes` finds the numbers again: a fifth of the pairs are known answers. `runs/emoji/preferences` trains an SLRM.
"""

import argparse
from pathlib import Path

from datasets import Image, load_dataset

from tapo_trl.human.simulate import SimulatedPerson
from tapo_trl.human.study import Dimension, Pair, Study
from tapo_trl.human.votes import VoteStore


HERE = Path(__file__).resolve().parent


def make_study(folder: Path, gold_every: int) -> tuple[Study, dict[str, float]]:
    """The pairs of `train` as a study, in files, and the right answer to each."""
    study = Study(title="Which emoji is better?", dimensions=[Dimension("preference", "Which do you prefer?")])
    study.save(folder)
    rows = load_dataset("parquet", data_files=str(HERE / "pairs" / "train.parquet"), split="train")
    for column in ("chosen", "rejected"):
        rows = rows.cast_column(column, Image(decode=False))
    pairs, truth = [], {}
    (folder / "media").mkdir(exist_ok=True)
    for number, row in enumerate(rows):
        better = number % 2  # the place of the chosen one
        sides = ["rejected", "chosen"] if better else ["chosen", "rejected"]
        media = [f"media/{number:04d}_{place}.webp" for place in range(2)]
        for side, medium in zip(sides, media, strict=True):
            (folder / medium).write_bytes(row[side]["bytes"])
        truth[f"{number:04d}"] = 1.0 - better
        gold = {"preference": 1.0 - better} if number % gold_every == 0 else None
        pairs.append(
            Pair(f"{number:04d}", row["prompt"].replace(" ", "_"), row["prompt"], *media, "emoji", "emoji", gold=gold)
        )
    study.write_pairs(pairs)
    return study, truth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="runs/emoji/study", type=Path)
    parser.add_argument("--people", default=3, type=int)
    parser.add_argument("--accuracy", default=0.8, type=float)
    parser.add_argument("--ties", default=0.1, type=float)
    parser.add_argument("--left_bias", default=0.1, type=float)
    parser.add_argument("--gold_every", default=5, type=int, help="One of so many pairs is a known answer.")
    parser.add_argument("--seed", default=0, type=int)
    args = parser.parse_args()

    study, truth = make_study(args.study, args.gold_every)
    people = [
        SimulatedPerson(f"p{number:02d}", args.accuracy, args.ties, args.left_bias, args.seed)
        for number in range(args.people)
    ]
    pairs = study.read_pairs()
    with VoteStore(args.study / "votes.jsonl") as store:
        for person in people:
            for pair in pairs:
                store.append(person.vote(study, pair, truth[pair.pair_id]))
    left = args.left_bias + (1 - args.left_bias) / 2
    right = (1 - args.ties) * (args.left_bias / 2 + (1 - args.left_bias) * args.accuracy)
    print(f"{len(store.rows)} votes of {args.people} people on {len(pairs)} pairs in {args.study}")
    print(f"expected: ties {args.ties:.3f}, left of the others {left:.3f}, known answers right {right:.3f}")


if __name__ == "__main__":
    main()
