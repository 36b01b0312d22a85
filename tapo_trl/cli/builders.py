# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import TrainerCallback
from transformers.utils import logging

from ..callbacks.ema import EMACallback
from ..callbacks.reward_guard import RewardHackingGuardCallback
from ..callbacks.samples import SampleGridCallback
from ..data import default_prompts
from ..data.pairs import preset_hint, to_preference_pairs
from ..policies import FlowPolicy, load_policy
from ..policies.loading import pop_dtype
from .model_arguments import DiffusionModelConfig, get_lora_config
from .script_arguments import (
    PreferenceDatasetArguments,
    SampleCallbackArguments,
    SLRMScriptArguments,
    TAPOScriptArguments,
)


if TYPE_CHECKING:
    from ..trainer.diffusion_dpo_config import DiffusionDPOConfig
    from ..trainer.diffusion_dpo_trainer import DiffusionDPOTrainer
    from ..trainer.rollout_config import RolloutConfig
    from ..trainer.rollout_trainer import RolloutTrainer
    from ..trainer.slrm_config import SLRMConfig
    from ..trainer.slrm_trainer import SLRMTrainer


logger = logging.get_logger(__name__)

FILE_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}


def load_policy_from_args(
    model_args: DiffusionModelConfig, training_args: "SLRMConfig | RolloutConfig | DiffusionDPOConfig"
) -> FlowPolicy:
    """
    Loads the policy of a training command.

    Args:
        model_args ([`DiffusionModelConfig`]): The pipeline, its revision and its precision.
        training_args ([`SLRMConfig`], [`RolloutConfig`] or [`DiffusionDPOConfig`]): Its `model_init_kwargs` take precedence.

    Returns:
        [`FlowPolicy`]: The policy.
    """
    return load_policy(model_args.require_model(), **model_init_kwargs(model_args, training_args))


def model_init_kwargs(
    model_args: DiffusionModelConfig, training_args: "SLRMConfig | RolloutConfig | DiffusionDPOConfig"
) -> dict[str, Any]:
    """Loading arguments, see [`load_policy_from_args`]."""
    kwargs = dict(training_args.model_init_kwargs or {})
    if pop_dtype(dict(kwargs)) is None:
        kwargs["torch_dtype"] = model_args.torch_dtype
    if model_args.model_revision is not None:
        kwargs.setdefault("revision", model_args.model_revision)
    return kwargs


