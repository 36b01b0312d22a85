# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from tapo_trl import SLRMConfig, load_policy
from tapo_trl.callbacks.ema import EMACallback
from tapo_trl.callbacks.gradient_share import GradientShareCallback
from tapo_trl.callbacks.reward_guard import RewardHackingGuardCallback
from tapo_trl.callbacks.samples import SampleGridCallback
from tapo_trl.data import default_prompts
from tapo_trl.scripts import slrm
from tapo_trl.scripts.utils import (
    SLRMScriptArguments,
    TAPOScriptArguments,
    build_callbacks,
    load_function,
    load_preference_splits,
    load_prompt_dataset,
    load_reward_models,
    model_init_kwargs,
)
from tapo_trl.trainer.model_config import DiffusionModelConfig


ROWS = {"prompt": ["a cat", "a dog", "a fox"], "style": ["ink", "oil", "ink"]}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


class TestSLRMScriptArguments:
    def test_needs_a_dataset(self):
        with pytest.raises(ValueError, match="`dataset_name` is missing"):
            SLRMScriptArguments()


class TestLoadPreferenceSplits:
    def test_pairs_that_nobody_evaluates_need_no_split(self):
        Dataset.from_dict({"prompt": ["a"], "chosen": ["0.png"], "rejected": ["1.png"]}).to_parquet("pairs.parquet")
        args = SLRMScriptArguments(dataset_name="pairs.parquet", dataset_test_split="validation")
        train, held_out = load_preference_splits(args, evaluates=False)
        assert train["chosen"][:] == ["0.png"] and held_out is None
        with pytest.raises(ValueError, match="validation"):
            load_preference_splits(args)

    @pytest.mark.parametrize(
        ("options", "evaluates"), [({}, False), ({"eval_strategy": "steps"}, True), ({"eval_on_start": True}, True)]
    )
    def test_the_command_says_whether_it_evaluates(self, monkeypatch, options, evaluates):
        class Loaded(Exception):
            pass

        def load(args, evaluates):
            raise Loaded(evaluates)

        monkeypatch.setattr("tapo_trl.scripts.utils.load_preference_splits", load)
        args = SLRMConfig("out", bf16=False, use_cpu=True, report_to="none", **options)
        with pytest.raises(Loaded) as error:
            slrm.make_trainer(SLRMScriptArguments(dataset_name="pairs.parquet"), args, DiffusionModelConfig("base"))
        assert error.value.args == (evaluates,)


def tapo_args(**kwargs):
    """The fields of `TAPOConfig` that the loaders read."""
    options = {"dataset_name": None, "dataset_split": "train", "eval_strategy": "no", "resume_from_checkpoint": None}
    return SimpleNamespace(**{**options, **kwargs})


class TestLoadPromptDataset:
    def test_prompts_of_the_package(self):
        train, held_out = load_prompt_dataset(TAPOScriptArguments(), tapo_args())
        assert train["prompt"][:] == default_prompts()["prompt"][:]
        assert held_out is None

    def test_held_out_split(self):
        Dataset.from_dict(ROWS).to_parquet("p.parquet")
        train, held_out = load_prompt_dataset(
            TAPOScriptArguments(dataset_test_split="train[2:]"),
            tapo_args(dataset_name="p.parquet", dataset_split="train[:2]"),
        )
        assert train["prompt"][:] == ["a cat", "a dog"]
        assert held_out["prompt"][:] == ["a fox"]

    def test_held_out_file(self, tmp_path):
        (tmp_path / "held_out.txt").write_text("a yak\n")
        Dataset.from_dict(ROWS).to_parquet("p.parquet")
        train, held_out = load_prompt_dataset(
            TAPOScriptArguments(eval_dataset_name="held_out.txt"), tapo_args(dataset_name="p.parquet")
        )
        assert train["prompt"][:] == ROWS["prompt"]
        assert held_out["prompt"][:] == ["a yak"]

    def test_evaluation_needs_held_out_prompts(self):
        with pytest.raises(ValueError, match="no prompts are held out"):
            load_prompt_dataset(TAPOScriptArguments(), tapo_args(eval_strategy="steps"))

    def test_split_of_nothing(self):
        with pytest.raises(ValueError, match="neither `eval_dataset_name` nor `dataset_name`"):
            load_prompt_dataset(TAPOScriptArguments(dataset_test_split="test"), tapo_args())


