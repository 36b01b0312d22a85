# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""From votes to a data set of preference pairs that [`SLRMTrainer`] reads."""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Image, load_dataset
from huggingface_hub import HfApi

from ..data.dimensions import LABEL_PREFIX, check_dimension_weights
from ..data.images import BadFileError
from .agreement import describe_people, label_table, percent_agreement
from .card import MARK, dataset_card
from .media import check_medium
from .study import Pair, Study, write_jsonl
from .votes import TIE, current_votes


SPLITS = {"train": 0.8, "validation": 0.1, "test": 0.1}
MIN_GOLD_ANSWERS = 5  # below which the accuracy of a person says nothing


@dataclass(frozen=True)
class VoteFilter:
    """
    What to leave out of an export. Nothing by default but pairs without votes and files that cannot be read.

    Args:
        min_votes (`int`, *optional*, defaults to `1`): Votes that a pair needs.
        min_seconds (`float`, *optional*, defaults to `0.0`): Votes that took less are left out.
        min_gold_accuracy (`float`, *optional*): Share of right answers to known pairs below which the votes of a person are left out, if there are at least 5 answers.
        min_agreement (`float`, *optional*): Share of equal answers of two people, over the dimensions, that a pair with two votes or more needs.
        drop_ties (`bool`, *optional*, defaults to `False`): Leave out pairs that are tied over all dimensions. Otherwise their label is 0.5.
    """

    min_votes: int = 1
    min_seconds: float = 0.0
    min_gold_accuracy: float | None = None
    min_agreement: float | None = None
    drop_ties: bool = False

    def __post_init__(self):
        if self.min_votes < 1:
            raise ValueError(f"`min_votes` must be at least 1, but it is {self.min_votes}.")


def filter_votes(
    study: Study, pairs: Sequence[Pair], events: Sequence[dict[str, Any]], rules: VoteFilter
) -> tuple[dict[str, list[dict[str, Any]]], Counter]:
    """
    The votes that count, by pair, and how many were left out and why.

    Args:
        study ([`Study`]): The study.
        pairs (`Sequence[Pair]`): Its pairs.
        events (`Sequence[dict]`): Its events.
        rules ([`VoteFilter`]): What to leave out.
    """
    dropped: Counter = Counter()
    votes, names = current_votes(events), {pair.pair_id for pair in pairs}
    dropped["votes on pairs that pairs.jsonl does not have"] = sum(vote["pair_id"] not in names for vote in votes)
    votes = [vote for vote in votes if vote["pair_id"] in names]
    skipped = {
        event["pair_id"] for event in current_votes(events, ["skip"]) if event["reason"] in ("broken", "offensive")
    }
    if rules.min_gold_accuracy is not None:
        people = describe_people(votes, pairs, study.seed)
        failed = {
            name
            for name, person in people.items()
            if name != "all"
            and person["gold"]["n"] >= MIN_GOLD_ANSWERS
            and person["gold"]["share"] < rules.min_gold_accuracy
        }
        dropped[f"votes of people with less than {rules.min_gold_accuracy:g} of the known answers right"] = sum(
            vote["annotator"] in failed for vote in votes
        )
        votes = [vote for vote in votes if vote["annotator"] not in failed]
    slow = [vote for vote in votes if vote.get("ms", np.inf) >= 1000 * rules.min_seconds]
    dropped[f"votes that took less than {rules.min_seconds:g} s"] = len(votes) - len(slow)
    of_pairs: dict[str, list[dict[str, Any]]] = {}
    for vote in slow:
        of_pairs.setdefault(vote["pair_id"], []).append(vote)
    by_pair: dict[str, list[dict[str, Any]]] = {}
    for pair in pairs:
        own = of_pairs.get(pair.pair_id, [])
        if pair.gold or pair.repeat_of:
            continue
        if pair.pair_id in skipped:
            dropped["pairs that somebody skipped as broken or offensive"] += 1
        elif len(own) < rules.min_votes:
            dropped[f"pairs with fewer than {rules.min_votes} votes"] += 1
        elif rules.min_agreement is not None and agreement_of(own, study) < rules.min_agreement:
            dropped[f"pairs whose people agree less than {rules.min_agreement:g}"] += 1
        elif _is_unreadable(study, pair):
            dropped["pairs with a file that cannot be read"] += 1
        else:
            by_pair[pair.pair_id] = own
    return by_pair, dropped


