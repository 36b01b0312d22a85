# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Refusing options that cannot act."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import TrainingArguments
from transformers.utils import logging


logger = logging.get_logger(__name__)


def check_without_effect(args: TrainingArguments, names: Iterable[str], reason: str) -> None:
    """
    Check that options that have no effect are at their defaults.

    Args:
        args ([`~transformers.TrainingArguments`]): the configuration.
        names (`Iterable[str]`): its fields.
        reason (`str`): why they have none, as the end of a sentence.

    Raises:
        ValueError: if one has another value.
    """
    defaults = {own.name: own.default for own in fields(args)}
    for name in names:
        value = getattr(args, name)
        if value != defaults[name]:
            raise ValueError(f"`{name}={value!r}` has no effect {reason}: leave it unset ({defaults[name]!r}).")


def check_arguments_of_trainer(args: TrainingArguments, model: Any) -> None:
    """
    Check what depends on the trainer's `model`, and options of `Trainer` that something here replaces.

    Args:
        args ([`~transformers.TrainingArguments`]): the configuration.
        model (`Any`): what the trainer got.

    Raises:
        ValueError: if an option would have no effect.
    """
    if isinstance(model, DiffusionPipeline):
        check_without_effect(args, ["model_init_kwargs"], "because `model` is a pipeline that is loaded already")
    check_without_effect(
        args,
        ["enable_jit_checkpoint"],
        "because on SIGTERM these trainers save a checkpoint and stop in any case, at the end of the step",
    )


def check_optimizer(optimizer: torch.optim.Optimizer | None, model: torch.nn.Module) -> None:
    """
    Check that an optimizer that the trainer got updates what is trained. Warns if it does so in part.

    Args:
        optimizer (`torch.optim.Optimizer`, *optional*): the optimizer.
        model (`torch.nn.Module`): the network, ready for training.

    Raises:
        ValueError: if it holds none of the trainable weights.
    """
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    missing = [name for name in names if id(model.get_parameter(name)) not in held]
    if len(missing) == len(names):
        raise ValueError(
            "The optimizer in `optimizers` holds none of the weights that are trained: LoRA matrices and new heads are made by the "
            "trainer, after it. Leave `optimizers` out and choose with `optim`, `learning_rate` and the like in `args`; or set "
            "`trainer.optimizer` afterwards, with the parameters of `trainer.model`."
        )
    if missing:
        logger.warning(
            f"The optimizer in `optimizers` holds {len(names) - len(missing)} of the {len(names)} weights that are trained: the "
            f"others, such as `{missing[0]}`, stay as they are."
        )
