# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The package as a whole: public names, recipes, documentation, and files that must agree with each other."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

import tapo_trl
from tapo_trl.cli import bench, diagnose, evaluate, merge, rewards, rounds, sample
from tapo_trl.cli.main import command_module
from tapo_trl.scripts import dpo, grpo, nft, online_dpo, refl, sft, slrm, tapo


ROOT = Path(tapo_trl.__file__).parents[1]
DOCS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name != "accelerate")
PARSERS = {
    "slrm": slrm.make_parser,
    "tapo": tapo.make_parser,
    "dpo": dpo.make_parser,
    "online_dpo": online_dpo.make_parser,
    "grpo": grpo.make_parser,
    "refl": refl.make_parser,
    "nft": nft.make_parser,
    "sft": sft.make_parser,
    "evaluate": evaluate.make_parser,
    "diagnose": diagnose.make_parser,
    "reproduce": command_module("reproduce").make_parser,
    "bench": bench.make_parser,
    **{name: command_module(name).make_parser for name in ("prompts", "pairs", "annotate", "votes", "study")},
}
SERVER_FLAGS = {"host", "port"}  # of tapo_trl/rewards/reward_server.py
LAUNCHER_FLAGS = {  # of accelerate, torchrun and Slurm
    *(
        "accelerate_config",
        "config_file",
        "machine_rank",
        "main_process_ip",
        "mixed_precision",
        "num_machines",
        "num_processes",
    ),
    *("nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint"),
    *("gpus", "nodes", "ntasks", "requeue", "signal"),
}
PUBLIC_NAMES = [
    "DiffusionDPOConfig",
    "DiffusionDPOTrainer",
    "DiffusionNFTConfig",
    "DiffusionNFTTrainer",
    "DiffusionSFTConfig",
    "DiffusionSFTTrainer",
    "EMACallback",
    "FlowGRPOConfig",
    "FlowGRPOTrainer",
    "FlowMatchSDEScheduler",
    "GradientShareCallback",
    "OnlineDiffusionDPOConfig",
    "OnlineDiffusionDPOTrainer",
    "PolicyCallback",
    "RewardHackingGuardCallback",
    "SLRMConfig",
    "SLRMModel",
    "SLRMTrainer",
    "SampleGridCallback",
    "TAPOCallback",
    "TAPOConfig",
    "TAPOTrainer",
    "load_policy",
]


def name_of(path):
    return str(path.relative_to(ROOT))


def text_files():
    folders = ["tapo_trl", "examples", "recipes", "tests", "docs", "benchmarks", ".ci"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]  # of a worktree
    kinds = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".json", ".cff", ""}
    return [path for path in files if path.suffix in kinds and "__pycache__" not in path.parts]


class TestPackage:
    def test_public_names(self):
        assert set(PUBLIC_NAMES) <= set(tapo_trl.__all__)
        for name in tapo_trl.__all__:
            assert getattr(tapo_trl, name) is not None, name
        with pytest.raises(AttributeError, match="no attribute 'PPOTrainer'"):
            tapo_trl.__getattr__("PPOTrainer")

    def test_starts_without_the_heavy_libraries(self):
        code = "import sys, tapo_trl, tapo_trl.cli.main as cli; cli.main(['--help']); print('torch' in sys.modules)"
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert output.endswith("False\n")

    def test_is_typed_and_ships_its_data(self):
        package = ROOT / "tapo_trl"
        assert (package / "py.typed").is_file()
        assert (package / "runs" / "templates" / "tapo_model_card.md").is_file()
        assert (package / "runs" / "templates" / "slrm_model_card.md").is_file()

    def test_prompts(self):
        prompts = (ROOT / "tapo_trl" / "data" / "prompts.txt").read_text(encoding="utf-8").splitlines()
        assert len(prompts) > 200
        assert len(set(prompts)) == len(prompts)
        assert all(prompt == prompt.strip() and 10 < len(prompt) < 120 for prompt in prompts)

    def test_version_is_the_same_everywhere(self):
        citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
        assert citation["version"] == tapo_trl.__version__

    def test_every_python_file_has_the_licence(self):
        for path in text_files():
            if path.suffix == ".py" and path.stat().st_size > 0:
                assert path.read_text(encoding="utf-8").startswith("# Copyright 2026"), name_of(path)

    def test_no_machine_paths(self):
        pattern = re.compile(r"(?<![\w.])/(?:home|root|work|Users)/[a-z]")
        for path in text_files():
            match = pattern.search(path.read_text(encoding="utf-8"))
            assert match is None, f"{name_of(path)}: {match[0]}"