def agreement_of(votes: Sequence[dict[str, Any]], study: Study) -> float:
    """Share of equal answers of two people on a pair, mean over the dimensions; NaN with one vote."""
    return float(np.mean([percent_agreement(label_table(votes, name)) for name in study.dimension_names]))


def _is_unreadable(study: Study, pair: Pair) -> bool:
    try:
        for medium in pair.media:
            check_medium(study, medium)
    except BadFileError:
        return True
    return False


def preference_rows(
    study: Study,
    pairs: Sequence[Pair],
    by_pair: Mapping[str, Sequence[dict[str, Any]]],
    dimension_weights: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """
    The rows of a data set: the medium that is preferred over all dimensions as `chosen`, and how much it is in each as `label_<dimension>`.

    Args:
        study ([`Study`]): The study.
        pairs (`Sequence[Pair]`): Its pairs.
        by_pair (`Mapping[str, Sequence[dict]]`): The votes that count, from [`filter_votes`].
        dimension_weights (`Mapping[str, float]`, *optional*): Weights that decide which medium is preferred. All 1 by default.

    Returns:
        `list[dict]`: `prompt`, `chosen_file_name`, `rejected_file_name`, `label` (1, or 0.5 for a tie over all dimensions),
        `label_<dimension>` (mean over people, in [0, 1]), `num_votes`, `agreement_<dimension>`, `source_chosen`,
        `source_rejected`, `pair_id`, `prompt_id`.
    """
    weights = dict.fromkeys(study.dimension_names, 1.0) if dimension_weights is None else dict(dimension_weights)
    check_dimension_weights(weights)
    unknown = sorted(set(weights) - set(study.dimension_names))
    if unknown:
        raise ValueError(f"`dimension_weights` names {unknown}; the study asks {study.dimension_names}.")
    rows = []
    for pair in pairs:
        if pair.pair_id not in by_pair:
            continue
        votes = by_pair[pair.pair_id]
        labels = {name: float(np.mean([vote["labels"][name] for vote in votes])) for name in study.dimension_names}
        total = sum(weight * (2 * labels[name] - 1) for name, weight in weights.items()) / sum(weights.values())
        chosen = 1 if total < -1e-9 else 0
        if chosen == 1:
            labels = {name: 1 - label for name, label in labels.items()}
        agreement = {name: percent_agreement(label_table(votes, name)) for name in study.dimension_names}
        rows.append(
            {
                "prompt": pair.prompt,
                "chosen_file_name": pair.media[chosen],
                "rejected_file_name": pair.media[1 - chosen],
                "label": TIE if abs(total) <= 1e-9 else 1.0,
                **{LABEL_PREFIX + name: label for name, label in labels.items()},
                "num_votes": len(votes),
                **{f"agreement_{name}": None if np.isnan(value) else value for name, value in agreement.items()},
                "source_chosen": pair.sources[chosen],
                "source_rejected": pair.sources[1 - chosen],
                "pair_id": pair.pair_id,
                "prompt_id": pair.prompt_id,
            }
        )
    return rows


def split_of(prompt_id: str, seed: int, shares: Mapping[str, float] = SPLITS) -> str:
    """The split of a prompt, by its name: all pairs of a prompt go into the same one."""
    digest = hashlib.sha256(f"{seed} split {prompt_id}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64 * sum(shares.values())
    for name, share in shares.items():
        place -= share
        if place < 0:
            return name
    return name


def export_preferences(
    study: Study,
    output_dir: str | Path,
    events: Sequence[dict[str, Any]],
    rules: VoteFilter | None = None,
    dimension_weights: Mapping[str, float] | None = None,
    splits: Mapping[str, float] = SPLITS,
    license: str | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """
    Write a data set of preference pairs: per split a folder with `metadata.jsonl` and the media, which `datasets.load_dataset` reads as
    columns `chosen` and `rejected`.

    Args:
        study ([`Study`]): The study.
        output_dir (`str` or `Path`): A new or empty folder, or one with an earlier export, which is replaced.
        events (`Sequence[dict]`): Events, from [`read_events`].
        rules ([`VoteFilter`], *optional*): What to leave out.
        dimension_weights (`Mapping[str, float]`, *optional*): Weights that decide which medium is preferred. All 1 by default.
        splits (`Mapping[str, float]`, *optional*): Shares of the splits. The pairs of a prompt stay together.
        license (`str`, *optional*): Licence of the data set, for its card.
        name (`str`, *optional*): Hub id, for the card. The folder by default.

    Returns:
        `dict`: `rows` by split, and `dropped`, how many were left out and why.

    Raises:
        ValueError: if nothing is left, or the folder has other files.
    """
    output_dir, rules = Path(output_dir), rules or VoteFilter()
    pairs = study.read_pairs()
    by_pair, dropped = filter_votes(study, pairs, events, rules)
    rows = preference_rows(study, pairs, by_pair, dimension_weights)
    if rules.drop_ties:
        dropped["pairs that are tied over all dimensions"] = sum(row["label"] == TIE for row in rows)
        rows = [row for row in rows if row["label"] != TIE]
    dropped = {reason: number for reason, number in dropped.items() if number}
    if not rows:
        reasons = "; ".join(f"{number} {reason}" for reason, number in dropped.items())
        raise ValueError(f"No pair of {study.folder} is left to export ({reasons or 'nobody has voted'}).")
    _clear(output_dir)
    of_splits: dict[str, list[dict[str, Any]]] = {name: [] for name in splits}
    for row in rows:
        of_splits[split_of(row["prompt_id"], study.seed, splits)].append(row)
    report = {"rows": {name: len(own) for name, own in of_splits.items()}, "dropped": dropped}
    people = len({vote["annotator"] for row in rows for vote in by_pair[row["pair_id"]]})
    # First what `_clear` knows an export by, so that one that was killed can be replaced
    (output_dir / "README.md").write_text(
        dataset_card(study, rows, report, people, license, name or str(output_dir)), encoding="utf-8"
    )
    for split, own in of_splits.items():
        if own:
            (output_dir / split).mkdir()
            write_jsonl(output_dir / split / "metadata.jsonl", own)
        for row in own:
            for column in ("chosen_file_name", "rejected_file_name"):
                _place_file(study.folder / row[column], output_dir / split / row[column])
    return report


def _clear(folder: Path) -> None:
    """Remove an earlier export; refuse a folder that somebody else filled."""
    card, files = folder / "README.md", list(folder.iterdir()) if folder.exists() else []
    is_ours = card.is_file() and MARK in card.read_text(encoding="utf-8")
    others = [path for path in files if path != card and not (path / "metadata.jsonl").exists()]
    if others or (files and not is_ours):
        raise ValueError(f"{folder} has files that are no earlier export: give a new or an empty folder.")
    for file in folder.glob("*/metadata.jsonl"):
        shutil.rmtree(file.parent)
    folder.mkdir(parents=True, exist_ok=True)


def _place_file(source: Path, target: Path) -> None:
    """A hard link where the file system allows one, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_parquet(folder: str | Path, target: str | Path) -> None:
    """
    Write the images of an exported data set into parquet files, `<split>.parquet`.

    Args:
        folder (`str` or `Path`): The data set.
        target (`str` or `Path`): Folder of the parquet files.

    Raises:
        ValueError: if it has videos, whose bytes `datasets` does not write into parquet files.
    """
    for file in sorted(Path(folder).glob("*/metadata.jsonl")):
        dataset = load_dataset("imagefolder", data_dir=str(file.parent), split="train")
        if not isinstance(dataset.features.get("chosen"), Image):
            raise ValueError("`parquet_dir` is for images: the bytes of videos would be missing.")
        Path(target).mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(Path(target) / f"{file.parent.name}.parquet")


def push_dataset(folder: str | Path, repo_id: str) -> str:
    """
    Upload an exported data set.

    Returns:
        `str`: Its address.
    """
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", private=True, exist_ok=True)
    return str(api.upload_folder(folder_path=str(folder), repo_id=repo_id, repo_type="dataset").commit_url)