class TestModelInitKwargs:
    def load(self, model_args, own):
        kwargs = model_init_kwargs(model_args, SimpleNamespace(model_init_kwargs=own))
        return load_policy(model_args.require_model(), **kwargs)

    def test_precision_and_extra_arguments(self, tmp_path, tiny_sd3_pipeline):
        tiny_sd3_pipeline.save_pretrained(tmp_path / "base")
        args = DiffusionModelConfig(model_name_or_path=str(tmp_path / "base"), torch_dtype="bfloat16")
        assert self.load(args, None).transformer.dtype == torch.bfloat16
        assert self.load(args, {"torch_dtype": torch.float32}).transformer.dtype == torch.float32


class TestLoadRewardModels:
    @pytest.fixture(autouse=True)
    def module(self, tmp_path):
        (tmp_path / "my_rewards.py").write_text(
            "LIMIT = 3\n\ndef brightness(images, prompts):\n    return images.mean()\n"
        )
        yield
        sys.modules.pop("my_rewards", None)

    def test_function_of_the_working_directory(self):
        assert load_reward_models(["my_rewards:brightness"]).__name__ == "brightness"

    def test_folder_and_hub_id_stay_as_they_are(self):
        assert load_reward_models(["user/slrm"]) == "user/slrm"

    def test_several(self):
        folder, function = load_reward_models(["outputs/slrm", "my_rewards:brightness"])
        assert folder == "outputs/slrm"
        assert callable(function)

    @pytest.mark.parametrize("specs", [None, []])
    def test_missing(self, specs):
        with pytest.raises(ValueError, match="`reward_model` is missing"):
            load_reward_models(specs)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("my_rewards", "form `package.module:function`"),
            ("no_such_module:f", "cannot import `no_such_module:f`"),
            ("my_rewards:darkness", "module `my_rewards` has no `darkness`"),
            ("my_rewards:LIMIT", "is a `int`, not a function"),
        ],
    )
    def test_bad_functions(self, spec, message):
        with pytest.raises(ValueError, match=f"`guard_reward`.*{message}"):
            load_function(spec, "guard_reward")


class TestBuildCallbacks:
    train = Dataset.from_dict({"prompt": [f"train {i}" for i in range(20)]})
    held_out = Dataset.from_dict({"prompt": [f"held out {i}" for i in range(20)]})

    def build(self, held_out=None, resume=None, **flags):
        return build_callbacks(
            TAPOScriptArguments(**flags), tapo_args(resume_from_checkpoint=resume), self.train, held_out
        )

    def test_none_by_default(self):
        assert self.build() == []

    def test_shares_of_the_gradient(self):
        (callback,) = self.build(gradient_share_every_steps=7)
        assert isinstance(callback, GradientShareCallback)
        assert callback.every_n_steps == 7

    @pytest.mark.parametrize("held_out", [True, False])
    def test_sample_prompts_by_default(self, held_out):
        (callback,) = self.build(self.held_out if held_out else None, sample_every_steps=5, sample_seed=3)
        assert isinstance(callback, SampleGridCallback)
        assert callback.prompts == [f"{'held out' if held_out else 'train'} {i}" for i in range(8)]
        assert (callback.every_n_steps, callback.seed, callback.ema) == (5, 3, None)

    def test_grid_is_drawn_with_the_average_that_comes_before_it(self):
        ema, grid = self.build(sample_every_steps=5, sample_prompts=["a"], ema_decay=0.9)
        assert isinstance(ema, EMACallback)
        assert ema.decay == 0.9
        assert grid.ema is ema
        assert grid.prompts == ["a"]

    @pytest.mark.parametrize(
        ("resume", "expected"), [(None, None), ("True", None), (True, None), ("checkpoint-3", "checkpoint-3")]
    )
    def test_average_resumes_from_the_checkpoint(self, tmp_path, resume, expected):
        (tmp_path / "checkpoint-3").mkdir()
        (ema,) = self.build(resume=resume, ema_decay=0.9)
        assert ema.resume_from == expected

    def test_guard(self, tmp_path):
        (tmp_path / "guard_rewards.py").write_text("def f(images, prompts):\n    return images.mean((1, 2, 3))\n")
        (guard,) = self.build(
            self.held_out,
            guard_reward="guard_rewards:f",
            guard_every_steps=7,
            guard_num_prompts=4,
            guard_patience=3,
            guard_min_drop=0.5,
            guard_action="stop",
        )
        sys.modules.pop("guard_rewards")
        assert isinstance(guard, RewardHackingGuardCallback)
        assert guard.prompts == [f"held out {i}" for i in range(4)]
        assert (guard.every_n_steps, guard.patience, guard.min_drop, guard.action) == (7, 3, 0.5, "stop")

    def test_guard_needs_held_out_prompts(self):
        with pytest.raises(ValueError, match="`guard_reward` needs held-out prompts"):
            self.build(guard_reward="a:b")
