# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import importlib
from dataclasses import dataclass, field

import pytest

from tapo_trl.cli.main import COMMANDS, command_module, main
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


@dataclass
class FolderArguments:
    cache_dir: str | None = field(default=None, metadata={"help": "Cache."})
    output_dir: str = field(default="out", metadata={"help": "Folder."})
    eval_strategy: str = field(default="no", metadata={"help": "When."})
    sigmas: list[float] = field(default_factory=lambda: [0.5], metadata={"help": "Levels."})
    prompts: list[str] | None = field(default=None, metadata={"help": "Prompts."})


class TestTypes:
    """Values as people write them in YAML."""

    @pytest.fixture
    def parse(self, recipe):
        parser = RecipeParser((FirstArguments, FolderArguments), prog="tapo-trl test")
        return lambda text, *flags: parser.parse_args_and_config(["--config", recipe(text), *flags])

    def test_what_can_be_read_in_one_way(self, parse, monkeypatch):
        monkeypatch.setenv("HOME", "/my/home")
        text = "num_sde_steps: 4.0\nuse_peft: 'true'\nlearning_rate: 1\n"
        text += "eval_strategy: no\nsigmas: 0.5\nprompts: p.txt\noutput_dir: 2024\ncache_dir: ~/x\n"
        first, folders = parse(text)
        assert first == FirstArguments(1.0, 4, True)
        assert folders == FolderArguments("/my/home/x", "2024", "no", [0.5], ["p.txt"])

    def test_null_is_the_default_of_what_may_be_left_out(self, parse):
        _, folders = parse("cache_dir: ~\nprompts:\n")
        assert (folders.cache_dir, folders.prompts) == (None, None)

    def test_keys_of_mappings_are_text(self, recipe):
        parser = importlib.import_module("tapo_trl.scripts.slrm").make_parser()
        text = "dataset_name: d\noutput_dir: o\nuse_cpu: true\nbf16: false\npair_columns: [a, b]\nlabel_column: c\n"
        text += "label_values: {yes: 1, no: 0, 3: 0.5, null: null}\n"
        values = parser.parse_args_and_config(["--config", recipe(text)])[0].label_values
        assert values == {"yes": 1, "no": 0, "3": 0.5, "null": None}

    def test_flags_with_the_home_directory(self, parse, monkeypatch):
        monkeypatch.setenv("HOME", "/my/home")
        _, folders = parse("prompts: a", "--cache_dir=~/x", "--prompts", "no", "5")
        assert (folders.cache_dir, folders.prompts) == ("/my/home/x", ["no", "5"])

    def test_a_file_with_a_byte_order_mark(self, tmp_path):
        parser = RecipeParser(FirstArguments, prog="tapo-trl test")
        (tmp_path / "r.yaml").write_text("num_sde_steps: 3\r\n", encoding="utf-8-sig")
        assert parser.parse_args_and_config(["--config", str(tmp_path / "r.yaml")])[0].num_sde_steps == 3

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("learning_rate: null", "`learning_rate` is null, but must be a number"),
            ("num_sde_steps: 1.5", "`num_sde_steps` must be an integer, such as 4, but is 1.5"),
            ("num_sde_steps: [4]", "`num_sde_steps` must be an integer, such as 4, but is [4], a list"),
            ("learning_rate: {a: 1}", "`learning_rate` must be a number"),
            ("num_sde_steps: 2024-01-01", "`num_sde_steps` must be an integer"),
            ("sigmas: [a]", "`sigmas[0]` must be a number"),
            ("output_dir: ''", "`output_dir` is empty"),
            ("cache_dir: recipe.yaml/x", "is a file"),
            ("env: [A]", "`env` in"),
            ("\tnum_sde_steps: 3", "is not valid YAML"),
        ],
    )
    def test_others_are_one_line(self, parse, capsys, monkeypatch, tmp_path, text, expected):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit):
            parse(text)
        message = capsys.readouterr().err
        assert expected in message
        assert message.count("\n") == 1


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
            ("use_peft: true\nuse_peft: false", [], ["the key `use_peft` is there twice", "line 2"]),
            ("env: {A: 1, 'A': 2}", [], ["the key `A` is there twice", "line 1"]),
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


def test_checkpoints_are_looked_at_before_anything_is_loaded(tmp_path, capsys):
    command = ["tapo", "--model_name_or_path", "m", "--reward_model", "r", "--use_cpu", "--bf16", "false"]
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-2" / "checkpoint_seal.json").touch()
    for flags, expected in (
        (["--output_dir", str(tmp_path / "out")], "checkpoint-2"),
        (["--output_dir", str(tmp_path), "--resume_from_checkpoint", "no/such"], "there is no such folder"),
    ):
        with pytest.raises(SystemExit):
            main([*command, *flags])
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize("command", ["slrm", "tapo", "online_dpo", "grpo", "refl", "nft", "sft", "dpo"])
def test_resuming_without_a_value(command, tmp_path):
    parser = command_module(command).make_parser()
    command = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--dataset_name", "d"]
    for flags, expected in (
        (["--resume_from_checkpoint"], "true"),
        (["--resume_from_checkpoint", "--max_steps", "1"], "true"),
        (["--resume_from_checkpoint", "false"], "false"),
        ([], None),
    ):
        assert parser.parse_args_and_config([*command, *flags])[1].resume_from_checkpoint == expected


@pytest.mark.parametrize("command", ["slrm", "tapo", "online_dpo", "grpo", "refl", "nft", "sft", "dpo"])
def test_another_half_precision_is_refused_before_anything_is_loaded(command, tmp_path, capsys):
    parser = command_module(command).make_parser()
    command = ["--output_dir", str(tmp_path), "--use_cpu", "--dataset_name", "d", "--torch_dtype", "fp16"]
    with pytest.raises(SystemExit):
        parser.parse_args_and_config([*command, "--bf16", "true"])
    assert "`bf16=True` computes in torch.bfloat16, but `torch_dtype` is float16" in capsys.readouterr().err
    parser.parse_args_and_config([*command, "--bf16", "false"])
    parser.parse_args_and_config([*command, "--bf16", "true", "--model_init_kwargs", '{"dtype": "bf16"}'])


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

    @pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"reproduce", "rewards"}))
    def test_every_command_refuses_a_misspelt_flag(self, capsys, command):
        of_studies = command in ("prompts", "pairs", "study", "annotate", "votes", "rounds")
        wrong, right = ("--foldr", "--folder") if of_studies else ("--model_name_or_pth", "--model_name_or_path")
        with pytest.raises(SystemExit) as error:
            main([command, wrong, "x"])
        assert error.value.code == 2
        message = capsys.readouterr().err
        assert f"tapo-trl {command}: error: unknown flag `{wrong}`. Did you mean `{right}`?" in message

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
