# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The people of the emoji worlds vote as they are told to."""

import json
import math
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture

from tapo_trl.data.videos import write_video
from tapo_trl.human.export import export_preferences
from tapo_trl.human.report import study_report
from tapo_trl.human.study import Pair, Study
from tapo_trl.human.votes import read_events


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
for folder in ("emoji", "moving_emoji"):
    if str(EXAMPLES / folder) not in sys.path:
        sys.path.append(str(EXAMPLES / folder))


def run(module, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
    module.main()


def report_of(folder):
    study = Study.load(folder)
    events = read_events(study.folder / "votes.jsonl", study.dimension_names)
    return study, events, study_report(study, events, samples=10)


def expected_shares(text):
    return {name: float(share) for name, share in re.findall(r"(ties|left|known|same)[a-z ]* (0\.\d+)", text)}


def test_emoji(tmp_path, monkeypatch, capsys):
    import simulate_votes

    colors = {"chosen": "white", "rejected": "black"}
    rows = [
        {"prompt": f"prompt {row}"} | {name: Picture.new("RGB", (8, 8), color) for name, color in colors.items()}
        for row in range(300)
    ]
    features = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "pairs.parquet")
    flags = ["--study", tmp_path / "study", "--pairs", tmp_path / "pairs.parquet", "--people", "3"]
    run(simulate_votes, monkeypatch, *flags, "--accuracy", "0.9")
    study, events, report = report_of(tmp_path / "study")
    expected, found = expected_shares(capsys.readouterr().out), report["annotators"]["all"]
    assert report["votes"] == 900 and found["gold"]["n"] == 180
    for name, key in (("ties", "ties"), ("left", "left"), ("known", "gold")):
        error = math.sqrt(expected[name] * (1 - expected[name]) / found[key]["n"])
        assert abs(found[key]["share"] - expected[name]) < 3 * error, name

    export_preferences(study, tmp_path / "data", events, splits={"train": 1.0})
    table = [row.split('"') for row in (tmp_path / "data/train/metadata.jsonl").read_text().splitlines()]
    assert len(table) == 240
    chosen = [tmp_path / "data/train" / row[row.index("chosen_file_name") + 2] for row in table]
    white = [Picture.open(file).getpixel((4, 4))[0] > 128 for file in chosen]
    assert 0.88 < sum(white) / len(white) < 0.98  # of three people, .77 of whose answers are right and .1 a tie

    run(simulate_votes, monkeypatch, *flags)
    assert capsys.readouterr().out.startswith("0 votes")


@pytest.fixture
def clips(tmp_path):
    """A study of a clean clip against faulty ones."""
    import clips as world

    study, pairs, rng = Study(), [], random.Random(0)
    study.save(tmp_path / "study")

    def write(name, subject, direction, kind):
        frames = world.draw_clip(world.load_subjects()[subject], direction, kind, rng)
        write_video(tmp_path / "study" / "media" / name, torch.from_numpy(frames).permute(3, 0, 1, 2) / 255, world.FPS)
        return f"media/{name}"

    good = write("good.mp4", "panda face", "left", "clean")
    same = write("same.mp4", "panda face", "left", "clean")
    faults = {"same": same}
    for name, subject, direction, kind in (
        ("distorted", "panda face", "left", "distorted"),
        ("jerky", "panda face", "left", "jerky"),
        ("direction", "panda face", "right", "clean"),
        ("subject", "bus", "left", "clean"),
    ):
        faults[name] = write(f"{name}.mp4", subject, direction, kind)
    for name, medium in faults.items():
        pairs.append(Pair(f"{name} 1", name, "panda face moving left", good, medium, "a", "b"))
        pairs.append(Pair(f"{name} 0", name, "panda face moving left", medium, good, "b", "a"))
    known = Pair("known", "known", "panda face moving left", good, same, "a", "a", gold={"text_alignment": 0.0})
    study.write_pairs([*pairs, known])
    return study


def test_flipped_labels_are_as_many_on_other_pairs(tmp_path, monkeypatch, capsys):
    import flip_labels

    kinds = ["right"] * 30 + ["wrong"] * 15 + ["tie"] * 5
    rows = []
    for number, kind in enumerate(kinds):
        right, other = f"media/{number:04d}_{number % 2}.webp", f"media/{number:04d}_{1 - number % 2}.webp"
        files = (other, right) if kind == "wrong" else (right, other)
        row = {"pair_id": f"{number:04d}", "prompt": "fox", "label": 0.5 if kind == "tie" else 1.0}
        rows.append(row | dict(zip(("chosen_file_name", "rejected_file_name"), files, strict=True)))
    (tmp_path / "export/train").mkdir(parents=True)
    (tmp_path / "export/train/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(flip_labels, monkeypatch, tmp_path / "export", tmp_path / "flipped", "--seed", "1")
    assert "30 right, 15 wrong, 5 tie" in capsys.readouterr().out
    lines = (tmp_path / "flipped/train/metadata.jsonl").read_text().splitlines()
    flipped = [json.loads(line) | {"pair_id": row["pair_id"]} for line, row in zip(lines, rows, strict=True)]
    found = [flip_labels.kind_of(row) for row in flipped]
    assert sorted(found) == sorted(kinds) and found != kinds
    assert all(
        {row["chosen_file_name"], row["rejected_file_name"]} == {old["chosen_file_name"], old["rejected_file_name"]}
        for row, old in zip(flipped, rows, strict=True)
    )


def test_moving_emoji(clips, monkeypatch, capsys):
    import vote

    truths = vote.true_answers(clips, margin=0.1)
    decisive = {
        "same": (0.5, 0.5, 0.5),
        "distorted": (1.0, 0.5, None),
        "jerky": (0.5, 1.0, None),
        "direction": (0.5, 0.5, 1.0),
        "subject": (0.5, 0.5, 1.0),
    }
    for name, answers in decisive.items():
        for dimension, answer in zip(clips.dimension_names, answers, strict=True):
            if answer is not None:
                assert truths[f"{name} 1"][dimension] == answer, (name, dimension)
                assert truths[f"{name} 0"][dimension] == 1 - answer, (name, dimension)
    assert truths["known"] == {"visual_quality": 0.5, "motion_consistency": 0.5, "text_alignment": 0.0}

    run(vote, monkeypatch, clips.folder, "--people", "2", "--accuracy", "1", "--ties", "0", "--left_bias", "0")
    assert "22 votes of 2 people on 11 pairs" in capsys.readouterr().out
    for event in report_of(clips.folder)[1]:
        assert event["labels"] == truths[event["pair_id"]]
