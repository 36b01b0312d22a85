# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest

from tapo_trl.cli import diagnose, evaluate
from tapo_trl.cli.arguments import EvaluateArguments, SampleArguments


class TestEvaluateArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "`slrm` .* `reward_model`"),
            ({"slrm": "x"}, "`slrm` needs `dataset_name`"),
            ({"reward_model": ["a:b"]}, "`reward_model` needs `prompts`"),
            ({"slrm": "x", "dataset_name": "y", "sigmas": [0.5, 1.0]}, "`sigmas` must lie"),
            (
                {"reward_model": ["a:b"], "prompts": ["a"], "tie_threshold": "best"},
                "are for pairs: give `dataset_name`",
            ),
            ({"reward_model": ["a:b"], "dataset_name": "y", "tie_threshold": "much"}, "`tie_threshold` must be best"),
            ({"reward_model": ["a:b"], "dataset_name": "y", "tie_threshold": "-1"}, "`tie_threshold` must be best"),
            ({"reward_model": ["a:b"], "dataset_name": "y", "zero_margin": "full"}, "`zero_margin` must be one of"),
            ({"reward_model": ["a:b"], "prompts": ["a"], "output_file": "."}, "`output_file=.` must name a file"),
            ({"reward_model": ["a:b"], "prompts": ["a"], "output_file": f"{__file__}/x"}, "`output_file=.*is a file"),
        ],
    )
    def test_bad_combinations(self, options, message):
        with pytest.raises(ValueError, match=message):
            EvaluateArguments(**options)


@pytest.mark.parametrize("options", [{"lora": "folder"}, {"columns": 2}])
def test_methods_take_the_place_of_one_lora(options):
    with pytest.raises(ValueError, match="`methods` names the models.*leave `lora`"):
        SampleArguments(prompts=["a fox"], methods=["tapo=folder"], **options)


@pytest.mark.parametrize(
    ("command", "measure", "function"),
    [
        (evaluate, "measure_accuracy", "score_pairs"),
        (diagnose, "diagnose_reward_model", "score_pairs"),
    ],
)
class TestScoredPairs:
    flags = ("--slrm", "x", "--dataset_name", "y", "--cache_dir", "c", "--dimension_weights")

    def test_dimensions_and_cache_reach_the_scores(self, monkeypatch, command, measure, function):
        seen = {}
        monkeypatch.setattr(evaluate, "load_reward_model_and_pairs", lambda *args: ())
        monkeypatch.setattr(f"tapo_trl.metrics.{function}", lambda **kwargs: seen.update(kwargs))
        monkeypatch.setattr("tapo_trl.metrics.diagnose_scores", lambda *args: {})
        monkeypatch.setattr("tapo_trl.metrics.accuracy_by_level", lambda *args: {})
        parsed = command.make_parser().parse_args_and_config([*self.flags, '{"quality": 1, "text": 0.5}'])
        getattr(command, measure)(*parsed)
        assert (seen["dimension_weights"], seen["cache_dir"]) == ({"quality": 1, "text": 0.5}, "c")

    @pytest.mark.parametrize("weights", ["quality", '{"quality": -1}', '{"quality": "much"}'])
    def test_bad_weights(self, capsys, command, measure, function, weights):
        with pytest.raises(SystemExit):
            command.make_parser().parse_args_and_config([*self.flags, weights])
        assert "`dimension_weights" in capsys.readouterr().err


class TestSampleArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [({}, "`prompts` is missing"), ({"prompts": ["a"], "batch_size": 0}, "`batch_size` must be at least 1")],
    )
    def test_bad_values(self, options, message):
        with pytest.raises(ValueError, match=message):
            SampleArguments(**options)
