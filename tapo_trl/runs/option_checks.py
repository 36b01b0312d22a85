# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Refusing options that cannot work or have no effect, before anything is loaded."""

import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import PeftConfig
from transformers import TrainingArguments
from transformers.utils import logging

from ..field_types import check_folder_name
from ..files import cache_root
from ..policies import FlowPolicy
from ..policies.loading import pop_dtype
from .hub import check_hub_strategy
from .launch_checks import uses_fsdp


logger = logging.get_logger(__name__)


def check_run(args: TrainingArguments, model: Any, trainer: str) -> None:
    """
    Check what can be checked of a run before anything is loaded, whatever the method.

    Args:
        args ([`~transformers.TrainingArguments`]): the configuration.
        model (`Any`): what the trainer got.
        trainer (`str`): name of the trainer.

    Raises:
        ValueError: if something cannot work.
    """
    check_folders(args)
    check_no_data_parallel(args, trainer)
    check_hub_strategy(args)
    check_arguments_of_trainer(args, model)
    check_precision(args)


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


def autocast_dtype(args: TrainingArguments) -> torch.dtype | None:
    """The half precision that a configuration asks for, `None` if it asks for none."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def check_precision(
    args: TrainingArguments, policy: FlowPolicy | None = None, torch_dtype: torch.dtype | str | None = None
) -> None:
    """
    Check that no network is in another half precision than that of `args`: autocast cannot mix them.

    Args:
        args ([`~transformers.TrainingArguments`]): the configuration, with `model_init_kwargs`.
        policy ([`FlowPolicy`], *optional*): what was loaded. Without it, only what is asked for is looked at.
        torch_dtype (`torch.dtype` or `str`, *optional*): what is asked for where `args` says nothing.

    Raises:
        ValueError: if one is. The VAE may be, for it computes outside of autocast.
    """
    if policy is None:
        kwargs = dict(args.model_init_kwargs or {})
        name = "torch_dtype" if kwargs.get("dtype") is None else "dtype"
        dtype = pop_dtype(kwargs)
        asked = f"`{name}`" if dtype is None else f"`{name}` in `model_init_kwargs`"
        dtype = dtype or torch_dtype
        if isinstance(dtype, dict):
            found = {f"`{part}` of {asked}": value for part, value in dtype.items() if part != "vae"}
        else:
            found = {asked: dtype}
    else:
        names = [name for name in policy.text_encoder_names if policy.pipeline.components[name] is not None]
        components = {name: policy.pipeline.components[name] for name in ("transformer", *names)}
        found = {f"the `{name}` of `model`": component.dtype for name, component in components.items()}
    own = autocast_dtype(args)
    if own is None:
        return
    for name, dtype in found.items():
        if dtype in (torch.bfloat16, torch.float16) and dtype != own:
            raise ValueError(
                f"`{'bf16' if args.bf16 else 'fp16'}=True` computes in {own}, but {name} is {str(dtype).removeprefix('torch.')}, "
                f"which cannot be mixed with it: load `model` in {str(own).removeprefix('torch.')} or float32, or set "
                + ("`fp16=True` and `bf16=False`." if args.bf16 else "`bf16=True` and `fp16=False`.")
            )


def check_speed_options(args: TrainingArguments, peft_config: PeftConfig | None) -> None:
    """
    Refuse what cannot work, before anything is loaded.

    Raises:
        ValueError: if an option has nothing to act on, or if two of them exclude each other.
    """
    if args.layerwise_casting and peft_config is None:
        raise ValueError(
            "`layerwise_casting=True` needs LoRA: weights in float8 cannot be trained. Pass a `peft_config`."
        )
    if args.layerwise_casting and uses_fsdp(args):
        raise ValueError("`layerwise_casting=True` and FSDP exclude each other: its shards have no buffers. Use DDP.")
    for option in ("reward_layerwise_casting", "reward_group_offload"):
        if args.torch_compile and getattr(args, option):
            raise ValueError(
                f"`torch_compile=True` and `{option}=True` exclude each other: the latter moves weights between the layers of a "
                "block, which is one program when it is compiled."
            )


def check_folders(args: TrainingArguments) -> None:
    """[`check_writable`] of the folders that a run writes to."""
    check_writable(args.output_dir)
    check_writable(cache_root(args.cache_dir), "cache_dir")


def check_writable(folder: str | Path, option: str = "output_dir") -> None:
    """Make the folder that an option names, or say why it can't be written to."""
    check_folder_name(folder, option)
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`{option}={folder}` cannot be created: {error}.") from error
    if not os.access(path, os.W_OK):
        raise ValueError(f"`{option}={folder}` is not writable.")


def check_no_data_parallel(args: TrainingArguments, trainer: str) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"`{trainer}` does not run under `torch.nn.DataParallel`. Start it with `accelerate launch`, or show it a "
            "single GPU with `CUDA_VISIBLE_DEVICES`."
        )
