# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from tapo_trl.callbacks.ema import EMACallback
from tapo_trl.callbacks.gradient_share import GradientShareCallback
from tapo_trl.callbacks.reward_guard import RewardHackingGuardCallback
from tapo_trl.callbacks.samples import SampleGridCallback
from tapo_trl.cli.builders import (
    build_callbacks,
    load_function,
    load_policy_from_args,
    load_preference_pairs,
    load_prompt_dataset,
    load_prompts,
    load_reward_models,
    load_split,
    read_prompts,
)
from tapo_trl.cli.model_arguments import DiffusionModelConfig
from tapo_trl.cli.script_arguments import PreferenceDatasetArguments, TAPOScriptArguments
from tapo_trl.data import default_prompts


ROWS = {"prompt": ["a cat", "a dog", "a fox"], "style": ["ink", "oil", "ink"]}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def png(shade):
    buffer = io.BytesIO()
    PILImage.new("RGB", (4, 4), (shade,) * 3).save(buffer, format="PNG")
    return buffer.getvalue()


class TestLoadSplit:
    @pytest.mark.parametrize("suffix", ["parquet", "csv", "json", "jsonl"])
    def test_files(self, suffix):
        dataset = Dataset.from_dict(ROWS)
        getattr(dataset, f"to_{suffix.replace('jsonl', 'json')}")(f"prompts.{suffix}")
        loaded = load_split(f"prompts.{suffix}")
        assert loaded["prompt"][:] == ROWS["prompt"]
        assert load_split(f"prompts.{suffix}", split="train[1:]")["style"][:] == ["oil", "ink"]

    @pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "txt"])
    def test_files_with_a_byte_order_mark(self, suffix):
        column = "text" if suffix == "txt" else "prompt"
        text = {
            "csv": "prompt,style\r\na cat,oil\r\n",
            "json": '[{"prompt": "a cat"}]',
            "jsonl": '{"prompt": "a cat"}\r\n',
            "txt": "a cat\r\n",
        }[suffix]
        Path(f"marked.{suffix}").write_text(text, encoding="utf-8-sig", newline="")
        assert load_split(f"marked.{suffix}")[column][:] == ["a cat"]

    def test_saved_dataset(self):
        Dataset.from_dict(ROWS).save_to_disk("saved")
        assert load_split("saved")["prompt"][:] == ROWS["prompt"]
        with pytest.raises(ValueError, match=r"no split `test`; it has \['train'\]"):
            load_split("saved", split="test")

    def test_saved_dataset_dict(self):
        DatasetDict({"train": Dataset.from_dict(ROWS), "test": Dataset.from_dict({"prompt": ["b"]})}).save_to_disk(
            "all"
        )
        assert load_split("all", split="test")["prompt"][:] == ["b"]

    def test_folder_of_files(self, tmp_path):
        (tmp_path / "folder").mkdir()
        Dataset.from_dict(ROWS).to_parquet("folder/train.parquet")
        Dataset.from_dict({"prompt": ["b"], "style": ["c"]}).to_parquet("folder/test.parquet")
        assert load_split("folder", split="test")["prompt"][:] == ["b"]

    def test_missing_file(self):
        with pytest.raises(FileNotFoundError, match="no file nothing.parquet"):
            load_split("nothing.parquet")