def load_split(name: str, config: str | None = None, split: str = "train") -> Dataset:
    """
    Loads one split of a data set, wherever it is.

    Args:
        name (`str`): A `.parquet`, `.json`, `.jsonl`, `.csv` or `.txt` file, a folder written by
            `Dataset.save_to_disk` or `DatasetDict.save_to_disk`, a folder of data files, or a Hub id.
        config (`str`, *optional*): Configuration of a data set on the Hub.
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
            raise ValueError(f"The data set in {name} has no split `{split}`; it has {sorted(saved)}.")
        return saved[split]
    return load_dataset(name, config, split=split)


def _require_columns(dataset: Dataset, columns: dict[str, str], name: str) -> None:
    """Checks that the columns exist; `columns` maps the option that names a column to the column."""
    for option, column in columns.items():
        if column not in dataset.column_names:
            near = difflib.get_close_matches(column, dataset.column_names, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise ValueError(
                f"The data set {name} has no column `{column}` (`{option}`); it has {dataset.column_names}.{hint}"
            )


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
    _require_columns(dataset, {"prompt_column": prompt_column}, name)
    return _rename(dataset, prompt_column, "prompt")


def load_prompt_dataset(
    script_args: TAPOScriptArguments, training_args: "RolloutConfig"
) -> tuple[Dataset, Dataset | None]:
    """
    The prompts to train on and the held-out prompts.

    Args:
        script_args ([`TAPOScriptArguments`]): Where the prompts are.
        training_args ([`RolloutConfig`]): Its `dataset_name` and `dataset_split` name the training prompts.

    Returns:
        `tuple[Dataset, Dataset | None]`: Both with the column `prompt`. Without a `dataset_name` the first holds the
        prompts that ship with the package; the second is `None` if nothing is held out.
    """
    train_dataset, eval_dataset = default_prompts(), None
    if training_args.dataset_name is not None:
        train_dataset = load_prompts(
            training_args.dataset_name,
            script_args.dataset_config,
            training_args.dataset_split,
            script_args.prompt_column,
        )
    eval_name = script_args.eval_dataset_name or training_args.dataset_name
    if script_args.eval_dataset_name is not None or script_args.dataset_test_split is not None:
        if eval_name is None:
            raise ValueError(
                "`dataset_test_split` is set, but neither `eval_dataset_name` nor `dataset_name` says of which data set."
            )
        eval_dataset = load_prompts(
            eval_name, script_args.dataset_config, script_args.dataset_test_split or "train", script_args.prompt_column
        )
    if training_args.eval_strategy != "no" and eval_dataset is None:
        raise ValueError(
            "`eval_strategy` asks for evaluations, but no prompts are held out: set `dataset_test_split` or "
            '`eval_dataset_name`, or `eval_strategy: "no"`.'
        )
    return train_dataset, eval_dataset


def load_preference_pairs(args: PreferenceDatasetArguments, split: str) -> Dataset:
    """
    Loads preference pairs into the columns that [`SLRMTrainer`] reads, see [`to_preference_pairs`]. No image or video is
    decoded or copied, and nothing is written beside what loading a data set writes.

    Args:
        args ([`PreferenceDatasetArguments`]): Where the pairs are, and how their columns are called.
        split (`str`): Split.

    Returns:
        [`~datasets.Dataset`]: With the columns `prompt`, `chosen` and `rejected`, and for pairs with labels also `label`
            (1, or 0.5 for a tie), in the order of the data set, and the columns `label_<dimension>`, turned to say how
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
            raise ValueError(f"The data set {args.dataset_name} does not have all of {list(columns.values())}.{hint}")
        if first not in dataset.column_names and "image_0" in dataset.column_names:
            raise ValueError(
                f"The data set {args.dataset_name} stores pairs by position (`image_0`, `image_1`): set "
                "`pair_columns: [image_0, image_1]` and `label_column`, the column that tells how much the first is "
                "preferred."
            )
    else:
        first, second = args.pair_columns
        columns |= {"pair_columns[0]": first, "pair_columns[1]": second, "label_column": args.label_column}
    _require_columns(dataset, columns, args.dataset_name)
    return to_preference_pairs(
        dataset, first=first, second=second, label=args.label_column, prompt=args.prompt_column, **options
    )


def load_preference_splits(args: SLRMScriptArguments) -> tuple[Dataset, Dataset | None]:
    """The pairs to train on and the held-out pairs, if there are any, see [`load_preference_pairs`]."""
    train_dataset = load_preference_pairs(args, args.dataset_train_split)
    if args.dataset_test_split is None:
        return train_dataset, None
    return train_dataset, load_preference_pairs(args, args.dataset_test_split)


