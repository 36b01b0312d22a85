# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class PreferenceDatasetArguments:
    """
    A data set of preference pairs.

    Parameters:
        dataset_name (`str`, *optional*):
            Hub id, folder (also one of `Dataset.save_to_disk`) or `.parquet`, `.json`, `.jsonl` or `.csv` file.
        dataset_config (`str`, *optional*):
            Configuration of a data set on the Hub.
        dataset_test_split (`str`, *optional*):
            Split of held-out pairs; slices such as `train[90%:]` work for files and Hub data sets.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of the prompts.
        chosen_column (`str`, *optional*, defaults to `"chosen"`):
            Column of the preferred images or videos, when the pairs are stored by preference.
        rejected_column (`str`, *optional*, defaults to `"rejected"`):
            Column of the other ones.
        pair_columns (`list[str]`, *optional*):
            The two columns of images or videos, when the pairs are stored by position with a label (as in Pick-a-Pic). Needs
            `label_column`; `chosen_column` and `rejected_column` are not used then.
        label_column (`str`, *optional*):
            Column that tells how much the first of `pair_columns` is preferred: 1 the first, 0 the second, 0.5 a
            tie. Values between count as the nearer of 0 and 1.
        pair_preset (`str`, *optional*):
            Columns of a published data set, instead of the options above: `"pickapic"`, `"hpdv2"`, `"hpdv2_test"`, `"hpdv3"`,
            `"genai_bench_image"`, `"genai_bench_video"`, `"videogen_rewardbench"` or `"videofeedback"`, see
            [`to_preference_pairs`]. `prompt_column` takes precedence if it is not `"prompt"`. `"none"` takes back what a
            recipe says.
        label_values (`dict`, *optional*):
            What the values of `label_column` mean, such as `{left: 1, right: 0, tie: 0.5, unsure: null}`; rows whose value is
            null are left out. JSON on the command line.
        valid_column (`str`, *optional*):
            Column of booleans; the rows where it is false are left out. Defaults to `has_label`, where there is such a
            column.
        media_root (`str`, *optional*):
            Folder that relative paths of images and videos start from, or the address of a folder of a dataset on the Hub.
            Defaults to the working directory.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, folder, or .parquet, .json, .jsonl or .csv file of preference pairs."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    dataset_test_split: str | None = field(
        default=None,
        metadata={"help": "Split of held-out pairs; slices such as `train[90%%:]` work for files and Hub data sets."},
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompts."})
    chosen_column: str = field(default="chosen", metadata={"help": "Column of the preferred images or videos."})
    rejected_column: str = field(default="rejected", metadata={"help": "Column of the other ones."})
    pair_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "The two columns of images or videos, when the pairs are stored by position with a label (as in "
            "Pick-a-Pic). Needs `label_column`."
        },
    )
    label_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that tells how much the first of `pair_columns` is preferred: 1 the first, 0 the second, 0.5 "
            "a tie."
        },
    )
    pair_preset: (
        Literal[
            "pickapic", "hpdv2", "hpdv2_test", "hpdv3", "genai_bench_image", "genai_bench_video", "videogen_rewardbench",
            "videofeedback", "none",
        ]
        | None
    ) = field(
        default=None,
        metadata={"help": "Columns of a published data set, instead of the options above."},
    )  # fmt: skip
    label_values: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "What the values of `label_column` mean, such as `{left: 1, right: 0, tie: 0.5, unsure: null}`."
        },
    )
    valid_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of booleans; rows where it is false are left out. By default `has_label`, if there is one."
        },
    )
    media_root: str | None = field(
        default=None, metadata={"help": "Folder that relative paths of images and videos start from."}
    )

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


@dataclass
class SLRMScriptArguments(PreferenceDatasetArguments):
    """
    Arguments of `tapo-trl slrm` beside [`SLRMConfig`] and [`DiffusionModelConfig`]: those of
    [`PreferenceDatasetArguments`], and

    Parameters:
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on; slices such as `train[:90%]` work for files and Hub data sets.
        dry_run (`bool`, *optional*, defaults to `False`):
            Print shapes, numbers of tokens, parameters and forwards and an estimate of the memory, and stop. Nothing is
            loaded; neither an accelerator nor the data is needed.
    """

    dataset_train_split: str = field(
        default="train",
        metadata={"help": "Split to train on; slices such as `train[:90%%]` work for files and Hub data sets."},
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Print shapes, tokens, parameters, forwards and an estimate of the memory, and stop."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.dataset_name is None:
            raise ValueError("`dataset_name` is missing: give the Hub id, folder or file of the preference pairs.")


@dataclass
class SampleCallbackArguments:
    """
    What a command that trains a policy shows of it meanwhile.

    Parameters:
        sample_every_steps (`int`, *optional*):
            Draw fixed prompts every so many optimizer steps ([`SampleGridCallback`]): a grid of images, or videos and a
            strip of their frames.
        sample_prompts (`list[str]`, *optional*):
            Prompts of the grid, or the path of one `.txt` file. The default is the first eight held-out prompts, or the
            first eight training prompts if none are held out.
        sample_seed (`int`, *optional*, defaults to `0`):
            Seed of the first cell of the grid.
        ema_decay (`float`, *optional*):
            Keep an average of the trained weights with this decay ([`EMACallback`]); the grid is drawn with it.
    """

    sample_every_steps: int | None = field(
        default=None, metadata={"help": "Draw fixed prompts (a grid, or videos) every so many optimizer steps."}
    )
    sample_prompts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Prompts of the grid, or the path of one .txt file. The default is the first eight held-out "
            "prompts, or the first eight training prompts if none are held out."
        },
    )
    sample_seed: int = field(default=0, metadata={"help": "Seed of the first cell of the grid."})
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Keep an average of the trained weights with this decay; the grid is drawn with it."},
    )


@dataclass
class DPOScriptArguments(SampleCallbackArguments, SLRMScriptArguments):
    """
    Arguments of `tapo-trl dpo` beside [`DiffusionDPOConfig`] and [`DiffusionModelConfig`]: those of
    [`SLRMScriptArguments`], which describe the pairs, and those of [`SampleCallbackArguments`].
    """


@dataclass
class TAPOScriptArguments(SampleCallbackArguments):
    """
    Arguments of `tapo-trl tapo`, `online_dpo` and `grpo` beside [`TAPOConfig`], [`OnlineDiffusionDPOConfig`] or
    [`FlowGRPOConfig`] (which have `dataset_name` and `dataset_split`) and [`DiffusionModelConfig`]: those of [`SampleCallbackArguments`], and

    Parameters:
        > Parameters that control the prompts

        dataset_config (`str`, *optional*):
            Configuration of a data set on the Hub.
        dataset_test_split (`str`, *optional*):
            Split of held-out prompts.
        eval_dataset_name (`str`, *optional*):
            Data set of held-out prompts, when it is not a split of `dataset_name`.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of the prompts. The lines of a `.txt` file are prompts.

        > Parameters that control the reward

        reward_model (`list[str]`, *optional*):
            One or more of: the Hub id or folder of an SLRM; `package.module:function` for a callable
            `f(images, prompts, **columns)`. Several are combined with `reward_weights`.

        > Parameters that control the callbacks

        guard_reward (`str`, *optional*):
            `package.module:function`, a held-out reward that must not fall while the training reward rises
            ([`RewardHackingGuardCallback`]).
        guard_every_steps (`int`, *optional*, defaults to `50`):
            Optimizer steps between two checks of the guard.
        guard_num_prompts (`int`, *optional*, defaults to `32`):
            Number of held-out prompts that the guard scores.
        guard_patience (`int`, *optional*, defaults to `2`):
            Number of bad checks in a row before the guard acts.
        guard_min_drop (`float`, *optional*, defaults to `0.0`):
            Smallest fall of the held-out reward that counts.
        guard_action (`str`, *optional*, defaults to `"warn"`):
            `"warn"` or `"stop"`.
        gradient_share_every_steps (`int`, *optional*):
            Measure the share of each stochastic step in the gradient every so many optimizer steps
            ([`GradientShareCallback`]).

        > Parameters that control the command

        dry_run (`bool`, *optional*, defaults to `False`):
            Print shapes, numbers of tokens, parameters and forwards and an estimate of the memory, and stop. Nothing is
            loaded; neither an accelerator nor the data is needed.
    """

    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split of held-out prompts."})
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Data set of held-out prompts, when it is not a split of `dataset_name`."},
    )
    prompt_column: str = field(
        default="prompt", metadata={"help": "Column of the prompts. The lines of a .txt file are prompts."}
    )
    reward_model: list[str] | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of an SLRM, or `package.module:function`; several are combined with "
            "`reward_weights`."
        },
    )
    guard_reward: str | None = field(
        default=None,
        metadata={
            "help": "`package.module:function`, a held-out reward that must not fall while the training reward rises."
        },
    )
    guard_every_steps: int = field(default=50, metadata={"help": "Optimizer steps between two checks of the guard."})
    guard_num_prompts: int = field(default=32, metadata={"help": "Number of held-out prompts that the guard scores."})
    guard_patience: int = field(default=2, metadata={"help": "Number of bad checks in a row before the guard acts."})
    guard_min_drop: float = field(default=0.0, metadata={"help": "Smallest fall of the held-out reward that counts."})
    guard_action: Literal["warn", "stop"] = field(
        default="warn", metadata={"help": "What the guard does: warn, or stop the training."}
    )
    gradient_share_every_steps: int | None = field(
        default=None,
        metadata={"help": "Measure the share of each stochastic step in the gradient every so many optimizer steps."},
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Print shapes, tokens, parameters, forwards and an estimate of the memory, and stop."},
    )