class TestRecipes:
    def test_are_there(self):
        names = {f"recipes/{model}/{command}.yaml" for model in ("sd35", "wan21") for command in ("slrm", "tapo")}
        assert names <= {name_of(path) for path in RECIPES}

    @pytest.mark.parametrize("path", RECIPES, ids=name_of)
    def test_every_key_is_a_field(self, path):
        command = next(command for command in PARSERS if path.stem.startswith(command))
        keys = set(yaml.safe_load(path.read_text(encoding="utf-8")))
        unknown = keys - {"env"} - PARSERS[command]()._field_names()
        assert not unknown

    @pytest.mark.parametrize("path", RECIPES, ids=name_of)
    def test_values_are_accepted(self, path, monkeypatch, tmp_path):
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
        command = next(command for command in PARSERS if path.stem.startswith(command))
        parsed = PARSERS[command]().parse_args_and_config(["--config", str(path)])
        assert parsed[-1].model_name_or_path is not None

    def test_names_no_dataset_that_is_gone(self):
        for path in [*RECIPES, *DOCS, *(ROOT / "examples").glob("*.py")]:
            text = path.read_text(encoding="utf-8")
            assert "yuvalkirstain/pickapic" not in text, name_of(path)
            assert "paper's settings" not in text or path.name == "reproduction.md", name_of(path)
        for name in ("slrm", "slrm_24gb", "dpo"):
            recipe = yaml.safe_load((ROOT / f"recipes/sd35/{name}.yaml").read_text(encoding="utf-8"))
            assert (recipe["dataset_name"], recipe["pair_preset"]) == ("liuhuohuo2/pick-a-pic-v2", "pickapic")

    def test_paper_settings(self, monkeypatch):
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
        _, args, _ = slrm.make_parser().parse_args_and_config(["--config", str(ROOT / "recipes/sd35/slrm.yaml")])
        assert 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 32
        assert (args.learning_rate, args.num_train_epochs, args.bf16, args.rho) == (
            1e-5,
            pytest.approx(5 * 583_747 / 959_040, abs=1e-4),  # of Pick-a-Pic v2: as many pairs as 5 epochs of v1
            True,
            pytest.approx(1.3863, abs=1e-4),
        )
        _, args, model = tapo.make_parser().parse_args_and_config(["--config", str(ROOT / "recipes/sd35/tapo.yaml")])
        assert 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 8
        assert (args.learning_rate, args.num_train_epochs, args.fp16, args.bf16) == (1e-4, 5, True, False)
        assert (args.beta, args.num_sde_steps, args.num_candidates, args.num_inference_steps) == (1000, 8, 4, 20)
        assert (args.noise_level, args.weight_decay, args.adam_beta1, args.adam_beta2) == (0.7, 0.01, 0.9, 0.999)
        assert (model.use_peft, model.lora_r) == (True, 64)
        assert (args.ddp_find_unused_parameters, args.ddp_broadcast_buffers) == (False, False)

    def test_paper_settings_for_video(self, monkeypatch):
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
        _, args, _ = slrm.make_parser().parse_args_and_config(["--config", str(ROOT / "recipes/wan21/slrm.yaml")])
        assert 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 16
        assert (args.num_frames, args.height, args.width, args.fps) == (49, 480, 832, 16)
        assert (args.learning_rate, args.num_train_epochs, args.bf16) == (1e-4, 15, True)
        assert args.rho == pytest.approx(1.3863, abs=1e-4)
        _, args, model = tapo.make_parser().parse_args_and_config(["--config", str(ROOT / "recipes/wan21/tapo.yaml")])
        assert 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 8
        assert (args.num_frames, args.height, args.width, args.fps) == (81, 480, 832, 16)
        assert (args.learning_rate, args.num_train_epochs, args.bf16) == (1e-4, 10, True)
        assert (args.beta, args.num_sde_steps, args.num_candidates, args.num_inference_steps) == (500, 8, 4, 40)
        assert (args.noise_level, args.weight_decay, model.use_peft, model.lora_r) == (0.7, 0.01, True, 128)

    @pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=name_of)
    def test_accelerate_reads_its_configurations(self, path):
        config = load_config_from_file(str(path))
        assert config.num_machines == (2 if path.stem == "multi_node" else 1)
        assert config.num_processes >= 1


