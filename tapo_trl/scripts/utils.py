# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Arguments of the training scripts, and what the scripts make of them."""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..callbacks.ema import EMACallback
from ..callbacks.gradient_share import GradientShareCallback
from ..callbacks.reward_guard import RewardHackingGuardCallback
from ..callbacks.samples import SampleGridCallback
from ..data import default_prompts
from ..data.loading import PreferenceDatasetArguments, load_preference_pairs, load_prompts, load_samples, read_prompts
from ..field_types import option, read_mapping
from ..policies.loading import pop_dtype
from ..rewards import RemoteReward, get_reward, list_rewards
from ..rewards.pretrained import check_reward_name, is_reward_name
from ..trainer.model_config import DiffusionModelConfig


HUMAN = "human"  # the reward of live votes, which only online DPO can wait for


@dataclass
class DryRunArguments:
    """Options of all training commands for dry runs."""

    dry_run: bool = option(
        "Print shapes, tokens, parameters, forwards and an estimate of the memory, and stop.", False
    )
    device_memory: float | None = option(
        "Memory of the device in GiB. The dry run then says how large chunks may be, with and without recomputation of "
        "activations."
    )

    def __post_init__(self):
        if self.device_memory is not None and not self.dry_run:
            raise ValueError(
                f"`device_memory={self.device_memory:g}` has no effect without `dry_run=True`: leave it unset. A training takes "
                "what its options need."
            )
        if self.device_memory is not None and not 0 < self.device_memory < float("inf"):
            raise ValueError(f"`device_memory` must be a positive number of GiB, got {self.device_memory}.")


@dataclass
class SLRMScriptArguments(PreferenceDatasetArguments, DryRunArguments):
    """Arguments of `tapo-trl slrm` beside [`SLRMConfig`] and [`DiffusionModelConfig`]."""

    dataset_train_split: str = option(
        "Split to train on; slices such as `train[:90%%]` work for files and Hub datasets.", "train"
    )

    def __post_init__(self):
        super().__post_init__()
        DryRunArguments.__post_init__(self)
        if self.dataset_name is None:
            raise ValueError("`dataset_name` is missing: give the Hub id, folder or file of the preference pairs.")


@dataclass
class SampleCallbackArguments:
    """Callbacks that show a policy while it is trained: [`SampleGridCallback`] and [`EMACallback`]."""

    sample_every_steps: int | None = option("Draw fixed prompts (a grid, or videos) every so many optimizer steps.")
    sample_prompts: list[str] | None = option(
        "Prompts of the grid, or the path of one .txt file. The default is the first eight held-out prompts, or the first "
        "eight training prompts if none are held out."
    )
    sample_seed: int = option("Seed of the first cell of the grid.", 0)
    ema_decay: float | None = option(
        "Keep an average of the trained weights with this decay; the grid is drawn with it."
    )


@dataclass
class DPOScriptArguments(SampleCallbackArguments, SLRMScriptArguments):
    """
    Arguments of `tapo-trl dpo` beside [`DiffusionDPOConfig`] and [`DiffusionModelConfig`]: those of
    [`SLRMScriptArguments`], which describe the pairs, and those of [`SampleCallbackArguments`].
    """


@dataclass
class SFTScriptArguments(SampleCallbackArguments, DryRunArguments):
    """Arguments of `tapo-trl sft` beside [`DiffusionSFTConfig`] and [`DiffusionModelConfig`]: where the samples are."""

    dataset_name: str | None = option(
        "Hub id, folder, or .parquet, .json, .jsonl or .csv file of images or videos with prompts."
    )
    dataset_config: str | None = option("Configuration of a dataset on the Hub.")
    dataset_train_split: str = option(
        "Split to train on; slices such as `train[:90%%]` work for files and Hub datasets.", "train"
    )
    dataset_test_split: str | None = option("Split of held-out samples.")
    prompt_column: str = option("Column of the prompts.", "prompt")
    media_column: str | None = option("Column of the images or videos. `image` or `video` by default.")
    media_root: str | None = option("Folder that relative paths of images and videos start from.")

    def __post_init__(self):
        super().__post_init__()
        if self.dataset_name is None:
            raise ValueError("`dataset_name` is missing: give the Hub id, folder or file of the images or videos.")


