# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import io
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from tapo_trl.data import PAIR_PRESETS
from tapo_trl.data.loading import (
    PreferenceDatasetArguments,
    load_preference_pairs,
    load_prompts,
    load_split,
    read_prompts,
    read_prompts_and_columns,
)


ROWS = {"prompt": ["a cat", "a dog", "a fox"], "style": ["ink", "oil", "ink"]}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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


class TestDatasetArguments:
    def test_pair_columns_need_two_names(self):
        with pytest.raises(ValueError, match="two columns, but it names 1"):
            PreferenceDatasetArguments(pair_columns=["image_0"], label_column="label")

    @pytest.mark.parametrize(
        ("options", "missing"),
        [({"pair_columns": ["a", "b"]}, "label_column"), ({"label_column": "label"}, "pair_columns")],
    )
    def test_pair_columns_and_label_go_together(self, options, missing):
        with pytest.raises(ValueError, match=f"`{missing}` is not"):
            PreferenceDatasetArguments(**options)

    def test_presets_are_those_of_the_api(self):
        names, _ = get_args(PreferenceDatasetArguments.__annotations__["pair_preset"])
        assert set(get_args(names)) == set(PAIR_PRESETS) | {"none"}
        assert (
            PreferenceDatasetArguments(pair_preset="none", pair_columns=["a", "b"], label_column="c").pair_preset
            is None
        )

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"pair_preset": "hpdv3", "pair_columns": ["a", "b"], "label_column": "c"}, "`pair_preset` and `pair_columns`"),
            ({"pair_preset": "hpdv3", "chosen_column": "a"}, "`pair_preset` and `chosen_column` exclude"),
            ({"label_values": {"left": 1}}, "`label_values` is set but `label_column` is not"),
            ({"label_values": "{left"}, "`label_values` is not valid JSON"),
            ({"label_values": "3"}, "`label_values` must map"),
        ],
    )  # fmt: skip
    def test_options_that_exclude_each_other(self, options, message):
        with pytest.raises(ValueError, match=message):
            PreferenceDatasetArguments(**options)


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

    @pytest.mark.parametrize("suffix", ["parquet", "csv", "json", "jsonl"])
    def test_files_with_columns(self, tmp_path, suffix):
        dataset = Dataset.from_dict({"prompt": ["a cat", "a dog"], "kind": ["x", "y"]})
        getattr(dataset, f"to_{suffix.replace('jsonl', 'json')}")(f"prompts.{suffix}")
        assert read_prompts_and_columns([f"prompts.{suffix}"], "prompts") == (["a cat", "a dog"], {"kind": ["x", "y"]})
        with pytest.raises((FileNotFoundError, ValueError), match="promts"):
            read_prompts_and_columns([f"promts.{suffix}"], "prompts")
