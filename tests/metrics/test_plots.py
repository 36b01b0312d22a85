# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import sys

import pytest
import torch
from PIL import Image

from tapo_trl.metrics import PairScores, diagnose_scores, plot_diagnosis
from tapo_trl.metrics.plots import HEIGHT, WIDTH


RUN = {
    "reward_curve": [
        {"step": 0, "training": None, "held_out": 0.5},
        {"step": 10, "training": 2.0, "held_out": 0.6},
    ],
    "gradient_share": {"step_01": {1: 0.7, 5: 0.6}, "step_03": {1: 0.3, 5: 0.4}},
}


def rewards(rules):
    sides = [{rule: torch.randn(3, 20) for rule in rules} for _ in range(2)]
    return diagnose_scores(PairScores((0.0, 0.4, 0.8), torch.ones(20), *sides))


class TestPlotDiagnosis:
    @pytest.mark.parametrize(
        ("rules", "runs", "rows", "columns"),
        [
            (["none"], {}, 1, 3),
            (["ground_truth", "reference"], {"a": RUN}, 3, 3),
            ([], {"a": RUN, "b": RUN | {"gradient_share": {}}}, 2, 2),
            ([], {"a": RUN | {"reward_curve": []}}, 1, 1),
        ],
    )
    def test_a_row_per_rule_and_per_run(self, tmp_path, rules, runs, rows, columns):
        pytest.importorskip("matplotlib")
        plot_diagnosis({"rewards": rewards(rules), "runs": runs}, tmp_path / "plot.png")
        image = Image.open(tmp_path / "plot.png")
        assert image.size == (round(120 * WIDTH * columns), round(120 * HEIGHT * rows))
        assert len(image.convert("RGB").getcolors(2**24)) > 50

    def test_nothing_to_draw(self, tmp_path):
        pytest.importorskip("matplotlib")
        with pytest.raises(ValueError, match="`diagnosis` has nothing to draw"):
            plot_diagnosis({"runs": {"a": {"reward_curve": [], "gradient_share": {}}}}, tmp_path / "plot.png")

    def test_without_matplotlib(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=r"Plots need matplotlib.*pip install matplotlib"):
            plot_diagnosis({"runs": {"a": RUN}}, tmp_path / "plot.png")
        assert not list(tmp_path.iterdir())
