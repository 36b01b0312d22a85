# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Loading prompts and preference pairs, wherever they are: files, folders, the Hub."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from ..field_types import option
from .columns import require_columns
from .pair_tables import with_media_root
from .pairs import preset_hint, to_preference_pairs


FILE_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}


@dataclass
class PreferenceDatasetArguments:
    """A dataset of preference pairs, see [`load_preference_pairs`]. `tapo-trl slrm --help` describes the fields."""

    dataset_name: str | None = option("Hub id, folder, or .parquet, .json, .jsonl or .csv file of preference pairs.")
    dataset_config: str | None = option("Configuration of a dataset on the Hub.")
    dataset_test_split: str | None = option(
        "Split of held-out pairs; slices such as `train[90%%:]` work for files and Hub datasets."
    )
    prompt_column: str = option("Column of the prompts.", "prompt")
    chosen_column: str = option("Column of the preferred images or videos.", "chosen")
    rejected_column: str = option("Column of the rejected images or videos.", "rejected")
    pair_columns: list[str] | None = option(
        "The two columns of images or videos, when the pairs are stored by position with a label (as in "
        "Pick-a-Pic). Needs `label_column`."
    )
    label_column: str | None = option(
        "Column that tells how much the first of `pair_columns` is preferred: 1 the first, 0 the second, 0.5 a tie."
    )
    pair_preset: (
        Literal[
            "pickapic", "hpdv2", "hpdv2_test", "hpdv3", "genai_bench_image", "genai_bench_video", "videogen_rewardbench",
            "videofeedback", "none",
        ]
        | None
    ) = option("Columns of a published dataset, instead of the options above.")  # fmt: skip
    label_values: dict[str, Any] | str | None = option(
        "What the values of `label_column` mean, such as `{left: 1, right: 0, tie: 0.5, unsure: null}`."
    )
    valid_column: str | None = option(
        "Column of booleans; rows where it is false are left out. By default `has_label`, if there is one."
    )
    media_root: str | None = option("Folder that relative paths of images and videos start from.")

    def __post_init__(self):
        if isinstance(self.label_values, str):
            try:
                self.label_values = json.loads(self.label_values)
            except json.JSONDecodeError as error:
                raise ValueError(f"`label_values` is not valid JSON: {error}.") from error
        if self.label_values is not None and not isinstance(self.label_values, dict):
            raise ValueError(f"`label_values` must map values to numbers, got {self.label_values!r}.")
        if self.pair_preset == "none":
            self.pair_preset = None
        if self.pair_preset is not None:
            defaults = {
                "pair_columns": None,
                "label_column": None,
                "chosen_column": "chosen",
                "rejected_column": "rejected",
            }
            for name, default in defaults.items():
                if getattr(self, name) != default:
                    raise ValueError(f"`pair_preset` and `{name}` exclude each other: set one of them.")
        elif self.label_values is not None and self.label_column is None:
            raise ValueError("`label_values` is set but `label_column` is not: whose values are they?")
        if self.pair_columns is not None and len(self.pair_columns) != 2:
            raise ValueError(f"`pair_columns` must name two columns, but it names {len(self.pair_columns)}.")
        if (self.pair_columns is None) != (self.label_column is None):
            missing, present = (
                ("label_column", "pair_columns") if self.pair_columns else ("pair_columns", "label_column")
            )
            raise ValueError(f"`{present}` is set but `{missing}` is not: pairs stored by position need both.")


def load_split(name: str, config: str | None = None, split: str = "train") -> Dataset:
    """
    Loads one split of a dataset, wherever it is.

    Args:
        name (`str`): A `.parquet`, `.json`, `.jsonl`, `.csv` or `.txt` file, a folder written by
            `Dataset.save_to_disk` or `DatasetDict.save_to_disk`, a folder of data files, or a Hub id.
        config (`str`, *optional*): Configuration of a dataset on the Hub.
        split (`str`, *optional*, defaults to `"train"`): Split. A file is one split, `train`, of which slices such as
            `train[:90%]` can be taken.

    Returns:
        [`~datasets.Dataset`]: The split.
    """
    path = Path(name)
    if path.suffix in FILE_BUILDERS:
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {name} (the working directory is {os.getcwd()}).")
        builder = FILE_BUILDERS[path.suffix]
        encoding = {} if builder == "parquet" else {"encoding": "utf-8-sig"}  # files from Windows start with a mark
        return load_dataset(builder, data_files=str(path), split=split, **encoding)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load_from_disk(str(path))
        if isinstance(saved, Dataset):
            saved = DatasetDict({"train": saved})
        if split not in saved:
            raise ValueError(f"The dataset in {name} has no split `{split}`; it has {sorted(saved)}.")
        return saved[split]
    return load_dataset(name, config, split=split)


def _rename(dataset: Dataset, old: str, new: str) -> Dataset:
    if old == new:
        return dataset
    if new in dataset.column_names:
        dataset = dataset.remove_columns(new)
    return dataset.rename_column(old, new)


