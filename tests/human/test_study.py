# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json
import time
from dataclasses import replace

import pytest

from tapo_trl.human.study import Pair, Study, View, read_jsonl, write_jsonl

from .studies import make_study


class TestSettings:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("titel: A", "unknown key 'titel'"),
            ("- a", "must be a mapping"),
            ("title: [", "cannot be used"),
            ("votes_per_pair: many", "votes_per_pair"),
            ("votes_per_pair: 0", "must be at least 1"),
            ("dimensions: []", "needs a question"),
            ("dimensions: [{name: quality}]", "question"),
            ("dimensions: [{name: a b, question: Better}]", "is no name"),
            ("dimensions: 3", "cannot be used"),
            ("view: {height: 480}", "width"),
            ("view: {height: 0, width: 480}", "must be positive"),
            ("folder: elsewhere", "unknown key 'folder'"),
        ],
    )
    def test_a_file_that_cannot_be_used_says_why(self, tmp_path, text, message):
        (tmp_path / "study.yaml").write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            Study.load(tmp_path)
        assert "study.yaml" in str(error.value)

    def test_what_is_saved_is_loaded(self, tmp_path):
        study = make_study(tmp_path, 1, view=View(16, 24, 4, 8.0), votes_per_pair=3, title="Füchse")
        assert Study.load(tmp_path) == study


class TestPairs:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"media_0": "../secret.png"}, "inside of the study's folder"),
            ({"media_0": "/etc/passwd.png"}, "inside of the study's folder"),
            ({"media_0": "study.yaml"}, "must be an image or a video"),
            ({"repeat_of": "nothing"}, "does not exist"),
            ({"gold": {"beauty": 1.0}}, "does not ask"),
            ({"pair_id": 7}, "`pair_id` must be text"),
            ({"pair_id": "0001"}, "twice"),
            ({"color": "red"}, "unknown key 'color'"),
        ],
    )
    def test_a_row_that_cannot_be_used_says_why(self, tmp_path, change, message):
        study = make_study(tmp_path, 2)
        rows = read_jsonl(tmp_path / "pairs.jsonl")
        write_jsonl(tmp_path / "pairs.jsonl", [rows[0] | change, rows[1]])
        with pytest.raises(ValueError, match=message):
            study.read_pairs()

    def test_a_view_of_videos_needs_a_length(self, tmp_path):
        study = make_study(tmp_path, 1, videos=True, view=View(16, 24))
        with pytest.raises(ValueError, match="`num_frames`"):
            study.read_pairs()

    def test_as_many_as_the_paper_has_are_read_in_seconds(self, tmp_path):
        study = make_study(tmp_path, 1)
        pair = study.read_pairs()[0]
        study.write_pairs([replace(pair, pair_id=f"{number}") for number in range(10_141)])
        start = time.process_time()
        assert len(study.read_pairs()) == 10_141
        assert time.process_time() - start < 8  # 25 s where each pair looks at all others


def test_a_prompt_may_have_line_separators_of_unicode(tmp_path):
    study = make_study(tmp_path, 1)
    pair: Pair = replace(study.read_pairs()[0], prompt="a fox\u2028a boat\x85a tree\u000b.")
    study.write_pairs([pair])
    assert study.read_pairs() == [pair]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(vars(pair)) + "\r\n\r\n", newline="")
    assert study.read_pairs() == [pair]
