# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest
import trl

import tapo_trl
from tapo_trl.cli.launch import find_accelerate_config
from tapo_trl.cli.main import main


ROOT = Path(tapo_trl.__file__).parents[1]


@pytest.fixture
def launched(monkeypatch):
    seen = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", seen.append)
    return seen


class TestLaunch:
    @pytest.mark.parametrize("flag", [["--accelerate_config", "multi_cpu"], ["--accelerate_config=multi_cpu"]])
    def test_flags_go_where_they_belong(self, launched, flag):
        argv = ["tapo", *flag, "--config", "recipe.yaml", "--num_processes", "3", "--learning_rate", "1e-5"]
        assert main(argv) == 0
        (args,) = launched
        assert args.config_file == str(ROOT / "recipes" / "accelerate" / "multi_cpu.yaml")
        assert args.module and args.training_script == "tapo_trl.cli"
        assert args.training_script_args == ["tapo", "--config", "recipe.yaml", "--learning_rate", "1e-5"]
        assert args.num_processes == 3

    def test_unknown_configuration(self, launched, capsys):
        assert main(["dpo", "--accelerate_config", "many_gpus"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("tapo-trl dpo: error: `--accelerate_config`: many_gpus is neither a file nor one of")
        assert "multi_gpu" in error and launched == []

    def test_is_for_trainings(self, launched, capsys):
        with pytest.raises(SystemExit):
            main(["sample", "--accelerate_config", "cpu"])
        assert "unknown flag `--accelerate_config`" in capsys.readouterr().err


class TestFindAccelerateConfig:
    def test_order(self, tmp_path):
        file = tmp_path / "own.yaml"
        file.touch()
        assert find_accelerate_config(str(file)) == file
        assert find_accelerate_config("multi_gpu").parent == ROOT / "recipes" / "accelerate"
        assert find_accelerate_config("zero2") == Path(trl.__file__).parent / "accelerate_configs" / "zero2.yaml"