def load_prompts(name: str, config: str | None = None, split: str = "train", prompt_column: str = "prompt") -> Dataset:
    """
    Loads prompts into the column `prompt`, other columns beside it (reward functions receive them).

    Args:
        name (`str`), config (`str`, *optional*), split (`str`): See [`load_split`].
        prompt_column (`str`, *optional*, defaults to `"prompt"`): Column of the prompts. The lines of a `.txt` file are
            prompts; empty lines are left out.

    Returns:
        [`~datasets.Dataset`]: With the column `prompt`.
    """
    dataset = load_split(name, config, split)
    if Path(name).suffix == ".txt":
        return dataset.rename_column("text", "prompt").filter(lambda row: row["prompt"].strip())
    require_columns(dataset, [("prompt_column", prompt_column)], f"The dataset {name}")
    return _rename(dataset, prompt_column, "prompt")


def load_samples(args: Any, split: str, column: str) -> Dataset:
    """
    Loads images or videos with prompts into the columns that [`DiffusionSFTTrainer`] reads. No file is decoded or copied.

    Args:
        args ([`SFTScriptArguments`]): Where the samples are, and how their columns are called.
        split (`str`): Split.
        column (`str`): `"image"` or `"video"`: what the model makes.

    Returns:
        [`~datasets.Dataset`]: With the columns `prompt` and `column`.
    """
    dataset = load_split(args.dataset_name, args.dataset_config, split)
    media = args.media_column or column
    columns = {"prompt_column": args.prompt_column, "media_column": media}
    require_columns(dataset, columns.items(), f"The dataset {args.dataset_name}")
    dataset = _rename(_rename(dataset, args.prompt_column, "prompt"), media, column).select_columns(["prompt", column])
    return dataset if args.media_root is None else with_media_root(dataset, [column], args.media_root)


def load_preference_pairs(args: PreferenceDatasetArguments, split: str) -> Dataset:
    """
    Loads preference pairs into the columns that [`SLRMTrainer`] reads, see [`to_preference_pairs`]. No image or video is
    decoded or copied, and nothing is written beside what loading a dataset writes.

    Args:
        args ([`PreferenceDatasetArguments`]): Where the pairs are, and how their columns are called.
        split (`str`): Split.

    Returns:
        [`~datasets.Dataset`]: With the columns `prompt`, `chosen` and `rejected`, and for pairs with labels also `label`
            (1, or 0.5 for a tie), in the order of the dataset, and the columns `label_<dimension>`, turned to say how
            much the chosen is preferred. Pairs without a label are left out.
    """
    dataset = load_split(args.dataset_name, args.dataset_config, split)
    options = {"label_values": args.label_values, "valid_column": args.valid_column, "media_root": args.media_root}
    if args.pair_preset is not None:
        prompt = None if args.prompt_column == "prompt" else args.prompt_column
        return to_preference_pairs(dataset, preset=args.pair_preset, prompt=prompt, **options)

    columns = {"prompt_column": args.prompt_column}
    if args.pair_columns is None:
        first, second = args.chosen_column, args.rejected_column
        columns |= {"chosen_column": first, "rejected_column": second}
        hint = preset_hint(dataset.column_names, "pair_preset")
        if hint and not set(columns.values()) <= set(dataset.column_names):
            raise ValueError(f"The dataset {args.dataset_name} does not have all of {list(columns.values())}.{hint}")
        if first not in dataset.column_names and "image_0" in dataset.column_names:
            raise ValueError(
                f"The dataset {args.dataset_name} stores pairs by position (`image_0`, `image_1`): set "
                "`pair_columns: [image_0, image_1]` and `label_column`, the column that tells how much the first is "
                "preferred."
            )
    else:
        first, second = args.pair_columns
        columns |= {"pair_columns[0]": first, "pair_columns[1]": second, "label_column": args.label_column}
    require_columns(dataset, columns.items(), f"The dataset {args.dataset_name}")
    return to_preference_pairs(
        dataset, first=first, second=second, label=args.label_column, prompt=args.prompt_column, **options
    )


def read_prompts_and_columns(prompts: list[str], option: str) -> tuple[list[str], dict[str, list[Any]]]:
    """
    Prompts as they are, or those of the one file that is named.

    Args:
        prompts (`list[str]`): Prompts, or the path of one `.txt` file with a prompt per line, or of one `.parquet`, `.json`, `.jsonl`
            or `.csv` file with the column `prompt`.
        option (`str`): Name of the option, for the error.

    Returns:
        `tuple[list[str], dict[str, list]]`: At least one prompt, and further columns, one value per prompt.
    """
    if len(prompts) == 1 and Path(prompts[0]).suffix in FILE_BUILDERS.keys() - {".txt"}:
        columns = load_prompts(prompts[0])[:]
        prompts = columns.pop("prompt")
        if not prompts:
            raise ValueError(f"`{option}` has no prompt in it.")
        return prompts, columns
    return read_prompts(prompts, option), {}


def read_prompts(prompts: list[str], option: str) -> list[str]:
    """
    Prompts as they are, or the lines of the one `.txt` file that is named.

    Args:
        prompts (`list[str]`): Prompts, or one path that ends in `.txt`.
        option (`str`): Name of the option, for the error.

    Returns:
        `list[str]`: At least one prompt.
    """
    if len(prompts) == 1 and prompts[0].endswith(".txt"):
        path = Path(prompts[0])
        if not path.is_file():
            raise FileNotFoundError(f"`{option}`: there is no file {path}.")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"`{option}` has no prompt in it.")
    return prompts