@dataclass
class TAPOScriptArguments(SampleCallbackArguments, DryRunArguments):
    """
    Arguments of `tapo-trl tapo`, `online_dpo` and `grpo` beside the configuration of the trainer (which has `dataset_name` and
    `dataset_split`) and [`DiffusionModelConfig`]: prompts, rewards and callbacks.
    """

    dataset_config: str | None = option("Configuration of a dataset on the Hub.")
    dataset_test_split: str | None = option("Split of held-out prompts.")
    eval_dataset_name: str | None = option("Dataset of held-out prompts, when it is not a split of `dataset_name`.")
    prompt_column: str = option("Column of the prompts. The lines of a .txt file are prompts.", "prompt")
    reward_model: list[str] | None = option(
        "Name of a pretrained reward (`tapo-trl rewards` lists them), Hub id or folder of a reward model, "
        "`package.module:function`, or the address of a reward server; several are combined with `reward_weights`."
    )
    guard_reward: str | None = option(
        "A held-out reward that must not fall while the training reward rises: name of a pretrained reward, or "
        "`package.module:function`."
    )
    guard_reward_init_kwargs: dict[str, Any] | str | None = option(
        "Keyword arguments of the `guard_reward`, if it is a pretrained reward."
    )
    guard_every_steps: int = option("Optimizer steps between two checks of the guard.", 50)
    guard_num_prompts: int = option("Number of held-out prompts that the guard scores.", 32)
    guard_patience: int = option("Number of bad checks in a row before the guard acts.", 2)
    guard_min_drop: float = option("Minimum drop of the held-out reward that makes a check bad.", 0.0)
    guard_action: Literal["warn", "stop"] = option("What the guard does: warn, or stop the training.", "warn")
    gradient_share_every_steps: int | None = option(
        "Measure the share of each stochastic step in the gradient every so many optimizer steps."
    )

    def __post_init__(self):
        super().__post_init__()
        read_mapping(self, "guard_reward_init_kwargs")
        if self.guard_reward_init_kwargs and (self.guard_reward is None or is_function(self.guard_reward)):
            raise ValueError(
                "`guard_reward_init_kwargs` is for a `guard_reward` that is a pretrained reward: leave it unset."
            )