class TestDocumentation:
    @pytest.mark.parametrize("path", DOCS, ids=name_of)
    def test_relative_links_lead_somewhere(self, path):
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), target

    @pytest.mark.parametrize("path", DOCS, ids=name_of)
    def test_python_compiles(self, path):
        for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            compile(block, path.name, "exec")

    @pytest.mark.parametrize("path", DOCS, ids=name_of)
    def test_names_in_imports_exist(self, path):
        for names in re.findall(r"^from tapo_trl import (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert {name.strip() for name in names.split(",")} <= set(tapo_trl.__all__)

    @pytest.mark.parametrize("path", DOCS, ids=name_of)
    def test_files_in_commands_exist(self, path):
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"(?:--config_file|--config|launch) ((?:recipes|examples)/\S+\.(?:yaml|py))", text):
            assert (ROOT / target).is_file(), target

    @pytest.mark.parametrize("path", DOCS, ids=name_of)
    def test_flags_in_commands_exist(self, path):
        fields = {
            command: make()._field_names()
            for command, make in {
                **PARSERS,
                **{own.__name__: own.make_parser for own in (merge, rewards, rounds, sample)},
            }.items()
        }
        known = set().union(*fields.values()) | {"config"} | LAUNCHER_FLAGS | SERVER_FLAGS
        text = re.sub(r"```sh\n.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)  # of other tools
        for flag in re.findall(r"`?--([a-z]\w+)", text):
            assert flag in known | {"extra"}, flag

    def test_option_tables_are_those_of_the_dataclasses(self):
        spec = importlib.util.spec_from_file_location("update_options", ROOT / "docs" / "update_options.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        documented = set()
        for path in DOCS:
            text = path.read_text(encoding="utf-8")
            documented |= {match[1] for match in module.BLOCK.findall(text)}
            # Sorted, because the order of inherited fields depends on the version of TRL.
            updated, lines = sorted(module.update(text).splitlines()), sorted(text.splitlines())
            assert updated == lines, f"{name_of(path)} is out of date: run `python docs/update_options.py`"
        configs = ("tapo_config.TAPOConfig", "slrm_config.SLRMConfig", "diffusion_dpo_config.DiffusionDPOConfig")
        configs += (
            "online_dpo_config.OnlineDiffusionDPOConfig",
            "flow_grpo_config.FlowGRPOConfig",
            "refl_config.ReFLConfig",
            "nft_config.DiffusionNFTConfig",
            "sft_config.DiffusionSFTConfig",
        )
        shared = (
            "preference_config.PreferenceDataConfig",
            "preference_config.MediaDataConfig",
            "rollout_config.RolloutConfig",
        )
        shared += ("base_config.DiffusionConfig", "base_config.PolicyConfig", "rollout_config.StochasticRolloutConfig")
        assert {f"trainer.{name}" for name in (*configs, *shared)} <= documented
        assert {"scripts.utils.TAPOScriptArguments", "cli.arguments.EvaluateArguments"} <= documented


def test_no_internal_numbers_in_what_users_read():
    folders = [ROOT / name for name in ("tapo_trl", "docs", "examples", "recipes", "benchmarks")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".md", ".yaml")]
    found = [path.name for path in files if re.search(r"\bM\d{1,2}\b", path.read_text(encoding="utf-8"))]
    assert files and found == []
