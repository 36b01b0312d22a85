# Copyright 2026 The tapo_trl authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from dataclasses import dataclass, field

import pytest

from tapo_trl.cli.main import COMMANDS, main
from tapo_trl.cli.parser import RecipeParser


@dataclass
class FirstArguments:
    learning_rate: float = field(default=1e-4, metadata={"help": "Rate."})
    num_sde_steps: int = field(default=8, metadata={"help": "Steps."})
    use_peft: bool = field(default=False, metadata={"help": "LoRA."})

    def __post_init__(self):
        if self.num_sde_steps < 1:
            raise ValueError("`num_sde_steps` must be at least 1.")


@dataclass
class SecondArguments:
    reward_model: list[str] | None = field(default=None, metadata={"help": "Rewards."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder."})


@pytest.fixture
def parser():
    return RecipeParser((FirstArguments, SecondArguments), prog="tapo-trl test")


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


class TestPrecedence:
    def test_defaults(self, parser):
        first, second = parser.parse_args_and_config([])
        assert (first.learning_rate, first.num_sde_steps, second.reward_model) == (1e-4, 8, None)

    def test_file_overrides_defaults_and_flags_override_the_file(self, parser, recipe):
        path = recipe("learning_rate: 1e-5\nnum_sde_steps: 4\nreward_model: [a, b]\nuse_peft: true\n")
        first, second = parser.parse_args_and_config(["--num_sde_steps", "2", "--config", path, "--output_dir=out"])
        assert first.learning_rate == 1e-5, "YAML reads 1e-5 as a string"
        assert first.num_sde_steps == 2
        assert first.use_peft is True
        assert second.reward_model == ["a", "b"]
        assert second.output_dir == "out"

    def test_config_with_equals_sign(self, parser, recipe):
        first, _ = parser.parse_args_and_config([f"--config={recipe('num_sde_steps: 3')}"])
        assert first.num_sde_steps == 3

    def test_environment_of_the_file(self, parser, recipe, monkeypatch):
        monkeypatch.delenv("TAPO_TEST_VARIABLE", raising=False)
        parser.parse_args_and_config(["--config", recipe("env: {TAPO_TEST_VARIABLE: yes-it-is}")])
        import os

        assert os.environ.pop("TAPO_TEST_VARIABLE") == "yes-it-is"


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "flags", "expected"),
        [
            ("lerning_rate: 1", [], ["unknown key `lerning_rate`", "recipe.yaml", "Did you mean `learning_rate`?"]),
            ("num_sde_step: 1", [], ["unknown key `num_sde_step`", "recipe.yaml", "Did you mean `num_sde_steps`?"]),
            ("zzz: 1", [], ["unknown key `zzz`", "recipe.yaml", "`tapo-trl test --help` lists the fields"]),
            (
                "use_peft: true",
                ["--reward_modl", "a"],
                ["unknown flag `--reward_modl`", "Did you mean `--reward_model`?"],
            ),
            ("use_peft: true", ["--num_sde"], ["unknown flag `--num_sde`", "Did you mean `--num_sde_steps`?"]),
            ("use_peft: true", ["--num-sde-step=1"], ["`--num-sde-step`", "Did you mean `--num_sde_steps`?"]),
            ("use_peft: true", ["stray"], ["stray"]),
            ("num_sde_steps: 0", [], ["`num_sde_steps` must be at least 1."]),
            ("num_sde_steps: many", [], ["--num_sde_steps", "many"]),
            ("- a\n- b", [], ["recipe.yaml must hold a YAML mapping"]),
            ("a: [", [], ["recipe.yaml is not valid YAML"]),
        ],
    )
    def test_one_line_that_names_the_fix(self, parser, recipe, capsys, text, flags, expected):
        with pytest.raises(SystemExit) as error:
            parser.parse_args_and_config(["--config", recipe(text), *flags])
        message = capsys.readouterr().err
        assert error.value.code == 2
        assert message.startswith("tapo-trl test: error: ")
        assert "Traceback" not in message
        assert "usage:" not in message
        for part in expected:
            assert part in message

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [(["--config"], "needs the path"), (["--config", "no/such.yaml"], "no file no/such.yaml")],
    )
    def test_missing_file(self, parser, capsys, flags, expected):
        with pytest.raises(SystemExit):
            parser.parse_args_and_config(flags)
        assert expected in capsys.readouterr().err


class TestMain:
    @pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
    def test_help_lists_the_commands(self, capsys, argv):
        assert main(argv) == 0
        output = capsys.readouterr().out
        assert all(command in output for command in COMMANDS)

    def test_unknown_command(self, capsys):
        assert main(["trian"]) == 2
        assert "unknown command `trian`" in capsys.readouterr().err

    def test_version(self, capsys):
        from tapo_trl.version import __version__

        assert main(["--version"]) == 0
        assert capsys.readouterr().out.strip() == __version__

    @pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"reproduce"}))  # which takes no model
    def test_every_command_refuses_a_misspelt_flag(self, capsys, command):
        with pytest.raises(SystemExit) as error:
            main([command, "--model_name_or_pth", "x", "--output_dir", "y"])
        assert error.value.code == 2
        message = capsys.readouterr().err
        assert (
            f"tapo-trl {command}: error: unknown flag `--model_name_or_pth`. Did you mean `--model_name_or_path`?"
            in message
        )

    @pytest.mark.parametrize(
        ("command", "flag", "nearest"),
        [
            ("tapo", "--nums_frames", "num_frames"),
            ("tapo", "--offload_transition", "offload_transitions"),
            ("tapo", "--reward_group_offloading", "reward_group_offload"),
            ("slrm", "--dryrun", "dry_run"),
            ("sample", "--vae_tilling", "vae_tiling"),
            ("evaluate", "--skip_bad_file", "skip_bad_files"),
            ("reproduce", "--job", "jobs"),
        ],
    )
    def test_near_misses(self, capsys, command, flag, nearest):
        with pytest.raises(SystemExit):
            main([command, flag, "1"])
        assert f"unknown flag `{flag}`. Did you mean `--{nearest}`?" in capsys.readouterr().err
