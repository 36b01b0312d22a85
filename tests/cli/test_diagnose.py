# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json
import sys

import pytest
from PIL import Image

from tapo_trl import SLRMModel
from tapo_trl.cli.arguments import DiagnoseArguments
from tapo_trl.cli.diagnose import format_run, read_run
from tapo_trl.cli.main import main
from tapo_trl.policies import SD3Policy
from tests.data.preference_pairs import color_pairs
from tests.testing_utils import tiny_sd3_pipeline


LOGS = [
    {"step": 0, "guard/held_out_reward": 0.5},
    {"step": 1, "reward": 1.0, "gradient_share/step_01": 0.25, "gradient_share/step_03": 0.75},
    {"step": 2, "reward": 2.0, "guard/held_out_reward": 0.7},
    {"step": 3, "reward": 4.0, "guard/held_out_reward": 0.4},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnose")
    pipeline = tiny_sd3_pipeline()
    pipeline.save_pretrained(folder / "base")
    SLRMModel.from_policy(SD3Policy(pipeline), max_sequence_length=8, resolution=32).save_pretrained(folder / "slrm")
    pairs = color_pairs(6).rename_columns({"chosen": "left", "rejected": "right"})
    pairs.add_column("left_is_better", [1.0] * 5 + [0.5]).to_parquet(folder / "pairs.parquet")
    (folder / "run").mkdir()
    state = {"global_step": 3, "log_history": LOGS}
    (folder / "run" / "trainer_state.json").write_text(json.dumps(state))
    return folder


def pair_flags(folder):
    flags = ["--slrm", str(folder / "slrm"), "--model_name_or_path", str(folder / "base")]
    flags += ["--dataset_name", str(folder / "pairs.parquet"), "--dataset_test_split", "train"]
    return [*flags, "--pair_columns", "left", "right", "--label_column", "left_is_better"]


class TestTrajectories:
    def test_draws_both_branches_without_pairs(self, folder, tmp_path, capsys):
        argv = ["diagnose", "--slrm", str(folder / "slrm"), "--model_name_or_path", str(folder / "base")]
        argv += ["--trajectories", "a cat", "a dog", "--num_inference_steps", "4", "--num_sde_steps", "2"]
        main([*argv, "--num_candidates", "2", "--guidance_scale", "2", "--output_dir", str(tmp_path / "out")])
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["trajectories.png"]
        with Image.open(tmp_path / "out" / "trajectories.png") as picture:
            assert picture.width > 2 * 128 and picture.height > 4 * 128  # two steps; two branches of two prompts
        assert "trajectories.png" in capsys.readouterr().out

    def test_needs_a_reward_model(self):
        with pytest.raises(ValueError, match="`trajectories` needs `slrm`"):
            DiagnoseArguments(trajectories=["a cat"], runs=["run"])
        with pytest.raises(ValueError, match="`num_candidates` is for `trajectories`, which is not given"):
            DiagnoseArguments(runs=["run"], num_candidates=8)
        assert not DiagnoseArguments(trajectories=["a cat"], slrm="slrm").reads_pairs
        assert DiagnoseArguments(trajectories=["a cat"], slrm="slrm", dataset_name="pairs").reads_pairs


class TestCommand:
    def test_reward_model_and_run(self, folder, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        argv = ["diagnose", *pair_flags(folder), "--sigmas", "0.7", "0", "0.25", "--runs", str(folder / "run")]
        main([*argv, "--output_dir", str(tmp_path / "out")])
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["diagnosis.json", "diagnosis.png"]
        result = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
        assert set(result["rewards"]) == {"ground_truth", "reference"}
        for parts in result["rewards"].values():
            assert list(parts["accuracy"]["by_sigma"]) == list(parts["distributions"]) == ["0.0", "0.25", "0.7"]
            assert {name: part["num_pairs"] for name, part in parts["accuracy"]["by_range"].items()} == {
                "clean": 6,
                "1-500": 6,
                "501-1000": 6,
            }
            assert list(parts["consistency"]["flips_from_cleanest"]) == ["0.25", "0.7"]
            assert all(5 * value in range(6) for value in parts["accuracy"]["by_sigma"].values())
        (run,) = result["runs"].values()
        assert [check["held_out"] for check in run["reward_curve"]] == [0.5, 0.7, 0.4]

        printed = capsys.readouterr().out
        for text in (
            "reference, sigma",
            "flips from the cleanest level",
            "t = 501-1000",
            "without ties",
            "never flip",
        ):
            assert text in printed
        assert (
            f"{folder / 'run'}: at step 2 (the best) judge 0.7, training reward 1.5; at step 3 (the last)" in printed
        )

    def test_a_run_alone(self, folder, tmp_path):
        pytest.importorskip("matplotlib")
        main(["diagnose", "--runs", str(folder / "run"), "--output_dir", str(tmp_path)])
        result = json.loads((tmp_path / "diagnosis.json").read_text())
        assert set(result) == {"runs"}
        (run,) = result["runs"].values()
        assert run["gradient_share"] == {"step_01": {"1": 0.25}, "step_03": {"1": 0.75}}

    def test_without_matplotlib_it_stops_before_any_work(self, folder, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=r"pip install matplotlib"):
            main(["diagnose", *pair_flags(folder), "--output_dir", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()


class TestRun:
    def test_judge_that_is_not_in_the_logs(self, folder, tmp_path):
        state = {"global_step": 1, "log_history": [{"step": 1, "reward": 1.0, "eval_reward": 2.0}]}
        (tmp_path / "trainer_state.json").write_text(json.dumps(state))
        with pytest.raises(
            ValueError, match=r"neither `guard/held_out_reward` nor .*one of \['eval_reward', 'reward'\]"
        ):
            read_run(str(tmp_path), "guard/held_out_reward")
        assert read_run(str(tmp_path), "eval_reward")["reward_curve"][0]["held_out"] == 2.0

    def test_line(self):
        assert format_run("a", []) == "a: no judge in the logs"
        assert format_run("a", [{"step": 0, "training": None, "held_out": 0.5}]).startswith(
            "a: at step 0 (the best) judge 0.5; at step 0"
        )


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, r"Give `slrm` and `dataset_name` .*, `runs`"),
            ({"slrm": "a"}, "`slrm` needs `dataset_name`"),
            ({"runs": ["a"], "sigmas": [0.5, 0.5]}, "`sigmas` must be at least two noise levels"),
            ({"runs": ["a"], "sigmas": [0.5, 1.0]}, r"`sigmas` must lie in \[0, 1\)"),
            ({"runs": ["a"], "batch_size": 0}, "`batch_size` must be at least 1"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(ValueError, match=message):
            DiagnoseArguments(**options)
