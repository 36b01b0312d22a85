# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""Reward models of states of a trajectory by the word for them, and from where they were saved."""

import os
from collections.abc import Sequence
from typing import Any

from .dina import DiNaModel
from .dina_released import is_released_dina, load_released_dina
from .lrm import LRMModel
from .slrm import SLRMModel
from .spm import SPMModel
from .step_reward import HUB_ARGUMENTS, StepRewardModel


REWARD_MODELS: dict[str, type[StepRewardModel]] = {
    "slrm": SLRMModel,
    "lrm": LRMModel,
    "dina": DiNaModel,
    "spm": SPMModel,
}


def load_reward_model(name_or_path: str | os.PathLike, **kwargs) -> StepRewardModel:
    """
    Load a saved reward model, of whichever kind it is, or a DiNa-LRM as its authors publish it, see
    [`~rewards.dina_released.load_released_dina`].

    Args:
        name_or_path (`str` or `os.PathLike`): folder or Hub id.
        kwargs: arguments of [`~StepRewardModel.from_pretrained`], such as `torch_dtype`, `base_model` or `revision`.

    Returns:
        [`StepRewardModel`]: in evaluation mode.

    Raises:
        ValueError: if it contains no reward model.
    """
    name_or_path = os.path.expanduser(name_or_path)
    hub_arguments = {name: value for name, value in kwargs.items() if name in HUB_ARGUMENTS}
    config = StepRewardModel.load_config(name_or_path, **hub_arguments)
    if is_released_dina(config):
        return load_released_dina(name_or_path, config, **kwargs)
    return saved_class(name_or_path, **hub_arguments).from_pretrained(name_or_path, **kwargs)


def init_kwargs_of(name: str, init_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """
    Keyword arguments with which one of several reward models is loaded.

    Args:
        name (`str`): what it is called in the list of reward models.
        init_kwargs (`dict[str, Any]`, *optional*): those for all, and under a name those for the one of that name alone.
    """
    init_kwargs = init_kwargs or {}
    for_all = {key: value for key, value in init_kwargs.items() if not isinstance(value, dict)}
    return for_all | init_kwargs.get(name, {})


def check_init_kwargs(names: Sequence[str], init_kwargs: dict[str, Any] | None) -> None:
    """
    Raises:
        ValueError: if there are arguments for a reward model that is not in the list.
    """
    for name, value in (init_kwargs or {}).items():
        if isinstance(value, dict) and name not in names:
            raise ValueError(
                f"`reward_model_init_kwargs` has arguments for `{name}`, but `reward_model` is {list(names)}: write the name as "
                "it is there."
            )


def saved_class(name_or_path: str | os.PathLike, **hub_arguments) -> type[StepRewardModel]:
    """
    The class of a saved reward model, as its `config.json` says.

    Raises:
        ValueError: if it contains no reward model.
    """
    config = StepRewardModel.load_config(name_or_path, **hub_arguments)
    if is_released_dina(config):
        raise ValueError(
            f"`{name_or_path}` holds a DiNa-LRM as its authors publish it, which this option cannot read: convert it once with "
            "`load_reward_model(...).save_pretrained(folder)`, and name that folder."
        )
    name = config.get("_class_name")
    classes = {model_class.__name__: model_class for model_class in REWARD_MODELS.values()}
    if not isinstance(name, str) or name not in classes:
        raise ValueError(f"`{name_or_path}` holds a `{name}`, which is no reward model: those are {sorted(classes)}.")
    return classes[name]
