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
from collections.abc import Mapping
from pathlib import Path

from datasets import Image, load_dataset

from tapo_trl.human.simulate import SimulatedPerson, give_votes
from tapo_trl.human.study import Dimension, Pair, Study
from tapo_trl.human.votes import TIE


HERE = Path(__file__).resolve().parent


def make_study(folder: Path, gold_every: int, pairs_file: Path) -> tuple[Study, dict[str, dict[str, float]]]:
    """The pairs of a file as a study, in files, and the right answer to each."""
    study = Study(title="Which emoji is better?", dimensions=[Dimension("preference", "Which do you prefer?")])
    study.save(folder)
    rows = load_dataset("parquet", data_files=str(pairs_file), split="train")
    for column in ("chosen", "rejected"):
        rows = rows.cast_column(column, Image(decode=False))
    pairs, truths = [], {}
    (folder / "media").mkdir(exist_ok=True)
    for number, row in enumerate(rows):
        better = number % 2  # the place of the chosen one
        sides = ["rejected", "chosen"] if better else ["chosen", "rejected"]
        media = [f"media/{number:04d}_{place}.webp" for place in range(2)]
        for side, medium in zip(sides, media, strict=True):
            (folder / medium).write_bytes(row[side]["bytes"])
        name, truth = f"{number:04d}", {"preference": 1.0 - better}
        gold = truth if number % gold_every == 0 else None
        pairs.append(Pair(name, row["prompt"].replace(" ", "_"), row["prompt"], *media, "emoji", "emoji", gold=gold))
        truths[name] = truth
    study.write_pairs(pairs)
    return study, truths


def add_people(parser: argparse.ArgumentParser) -> None:
    """The options that describe the people."""
    parser.add_argument("--people", default=3, type=int)
    parser.add_argument("--accuracy", default=0.8, type=float, help="Share of right answers of somebody who looks.")
    parser.add_argument("--ties", default=0.1, type=float, help="Share of ties for no reason.")
    parser.add_argument("--left_bias", default=0.1, type=float, help="Share of left without looking, of the others.")
    parser.add_argument("--seed", default=0, type=int)


def vote(args: argparse.Namespace, study: Study, truths: Mapping[str, Mapping[str, float]]) -> None:
    """Let the people of [`add_people`] vote, and print what `tapo-trl votes` should find."""
    people = [
        SimulatedPerson(f"p{number:02d}", args.accuracy, args.ties, args.left_bias, args.seed)
        for number in range(args.people)
    ]
    number = give_votes(study, people, truths)
    answers = [truth for answers in truths.values() for truth in answers.values()]
    shares = people[0].expected_shares(answers.count(TIE) / len(answers))
    print(f"{number} votes of {args.people} people on {len(truths)} pairs in {study.folder}")
    names = {"ties": "ties", "left": "left of the others", "gold": "known answers right", "same": "same on repeats"}
    print("expected: " + ", ".join(f"{text} {shares[name]:.3f}" for name, text in names.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="runs/emoji/study", type=Path)
    parser.add_argument("--pairs", default=HERE / "pairs" / "train.parquet", type=Path, help="From `make_pairs.py`.")
    parser.add_argument("--gold_every", default=5, type=int, help="One of so many pairs is a known answer.")
    add_people(parser)
    args = parser.parse_args()
    vote(args, *make_study(args.study, args.gold_every, args.pairs))


if __name__ == "__main__":
    main()
