# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json

import pytest

from tapo_trl.metrics import PreferenceAccuracy, scores_from_file


EXPECTED = {"a.mp4": 1.5, "b.mp4": -2.0}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "id,score,other\na.mp4,1.5,x\nb.mp4,-2,y\n"),
        ("bom.csv", "\ufeffid,score\r\na.mp4,1.5\r\nb.mp4,-2\r\n"),
        ("list.json", [{"id": "a.mp4", "score": 1.5}, {"id": "b.mp4", "score": "-2"}]),
        ("numbers.json", {"a.mp4": 1.5, "b.mp4": -2}),
        ("objects.json", {"a.mp4": {"score": 1.5}, "b.mp4": {"score": -2, "more": [1]}}),
        ("lines.jsonl", '{"id": "a.mp4", "score": 1.5}\n\n{"id": "b.mp4", "score": -2}\n'),
    ],
)
def test_formats(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8", newline="")
    assert scores_from_file(path) == EXPECTED


def test_other_names(tmp_path):
    path = tmp_path / "lift.csv"
    path.write_text("video,fidelity\na.mp4,0.9\n")
    assert scores_from_file(path, "fidelity", "video") == {"a.mp4": 0.9}


@pytest.mark.parametrize("answers", [["yes", "no", "Yes"], [True, False, True], [1, -1, 1], [1, 0, 1]])
def test_answers_to_questions(tmp_path, answers):
    """VisionReward: the mean of +weight and -weight."""
    path = tmp_path / "answers.json"
    path.write_text(json.dumps({"a": answers}))
    assert scores_from_file(path, weights=[0.5, 0.25, 3.0])["a"] == pytest.approx((0.5 - 0.25 + 3) / 3)


def test_answers_in_a_table(tmp_path):
    path = tmp_path / "answers.csv"
    path.write_text("id,answers\na,\"yes, no\"\nb,no yes\nc,\"['yes', 'yes']\"\n")
    assert scores_from_file(path, "answers", weights=[1, 4]) == {"a": -1.5, "b": 1.5, "c": 2.5}


def test_accuracy_on_pairs(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"a": 0.9, "b": 0.2, "c": 0.2}))
    scores = scores_from_file(path)
    margins = [scores[left] - scores[right] for left, right in [("a", "b"), ("b", "c"), ("c", "a")]]
    found = PreferenceAccuracy().compute(predictions=margins, references=[1, 1, 0], zero_margin="wrong")
    assert found["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,points\na,1\n", "row 1: there is no `score`. It has id, points"),
        ("a.csv", "id,score\na,1\n,2\n", "row 2: there is no `id`"),
        ("a.csv", "id,score\na,good\n", "row 1, `score` of `a`: 'good' is no number"),
        ("a.csv", "id,score\na,nan\n", "row 1, `score` of `a`: 'nan' is not finite"),
        ("a.csv", "id,score\na,1\na,2\n", "row 2, .*the id has two scores, 1.0 and 2.0"),
        ("a.csv", "id,score\n", "has no scores"),
        ("a.json", "{", "is no JSON"),
        ("a.jsonl", "{}\n{", "is no JSONL"),
        ("a.json", "[1, 2]", "a list of objects, or an object with ids"),
        ("a.json", '{"a": null}', "entry 1: there is no `score`"),
        ("a.json", '{"a": [1, 2]}', "is no number"),
        ("a.txt", "", "must end with .csv, .json or .jsonl"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        scores_from_file(path)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["yes"], "2 answers are needed"),
        (["yes", "maybe"], "yes or no, but one is 'maybe'"),
        (3, "2 answers are needed"),
    ],
)
def test_bad_answers(tmp_path, answers, message):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps({"a": answers}))
    with pytest.raises(ValueError, match=message):
        scores_from_file(path, weights=[1, 2])