class TestLoadPrompts:
    def test_text_file(self, tmp_path):
        (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
        assert load_prompts("prompts.txt")["prompt"][:] == ["a cat", "a dog"]

    def test_other_column_is_renamed_and_the_rest_is_kept(self):
        Dataset.from_dict({"caption": ["a"], "style": ["b"]}).to_parquet("p.parquet")
        dataset = load_prompts("p.parquet", prompt_column="caption")
        assert dataset.to_dict() == {"prompt": ["a"], "style": ["b"]}

    def test_missing_column_names_the_nearest(self):
        Dataset.from_dict({"prompts": ["a"]}).to_parquet("p.parquet")
        with pytest.raises(ValueError, match=r"no column `prompt` \(`prompt_column`\).*Did you mean `prompts`"):
            load_prompts("p.parquet")


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


class TestLoadPreferencePairs:
    def write(self, columns, image_columns=(), name="pairs.parquet"):
        features = {column: Value("string") for column in columns}
        features.update({column: Image() for column in image_columns})
        if "label" in columns:
            features["label"] = Value("float64")
        Dataset.from_dict(columns, features=Features(features)).to_parquet(name)
        return name

    def shades(self, dataset, column):
        return [int(np.asarray(image)[0, 0, 0]) for image in dataset[column]]

    def by_position(self, labels):
        count = len(labels)
        return self.write(
            {
                "caption": [f"prompt {i}" for i in range(count)],
                "image_0": [{"bytes": png(i), "path": None} for i in range(count)],
                "image_1": [{"bytes": png(100 + i), "path": None} for i in range(count)],
                "label": labels,
            },
            ["image_0", "image_1"],
        )

    def test_stored_by_preference(self):
        name = self.write(
            {
                "caption": ["a", "b"],
                "good": [{"bytes": png(i), "path": None} for i in (1, 2)],
                "bad": [{"bytes": png(i), "path": None} for i in (3, 4)],
            },
            ["good", "bad"],
        )
        args = PreferenceDatasetArguments(
            dataset_name=name, prompt_column="caption", chosen_column="good", rejected_column="bad"
        )
        pairs = load_preference_pairs(args, "train")
        assert pairs.column_names == ["prompt", "chosen", "rejected"]
        assert self.shades(pairs, "chosen") == [1, 2]
        assert self.shades(pairs, "rejected") == [3, 4]

    def test_stored_by_position(self):
        args = PreferenceDatasetArguments(
            dataset_name=self.by_position([1.0, 0.0, 0.5, 0.2, 0.9]),
            prompt_column="caption",
            pair_columns=["image_0", "image_1"],
            label_column="label",
        )
        pairs = load_preference_pairs(args, "train")
        assert pairs["prompt"][:] == [f"prompt {i}" for i in range(5)]
        assert self.shades(pairs, "chosen") == [0, 101, 2, 103, 4]
        assert self.shades(pairs, "rejected") == [100, 1, 102, 3, 104]
        assert pairs["label"][:] == [1.0, 1.0, 0.5, 1.0, 1.0]

    def test_labels_of_dimensions_turn_with_their_pair(self):
        columns = {"prompt": ["a", "b"], "chosen": ["1", "2"], "rejected": ["3", "4"], "preferred": [1.0, 0.0]}
        columns |= {"label_motion": [0.25, 0.25], "label_text": [1.0, None], "label_source": ["x", "y"]}
        Dataset.from_dict(columns).to_parquet("pairs.parquet")
        args = PreferenceDatasetArguments(
            dataset_name="pairs.parquet", pair_columns=["chosen", "rejected"], label_column="preferred"
        )
        pairs = load_preference_pairs(args, "train")
        assert pairs["chosen"][:] == ["1", "4"] and pairs["rejected"][:] == ["3", "2"]
        assert pairs["label_motion"][:] == [0.25, 0.75] and pairs["label_text"][:] == [1.0, None]

    def test_pairs_without_a_label_are_left_out(self):
        args = PreferenceDatasetArguments(
            dataset_name=self.by_position([1.0, None, 0.0]),
            prompt_column="caption",
            pair_columns=["image_0", "image_1"],
            label_column="label",
        )
        assert load_preference_pairs(args, "train")["prompt"][:] == ["prompt 0", "prompt 2"]

    def test_labels_out_of_range(self):
        args = PreferenceDatasetArguments(
            dataset_name=self.by_position([1.0, 2.0]),
            prompt_column="caption",
            pair_columns=["image_0", "image_1"],
            label_column="label",
        )
        with pytest.raises(ValueError, match=r"values in \[0, 1\].*reach from 1.0 to 2.0"):
            load_preference_pairs(args, "train")

    def test_stored_by_position_but_not_said(self):
        args = PreferenceDatasetArguments(dataset_name=self.by_position([1.0]), prompt_column="caption")
        with pytest.raises(ValueError, match=r"`pair_columns: \[image_0, image_1\]` and `label_column`"):
            load_preference_pairs(args, "train")

    def test_preset(self, tmp_path):
        columns = {"caption": ["a", "b"], "jpg_0": [png(1), png(2)], "jpg_1": [png(3), png(4)], "label_0": [0.0, -1.0]}
        columns |= {"label_1": [1.0, -1.0], "has_label": [True, False], "tags": [["x"], []]}
        Dataset.from_dict(columns).to_parquet("pickapic.parquet")
        args = PreferenceDatasetArguments(dataset_name="pickapic.parquet", pair_preset="pickapic")
        pairs = load_preference_pairs(args, "train")
        assert pairs.to_dict() == {"prompt": ["a"], "chosen": [png(3)], "rejected": [png(1)], "label": [1.0]}
        names = {"prompt_column": "caption", "pair_columns": ["jpg_0", "jpg_1"], "label_column": "label_0"}
        args = PreferenceDatasetArguments(dataset_name="pickapic.parquet", **names)
        assert load_preference_pairs(args, "train").to_dict() == pairs.to_dict()
        args = PreferenceDatasetArguments(dataset_name="pickapic.parquet", prompt_column="caption")
        with pytest.raises(ValueError, match="It has the columns of `pair_preset='pickapic'`"):
            load_preference_pairs(args, "train")

    def test_values_of_labels_and_a_folder(self):
        columns = {"prompt": ["a", "b"], "x": ["x0", "x1"], "y": ["y0", "y1"], "vote": ["right", "unsure"]}
        Dataset.from_dict(columns).to_json("pairs.jsonl")
        args = PreferenceDatasetArguments(
            dataset_name="pairs.jsonl", pair_columns=["x", "y"], label_column="vote", media_root="files",
            label_values='{"left": 1, "right": 0, "unsure": null}',
        )  # fmt: skip
        pairs = load_preference_pairs(args, "train").to_dict()
        assert pairs == {"prompt": ["a"], "chosen": ["files/y0"], "rejected": ["files/x0"], "label": [1.0]}

    def test_missing_column(self):
        args = PreferenceDatasetArguments(
            dataset_name=self.write({"prompt": ["a"], "chozen": ["b"], "rejected": ["c"]})
        )
        with pytest.raises(ValueError, match=r"no column `chosen` \(`chosen_column`\).*Did you mean `chozen`"):
            load_preference_pairs(args, "train")


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


class TestReadPrompts:
    def test_file(self, tmp_path):
        (tmp_path / "p.txt").write_text("a\n\n b \n", encoding="utf-8-sig")  # with a byte order mark
        assert read_prompts(["p.txt"], "prompts") == ["a", "b"]

    def test_prompts(self):
        assert read_prompts(["a cat", "a dog"], "prompts") == ["a cat", "a dog"]

    def test_errors(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="`prompts`: there is no file q.txt"):
            read_prompts(["q.txt"], "prompts")
        (tmp_path / "empty.txt").write_text("\n")
        with pytest.raises(ValueError, match="`prompts` has no prompt"):
            read_prompts(["empty.txt"], "prompts")


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


class TestLoadPolicy:
    def test_precision_and_extra_arguments(self, tmp_path, tiny_sd3_pipeline):
        import torch

        tiny_sd3_pipeline.save_pretrained(tmp_path / "base")
        args = DiffusionModelConfig(model_name_or_path=str(tmp_path / "base"), torch_dtype="bfloat16")
        policy = load_policy_from_args(args, SimpleNamespace(model_init_kwargs=None))
        assert policy.transformer.dtype == torch.bfloat16
        policy = load_policy_from_args(args, SimpleNamespace(model_init_kwargs={"torch_dtype": torch.float32}))
        assert policy.transformer.dtype == torch.float32
