# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import importlib.util
from pathlib import Path

import pytest


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "emoji" / "make_pairs.py"


@pytest.fixture(scope="module")
def make_pairs():
    spec = importlib.util.spec_from_file_location("make_pairs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_pairs


STYLES = ("fluent", "noto", "twemoji")
IMAGES = {(caption, style): {"bytes": f"{caption} {style}"} for caption in ("cat", "dog", "owl") for style in STYLES}


def test_every_pair_has_one_difference_and_the_right_winner(make_pairs):
    rows = make_pairs(IMAGES, "fluent", seed=0)
    assert len(rows) == 4 * 3
    for row in rows:
        (chosen, chosen_style), (rejected, rejected_style) = (
            row[side]["bytes"].split() for side in ("chosen", "rejected")
        )
        assert chosen == row["prompt"]
        if row["kind"] == "style":
            assert rejected == chosen and chosen_style == "fluent" and rejected_style != "fluent"
        else:
            assert rejected != chosen and rejected_style == chosen_style
    assert sum(row["kind"] == "style" for row in rows) == 6


def test_is_a_function_of_its_seed(make_pairs):
    assert make_pairs(IMAGES, "noto", seed=1) == make_pairs(IMAGES, "noto", seed=1)
    assert make_pairs(IMAGES, "noto", seed=1) != make_pairs(IMAGES, "noto", seed=2)
