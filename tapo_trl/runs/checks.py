# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What is refused before anything is loaded: options that cannot work or have no effect, and launches that do not fit them."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from diffusers import DiffusionPipeline
from peft import PeftConfig
from transformers import TrainingArguments
from transformers.utils import logging

from ..files import cache_root, check_folder_name
from ..policies import FlowPolicy
from ..policies.loading import pop_dtype
from .hub import check_hub_strategy


logger = logging.get_logger(__name__)

# Transformers fills these in from `config.hidden_size`, which diffusion transformers do not have.
_SIZED_BY_HIDDEN_SIZE = (
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
)


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


def check_train_cfg(args: TrainingArguments, policy: FlowPolicy) -> None:
    """
    Check that `train_cfg=False` has an effect: that there is classifier-free guidance.

    Args:
        args ([`TAPOConfig`] or [`FlowGRPOConfig`]): the configuration.
        policy ([`FlowPolicy`]): says which guidance scale is none.

    Raises:
        ValueError: if it has none.
    """
    if policy.guidance == "classifier_free" and not policy.is_guided(args.guidance_scale):
        check_without_effect(args, ["train_cfg"], f"without guidance (`guidance_scale={args.guidance_scale:g}`)")


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
        components = policy.experts | {name: policy.pipeline.components[name] for name in names}
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


# The launcher against the training configuration: most of what can differ between the two fails late, or not at all. A run that is
# silently on one process, unclipped or not sharded looks like any other.


def check_launch(
    args: TrainingArguments, num_rows: int | None = None, environment: Mapping[str, str] = os.environ
) -> None:
    """
    Compare the settings of accelerate, DeepSpeed, FSDP and the launcher to the configuration, before anything is loaded.

    Args:
        args ([`~transformers.TrainingArguments`]): the configuration.
        num_rows (`int`, *optional*): rows of the train dataset.
        environment (`Mapping[str, str]`, *optional*): what the launcher left; the process's own by default.

    Raises:
        ValueError: with all problems at once, each with its fix.
    """
    problems = [
        *_process_problems(args, environment),
        *_precision_problems(args, environment),
        *_batch_problems(args, num_rows),
        *_deepspeed_problems(args),
        *_fsdp_problems(args, environment),
    ]
    if problems:
        raise ValueError("\n- ".join(["The launch does not fit the training configuration:", *problems]))


def _process_problems(args: TrainingArguments, environment: Mapping[str, str]) -> list[str]:
    started = int(environment.get("WORLD_SIZE", 1))
    if started != args.world_size:
        return [
            f"The launcher started {started} processes, but each of them believes that they are {args.world_size}. On "
            "CPUs, set `use_cpu: true` in the training configuration too: launchers do not pass theirs on."
        ]
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1 and started == 1:
        return [
            f"Slurm started {tasks} tasks that do not know of each other. Start one task per machine "
            "(`--ntasks-per-node=1`), and in it `accelerate launch` or `torchrun`, which start a process per GPU."
        ]
    return []


def _precision_problems(args: TrainingArguments, environment: Mapping[str, str]) -> list[str]:
    launched = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    configured = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    if launched in ("no", configured):
        return []
    return [
        f"`mixed_precision` is {launched!r} in the accelerate configuration, but the training configuration says "
        f"`bf16: {str(args.bf16).lower()}`, `fp16: {str(args.fp16).lower()}`. Leave the former at 'no'."
    ]


def _batch_problems(args: TrainingArguments, num_rows: int | None) -> list[str]:
    global_batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    if num_rows is None or args.world_size == 1 or num_rows >= global_batch:
        return []
    return [
        f"A batch of {global_batch} rows ({args.world_size} processes x `per_device_train_batch_size` "
        f"{args.train_batch_size} x `gradient_accumulation_steps` {args.gradient_accumulation_steps}) is more than the "
        f"dataset has ({num_rows}): rows would be repeated within a batch. Use fewer processes, or lower one of the two."
    ]


def _deepspeed_problems(args: TrainingArguments) -> list[str]:
    if args.deepspeed_plugin is None:
        return []
    config = args.deepspeed_plugin.deepspeed_config
    expected = {
        "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", args.per_device_train_batch_size),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", args.gradient_accumulation_steps),
        "gradient_clipping": ("max_grad_norm", args.max_grad_norm),
        "bf16.enabled": ("bf16", args.bf16),
        "fp16.enabled": ("fp16", args.fp16),
    }
    problems = []
    for key, (name, value) in expected.items():
        found = _get(config, key)
        if found is not None and found != "auto" and found != value:
            problems.append(
                f"DeepSpeed's `{key}` is {found}, but `{name}` is {value}. Leave the former out, or set it to 'auto'."
            )
    if "gradient_clipping" not in config and args.max_grad_norm:
        problems.append(
            f"DeepSpeed would not clip gradients, although `max_grad_norm` is {args.max_grad_norm}: its configuration has "
            "no `gradient_clipping`. Set that to 'auto'."
        )
    zero = config.get("zero_optimization", {})
    for key in _SIZED_BY_HIDDEN_SIZE:
        if zero.get(key) == "auto":
            problems.append(
                f"DeepSpeed's `{key}` cannot be 'auto': it follows from `hidden_size`, which diffusion transformers do "
                "not have. Leave it out, or give a number."
            )
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        problems.append(
            "Under ZeRO-3 the trained weights would not be written. Set `zero3_save_16bit_model: true` in the accelerate "
            "configuration, or `stage3_gather_16bit_weights_on_model_save` in DeepSpeed's own."
        )
    return problems


def _get(config: dict[str, Any], key: str) -> Any:
    *sections, name = key.split(".")
    for section in sections:
        config = config.get(section, {})
    return config.get(name)


def check_dynamo_backend(environment: Mapping[str, str] = os.environ) -> None:
    """
    Raises:
        ValueError: if the launcher is set to compile the whole network.
    """
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ValueError(
            "The accelerate configuration has a `dynamo_backend`, which compiles the policy but not its reference: set it to "
            "'no', and `torch_compile: true` in the training configuration."
        )


def uses_fsdp(args: TrainingArguments, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher or the configuration asks for FSDP."""
    return bool(args.fsdp) or environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _fsdp_problems(args: TrainingArguments, environment: Mapping[str, str]) -> list[str]:
    if not uses_fsdp(args, environment):
        return []
    problems = []
    if args.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        problems.append(
            "FSDP was asked for, but accelerate shards nothing on one process or on CPUs. Use several GPUs, or another "
            "configuration."
        )
    state_dict_type = (
        str(args.fsdp_plugin_args["state_dict_type"]) if args.fsdp else environment.get("FSDP_STATE_DICT_TYPE", "")
    )
    if "FULL_STATE_DICT" not in state_dict_type:
        problems.append(
            f"With `fsdp_state_dict_type: {state_dict_type or 'SHARDED_STATE_DICT'}` the trained weights would not be "
            "written. Set it to FULL_STATE_DICT."
        )
    return problems
