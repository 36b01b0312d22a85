# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
What the launcher was told against what the training configuration says. Most of what can differ between the two fails
late, or not at all: a run that is silently on one process, unclipped or not sharded looks like any other.
"""

import os
from collections.abc import Mapping
from typing import Any

from accelerate.utils import DistributedType
from transformers import TrainingArguments


# Transformers fills these in from `config.hidden_size`, which diffusion transformers do not have.
_SIZED_BY_HIDDEN_SIZE = (
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
)


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