def load_function(spec: str, option: str) -> Callable:
    """
    Imports a callable. Modules of the working directory are found, too.

    Args:
        spec (`str`): `package.module:function`.
        option (`str`): Name of the option, for the error.

    Returns:
        `Callable`: The function.
    """
    module_name, _, name = spec.partition(":")
    if not name:
        raise ValueError(f"`{option}` must have the form `package.module:function`, but it is `{spec}`.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = importlib.import_module(module_name).__dict__[name]
    except ModuleNotFoundError as error:
        raise ValueError(f"`{option}`: cannot import `{spec}`: {error}.") from error
    except KeyError as error:
        raise ValueError(f"`{option}`: the module `{module_name}` has no `{name}`.") from error
    if not callable(function):
        raise ValueError(f"`{option}`: `{spec}` is a `{type(function).__name__}`, not a function.")
    return function


def load_reward_models(specs: list[str] | None) -> str | Callable | list[str | Callable]:
    """
    The reward models for [`RolloutTrainer`].

    Args:
        specs (`list[str]`, *optional*): Folders or Hub ids of SLRMs, and `package.module:function` callables.

    Returns:
        One reward model, or a list of several, to be combined with `reward_weights`.
    """
    if not specs:
        raise ValueError(
            "`reward_model` is missing: give the folder or Hub id of an SLRM (train one with `tapo-trl slrm`), or "
            "`package.module:function`."
        )
    rewards = [
        load_function(spec, "reward_model") if ":" in spec and not Path(spec).exists() else spec for spec in specs
    ]
    return rewards[0] if len(rewards) == 1 else rewards


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


def build_sample_callbacks(
    script_args: SampleCallbackArguments,
    training_args: "RolloutConfig | DiffusionDPOConfig",
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
) -> list[TrainerCallback]:
    """
    The callbacks that the flags ask for, average and samples.

    Args:
        script_args ([`SampleCallbackArguments`]): The flags.
        training_args ([`RolloutConfig`] or [`DiffusionDPOConfig`]):
            Its `resume_from_checkpoint` tells where a saved average lies.
        train_dataset ([`~datasets.Dataset`]): Training prompts.
        eval_dataset ([`~datasets.Dataset`], *optional*): Held-out prompts.

    Returns:
        `list[TrainerCallback]`: For `callbacks=`, in the order that they need.
    """
    callbacks, ema = [], None
    if script_args.ema_decay is not None:
        resume_from = training_args.resume_from_checkpoint
        is_folder = isinstance(resume_from, str) and Path(resume_from).is_dir()
        ema = EMACallback(decay=script_args.ema_decay, resume_from=resume_from if is_folder else None)
        callbacks.append(ema)
    if script_args.sample_every_steps is not None:
        if script_args.sample_prompts is not None:
            prompts = read_prompts(script_args.sample_prompts, "sample_prompts")
        else:
            prompts = (train_dataset if eval_dataset is None else eval_dataset)["prompt"]
            prompts = list(dict.fromkeys(prompts))[:8]
        callbacks.append(
            SampleGridCallback(prompts, script_args.sample_every_steps, seed=script_args.sample_seed, ema=ema)
        )
    return callbacks


def build_callbacks(
    script_args: TAPOScriptArguments,
    training_args: "RolloutConfig",
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
) -> list[TrainerCallback]:
    """[`build_sample_callbacks`], what measures gradients and, with `guard_reward`, the guard of held-out prompts."""
    callbacks = build_sample_callbacks(script_args, training_args, train_dataset, eval_dataset)
    if script_args.gradient_share_every_steps is not None:
        from ..callbacks.gradient_share import GradientShareCallback

        callbacks.append(GradientShareCallback(script_args.gradient_share_every_steps))
    if script_args.guard_reward is not None:
        if eval_dataset is None:
            raise ValueError("`guard_reward` needs held-out prompts: set `dataset_test_split` or `eval_dataset_name`.")
        callbacks.append(
            RewardHackingGuardCallback(
                load_function(script_args.guard_reward, "guard_reward"),
                eval_dataset[: script_args.guard_num_prompts]["prompt"],
                every_n_steps=script_args.guard_every_steps,
                patience=script_args.guard_patience,
                min_drop=script_args.guard_min_drop,
                action=script_args.guard_action,
            )
        )
    return callbacks


def run_training(
    trainer: "SLRMTrainer | RolloutTrainer | DiffusionDPOTrainer",
    training_args: "SLRMConfig | RolloutConfig | DiffusionDPOConfig",
    dataset_name: str | None,
) -> None:
    """
    Trains, writes the result with its model card to `output_dir` and, with `push_to_hub`, uploads it.

    Args:
        trainer ([`SLRMTrainer`], [`RolloutTrainer`] or [`DiffusionDPOTrainer`]): The trainer.
        training_args ([`SLRMConfig`], [`RolloutConfig`] or [`DiffusionDPOConfig`]): Its configuration.
        dataset_name (`str`, *optional*): Data set for the card.
    """
    trainer.dataset_name = dataset_name
    trainer.policy.unload_text_encoders()  # nothing else reads the policy that was loaded for the trainer
    trainer.train()
    trainer.save_state()
    if training_args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.save_model(training_args.output_dir)
    trainer.end()


def make_rollout_trainer(
    trainer_class: "type[RolloutTrainer]",
    script_args: TAPOScriptArguments,
    training_args: "RolloutConfig",
    model_args: DiffusionModelConfig,
) -> "RolloutTrainer":
    """
    Loads what a trainer with rollouts needs, and makes it.

    Args:
        trainer_class (`type`): A [`RolloutTrainer`].
        script_args ([`TAPOScriptArguments`]): The reward model, the held-out prompts and the callbacks.
        training_args ([`RolloutConfig`]): Its configuration.
        model_args ([`DiffusionModelConfig`]): The pipeline to align.
    """
    train_dataset, eval_dataset = load_prompt_dataset(script_args, training_args)
    reward_model = load_reward_models(script_args.reward_model)
    callbacks = build_callbacks(script_args, training_args, train_dataset, eval_dataset)

    policy = load_policy_from_args(model_args, training_args)
    return trainer_class(
        model=policy,
        reward_model=reward_model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
        peft_config=get_lora_config(model_args, policy),
    )
