# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Loading what [`SLRMTrainer`] trains: a base policy and a new reward model on it, or one whose training goes on."""

import os
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from peft import LoraConfig

from ..files import local_file
from ..policies import FlowPolicy, load_policy
from ..policies.experts import EXPERTS
from ..policies.loading import only_hub_arguments, pop_dtype
from ..rewards import REWARD_MODELS, LatentRewardModel, StepRewardModel, load_reward_model
from ..runs.checks import autocast_dtype, uses_fsdp
from .policy_setup import check_no_adapter, check_not_parallel
from .slrm_config import MODEL_FIELDS, SLRMConfig


def check_engine(model: StepRewardModel, args: SLRMConfig) -> None:
    """
    Raises:
        ValueError: if the engine of the launch cannot train such a reward model.
    """
    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    if scalars and (uses_fsdp(args) or args.deepspeed_plugin is not None):
        raise ValueError(
            f"This {model.label} has a weight without dimensions, its temperature `{scalars[0]}`, which neither DeepSpeed nor "
            "FSDP can distribute: use DDP."
        )


def load_base_and_reward_model(
    model: str | DiffusionPipeline | FlowPolicy | StepRewardModel, args: SLRMConfig, peft_config: LoraConfig | None
) -> tuple[FlowPolicy, StepRewardModel]:
    """The base policy and the reward model to train."""
    init_kwargs = dict(args.model_init_kwargs or {})
    dtype = pop_dtype(init_kwargs)
    if dtype is None and peft_config is not None:
        dtype = autocast_dtype(args)  # a base that LoRA keeps frozen is loaded in the precision it is used in

    if isinstance(model, str):
        hub_arguments = only_hub_arguments(init_kwargs)
        model = os.path.expanduser(model)
        if is_reward_model(model, init_kwargs.get("subfolder"), **hub_arguments):
            if not os.path.isdir(model):
                init_kwargs.pop("revision", None)  # that of the reward model: the base has its own
            if "subfolder" in init_kwargs:
                hub_arguments["subfolder"] = init_kwargs.pop("subfolder")
            model = load_reward_model(model, torch_dtype=dtype, **hub_arguments)
    if isinstance(model, StepRewardModel):
        if model.kind != args.reward_model_type:
            raise ValueError(
                f"`model` is a {model.label}, but `reward_model_type={args.reward_model_type!r}`: set "
                f"`reward_model_type={model.kind!r}`."
            )
        args.fill_in(model.config)
        if not model.config.base_model_name_or_path:
            raise ValueError(
                f"The {model.label} was made from a pipeline in memory, so its base model cannot be loaded: pass the pipeline "
                f"or the policy as `model`, with {', '.join(f'`{name}`' for name in MODEL_FIELDS[model.kind])} in `args`."
            )
        policy = load_policy(
            model.config.base_model_name_or_path, torch_dtype=dtype, **model.base_files() | init_kwargs
        )
        policy = choose_expert(policy, args.expert, model.config)
        model.check_compatible(policy)
        if isinstance(model, LatentRewardModel):
            model.check_base(policy.transformer)
        return policy, model

    args.fill_in()
    policy = choose_expert(load_policy(model, torch_dtype=dtype, **init_kwargs), args.expert)
    check_no_adapter(policy)
    check_not_parallel(policy)
    reward_model = REWARD_MODELS[args.reward_model_type].from_policy(
        policy, max_sequence_length=args.max_sequence_length or policy.max_sequence_length, **args.model_config()
    )
    return policy, reward_model


def choose_expert(
    policy: FlowPolicy, expert: str | None = None, recorded: Mapping[str, Any] | None = None
) -> FlowPolicy:
    """
    The policy of the one transformer that a reward model starts from.

    Args:
        policy ([`FlowPolicy`]): what was loaded, which may have two.
        expert (`str`, *optional*): see [`SLRMConfig`].
        recorded (`Mapping`, *optional*): configuration of the reward model, if there is one already.

    Raises:
        ValueError: if there is no such choice.
    """
    subfolder = (recorded or {}).get("base_subfolder")
    if subfolder is not None and len(policy.experts) > 1:
        made_of = next(name for name, component in EXPERTS.items() if component == subfolder)
        if expert not in (None, made_of):
            raise ValueError(
                f"`expert={expert!r}`, but the reward model in `model` was made of the expert `{made_of}`."
            )
        expert = made_of
    return policy if expert is None else policy.only(expert)


def is_reward_model(name_or_path: str, subfolder: str | None = None, **hub_arguments) -> bool:
    """
    Whether a folder or a repository on the Hub holds a reward model rather than a pipeline.

    Raises:
        ValueError: if there is neither, or no such folder or repository.
    """
    for filename, answer in ((DiffusionPipeline.config_name, False), (StepRewardModel.config_name, True)):
        try:
            file = local_file(name_or_path, filename, subfolder, **hub_arguments)
        except EntryNotFoundError:  # also if it is not in the cache, without a network
            continue
        except HFValidationError as error:
            raise ValueError(
                f"There is no folder {name_or_path}, and it cannot be the name of a repository."
            ) from error
        if not os.path.isdir(name_or_path) or os.path.isfile(file):
            return answer
    raise ValueError(
        f"`model`: neither a pipeline (`{DiffusionPipeline.config_name}`) nor a reward model (`{StepRewardModel.config_name}`) "
        f"was found in {name_or_path}, a folder or a repository on the Hub. Without a network it must be in the cache "
        "(`cache_dir` in `model_init_kwargs`)."
    )