def load_prompt_dataset(
    script_args: TAPOScriptArguments, training_args: TrainingArguments
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
                "`dataset_test_split` is set, but neither `eval_dataset_name` nor `dataset_name` says of which dataset."
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


def load_preference_splits(args: SLRMScriptArguments, evaluates: bool = True) -> tuple[Dataset, Dataset | None]:
    """
    The pairs to train on and the held-out pairs, see [`load_preference_pairs`]. The latter are `None` if there are none, or if
    nothing `evaluates` them: then the dataset needs no such split.
    """
    train_dataset = load_preference_pairs(args, args.dataset_train_split)
    if args.dataset_test_split is None or not evaluates:
        return train_dataset, None
    return train_dataset, load_preference_pairs(args, args.dataset_test_split)


def load_sample_splits(args: SFTScriptArguments, training_args: TrainingArguments) -> tuple[Dataset, Dataset | None]:
    """The samples to train on and the held-out samples, if there are any, with the columns that [`DiffusionSFTTrainer`] reads."""
    column = "image" if training_args.num_frames is None else "video"
    train_dataset = load_samples(args, args.dataset_train_split, column)
    if args.dataset_test_split is None:
        if training_args.eval_strategy != "no":
            raise ValueError(
                "`eval_strategy` asks for evaluations, but no samples are held out: set `dataset_test_split`, or "
                '`eval_strategy: "no"`.'
            )
        return train_dataset, None
    return train_dataset, load_samples(args, args.dataset_test_split, column)


def model_init_kwargs(model_args: DiffusionModelConfig, training_args: TrainingArguments) -> dict[str, Any]:
    """Loading arguments of the pipeline. `model_init_kwargs` of the configuration take precedence."""
    kwargs = dict(training_args.model_init_kwargs or {})
    if pop_dtype(dict(kwargs)) is None:
        kwargs["torch_dtype"] = model_args.torch_dtype
    if model_args.model_revision is not None:
        kwargs.setdefault("revision", model_args.model_revision)
    return kwargs


def load_function(spec: str, option: str) -> Callable:
    """
    Imports a callable. Modules of the working directory are found, too. An address is a [`RemoteReward`].

    Args:
        spec (`str`): `package.module:function`, or `http://127.0.0.1:8100`.
        option (`str`): Name of the option, for the error.

    Returns:
        `Callable`: The function.
    """
    if spec.startswith(("http://", "https://")):
        return RemoteReward(spec)
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


def load_reward_models(
    specs: list[str] | None, human: Callable | None = None
) -> str | Callable | list[str | Callable]:
    """
    The reward models for [`RolloutTrainer`].

    Args:
        specs (`list[str]`, *optional*): Names of pretrained rewards, folders or Hub ids of reward models, and
            `package.module:function` callables.
        human (`Callable`, *optional*): What the word `human` stands for, live votes. Only online DPO can wait for them.

    Returns:
        One reward model, or a list of several, to be combined with `reward_weights`.
    """
    if not specs:
        raise ValueError(
            "`reward_model` is missing: give the folder or Hub id of an SLRM (train one with `tapo-trl slrm`), the name of a "
            "pretrained reward (`tapo-trl rewards` lists them), or `package.module:function`."
        )
    rewards = [human if spec == HUMAN and human is not None else load_functions([spec])[spec] for spec in specs]
    return rewards[0] if len(rewards) == 1 else rewards


def load_functions(specs: list[str]) -> dict[str, str | Callable]:
    """Rewards by what they are called on the command line, functions imported and other names checked."""
    rewards = {}
    for spec in specs:
        if spec == HUMAN:
            raise ValueError(
                "`human`, live votes on the samples, is a reward of `tapo-trl online_dpo` alone, and of no dry run. A folder of that name is "
                "`./human`."
            )
        rewards[spec] = load_function(spec, "reward_model") if is_function(spec) else spec
        if not is_function(spec):
            check_reward_name(spec)
    return rewards


def is_function(spec: str) -> bool:
    """Whether a reward is given as `package.module:function`, or as an address."""
    return ":" in spec and not Path(spec).exists()


def load_guard_reward(spec: str, init_kwargs: dict[str, Any] | None = None) -> Callable:
    """A reward of images or videos for [`RewardHackingGuardCallback`], on the accelerator while it is called."""
    if is_function(spec):
        return load_function(spec, "guard_reward")
    if is_reward_name(spec):
        return get_reward(spec, **{"offload": True} | (init_kwargs or {}))
    raise ValueError(
        f"`guard_reward` must be a function, `package.module:function`, or one of {', '.join(list_rewards())}, but it is "
        f"`{spec}`."
    )


def build_sample_callbacks(
    script_args: SampleCallbackArguments,
    training_args: TrainingArguments,
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
    training_args: TrainingArguments,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
) -> list[TrainerCallback]:
    """[`build_sample_callbacks`], what measures gradients and, with `guard_reward`, the guard of held-out prompts."""
    callbacks = build_sample_callbacks(script_args, training_args, train_dataset, eval_dataset)
    if script_args.gradient_share_every_steps is not None:
        callbacks.append(GradientShareCallback(script_args.gradient_share_every_steps))
    if script_args.guard_reward is not None:
        if eval_dataset is None:
            raise ValueError("`guard_reward` needs held-out prompts: set `dataset_test_split` or `eval_dataset_name`.")
        callbacks.append(
            RewardHackingGuardCallback(
                load_guard_reward(script_args.guard_reward, script_args.guard_reward_init_kwargs),
                eval_dataset[: script_args.guard_num_prompts]["prompt"],
                every_n_steps=script_args.guard_every_steps,
                patience=script_args.guard_patience,
                min_drop=script_args.guard_min_drop,
                action=script_args.guard_action,
            )
        )
    return callbacks


def save_or_push(trainer: Trainer) -> None:
    """Write the model, its card and the state of the training to `output_dir` and, with `push_to_hub`, upload them."""
    trainer.save_state()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.save_model()
