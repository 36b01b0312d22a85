# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The frozen rewards of an online trainer: checks, loading, sharing of weights, and options that save memory."""

import itertools
from collections.abc import Sequence
from dataclasses import fields

import torch
from datasets import Dataset
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from peft import PeftConfig
from transformers import TrainerCallback

from ..data.prompts import ROW_COLUMN
from ..networks.compilation import compile_blocks
from ..networks.sharing import base_tensors, check_base_stays, check_same, saved_tensors, share_parameters
from ..policies import FlowPolicy
from ..policies.loading import only, pop_dtype
from ..rewards import LatentRewardModel, PretrainedReward, StepRewardModel, get_reward, load_reward_model
from ..rewards.loading import check_init_kwargs, init_kwargs_of, saved_class
from ..rewards.pretrained import check_reward_name, is_reward_name, reward_class
from ..rewards.scoring import EstimateReward, LatentReward, PixelReward, RewardFunction, check_reward_function
from ..rewards.step_reward import BASE_ARGUMENTS, HUB_ARGUMENTS
from ..runs.checks import autocast_dtype, uses_fsdp
from .rollout_config import RolloutConfig


RewardModel = str | StepRewardModel | RewardFunction

# Beside norms and embeddings, which diffusers leaves alone: the score stream and LoRA matrices keep their precision.
SCORE_LAYERS = ("score_projections", "score_output", "score_head", "lora_")


def _is_latent(reward: RewardModel) -> bool:
    """Whether it is a latent reward model, or may be one: what a folder holds is known once it is loaded."""
    return not is_reward_name(reward) if isinstance(reward, str) else isinstance(reward, LatentRewardModel)


def check_rewards(rewards: Sequence[RewardModel], args: RolloutConfig) -> None:
    """
    Refuse what cannot work, before anything is loaded.

    Raises:
        ValueError: if there is none, or not as many as weights, if a reward is neither a name, a reward model nor a callable,
            or if an option for latent reward models has nothing to act on.
    """
    if not rewards:
        raise ValueError("`reward_model` is an empty list: give at least one.")
    if args.reward_weights is not None and len(args.reward_weights) != len(rewards):
        raise ValueError(f"`reward_weights` has {len(args.reward_weights)} entries for {len(rewards)} reward models.")
    for reward in rewards:
        if not isinstance(reward, (str, StepRewardModel)) and not callable(reward):
            raise ValueError(
                "`reward_model` must be a folder or Hub id, a reward model such as `SLRMModel`, or a callable, got "
                f"`{type(reward).__name__}`."
            )
        if isinstance(reward, str):
            check_reward_name(reward)
    has_latent = any(map(_is_latent, rewards))
    for option in ("reward_layerwise_casting", "reward_group_offload", "score_estimates"):
        if getattr(args, option) and not has_latent:
            raise ValueError(
                f"`{option}=True` is for SLRMs and other latent reward models, but every `reward_model` is a function: leave it "
                "unset."
            )
    if not has_latent and args.velocity_target not in (None, "none"):
        raise ValueError(
            f"`velocity_target={args.velocity_target!r}` is for SLRMs, whose velocity is compared with it, but every "
            "`reward_model` is a function: leave it unset."
        )
    _check_target_stays(args.velocity_target, args)
    if args.reward_model_init_kwargs:
        names = [reward for reward in rewards if isinstance(reward, str)]
        if not names:
            raise ValueError("`reward_model_init_kwargs` is for reward models that are loaded by name, but none is.")
        check_init_kwargs(names, args.reward_model_init_kwargs)
    if args.reward_group_offload and args.device.type == "cpu":
        raise ValueError(
            "`reward_group_offload=True` keeps the reward model on the CPU and lends its blocks to an accelerator, but this run is "
            "on the CPU: leave it unset."
        )


def _check_target_stays(velocity_target: str | None, args: RolloutConfig) -> None:
    if args.sync_ref_model and velocity_target == "reference":
        raise ValueError(
            '`sync_ref_model=True` changes the reference, but the SLRM\'s `velocity_target="reference"` is the base model that it '
            'was trained with: leave `sync_ref_model` unset, or set another `velocity_target`, such as "parent".'
        )


def check_reward_functions(rewards: Sequence[RewardModel], datasets: Sequence[Dataset | None]) -> None:
    """
    Check that reward functions take the columns of every dataset of prompts, see [`~rewards.scoring.check_reward_function`],
    and that pretrained scorers can rate the prompts.

    Raises:
        ValueError: if one does not.
    """
    for reward, dataset in itertools.product(rewards, datasets):
        if dataset is None or isinstance(reward, StepRewardModel):
            continue
        if isinstance(reward, str):
            if not is_reward_name(reward):
                continue
            scorer = reward_class(reward)
            reward = scorer.__new__(scorer)  # without weights, for its signature
        columns = [name for name in dataset.column_names if name not in ("prompt", ROW_COLUMN)]
        check_reward_function(reward, columns)
        if isinstance(reward, PretrainedReward):
            read = {name: dataset[name] for name in reward.columns if name in columns}
            reward.check_prompts(dataset["prompt"], **read)


def check_sharing(rewards: Sequence[RewardModel], args: RolloutConfig, peft_config: PeftConfig | None) -> None:
    """
    Refuse a `share_backbone` that cannot work, before anything is loaded.

    Raises:
        ValueError: if there is nothing to share, or if the weights do not stay as and where they are.
    """
    if not args.share_backbone:
        return
    zero_stage = args.deepspeed_plugin.zero_stage if args.deepspeed_plugin is not None else 0
    problems = [
        (
            not any(map(_is_latent, rewards)),
            "every `reward_model` is a function, which has no backbone",
        ),
        (
            peft_config is None,
            "full fine-tuning changes the weights that the reward model reads: pass a `peft_config`",
        ),
        (
            args.layerwise_casting,
            "`layerwise_casting` rounds the policy's weights, which the reward model was not trained with: leave one of the two "
            "unset",
        ),
        (
            args.reward_layerwise_casting,
            "`reward_layerwise_casting` keeps the reward model's weights in another precision than the policy's: leave one of "
            "the two unset",
        ),
        (
            args.reward_group_offload,
            "`reward_group_offload` keeps the reward model's weights elsewhere than the policy's: leave one of the two unset",
        ),
        (
            zero_stage == 3 or uses_fsdp(args),
            "ZeRO-3 and FSDP split the policy's weights over the processes: use DDP or ZeRO-2",
        ),
    ]
    for is_problem, reason in problems:
        if is_problem:
            raise ValueError(f"`share_backbone=True` cannot work: {reason}.")
    check_base_stays(peft_config, "`peft_config`")


def load_reward(
    reward: RewardModel, policy: FlowPolicy, args: RolloutConfig
) -> LatentReward | EstimateReward | PixelReward:
    """
    A reward as the sampler calls it. A reward model, of whichever kind a folder holds, is frozen, and stays on the CPU until
    [`move_reward`].

    Args:
        reward (`str`, [`StepRewardModel`] or `Callable`): see [`TAPOTrainer`].
        policy ([`FlowPolicy`]): the policy whose latents will be rated.
        args ([`RolloutConfig`]): the configuration.

    Raises:
        ValueError: if a reward model does not fit the policy, or an option not the reward model.
    """
    kwargs = init_kwargs_of(reward, args.reward_model_init_kwargs) if isinstance(reward, str) else {}
    if isinstance(reward, str) and is_reward_name(reward):
        reward_class(reward).check_reads(policy)
        reward = get_reward(reward, **kwargs)
    if not isinstance(reward, (str, StepRewardModel)):
        if isinstance(reward, PretrainedReward):
            reward.check_reads(policy)
        return PixelReward(reward, policy, args.score_batch_size)
    model = reward
    if isinstance(reward, str):
        kwargs["torch_dtype"] = pop_dtype(kwargs)
        model = _load_sharing(reward, policy, **kwargs) if args.share_backbone else load_reward_model(reward, **kwargs)
    elif args.share_backbone:
        dtype = model.transformer.backbone_dtype if isinstance(model, LatentRewardModel) else None
        _check_shares(type(model), model.config.lora, policy, dtype)
        network = model.base_network(policy)
        base, own = base_tensors(network), base_tensors(model.transformer)
        check_same(((name, own[name]) for name in own if name in base), base, model.label)
        share_parameters(model.transformer, network)
    if args.share_backbone:
        _check_engine(policy, args)
    model.check_compatible(policy, max_sequence_length=args.max_sequence_length)
    model.requires_grad_(False).eval()
    target = model.rollout_target(args.velocity_target)
    # Clean samples and estimates are compared with nothing
    if "velocity_target" in {own.name for own in fields(args)} and not args.score_estimates:
        _check_target_stays(target, args)
    if isinstance(model, LatentRewardModel):
        if args.torch_compile:
            compile_blocks([model.transformer], args.torch_compile_backend, args.torch_compile_mode)
        return LatentReward(model, target, args.score_batch_size, args.score_estimates)
    check_has_transformer(model, args)
    return EstimateReward(model, policy, args.score_batch_size)


def check_has_transformer(model: StepRewardModel, args: RolloutConfig) -> None:
    """
    Check that options for reward models on a diffusion transformer have one to act on.

    Raises:
        ValueError: if the reward model is none, and one of them is set.
    """
    for option in ("reward_layerwise_casting", "reward_group_offload"):
        if getattr(args, option) and not isinstance(model, LatentRewardModel):
            raise ValueError(
                f"`{option}=True` is for reward models on a diffusion transformer, but the reward model is a {model.label} on "
                "a CLIP: leave it unset; `reward_model_init_kwargs` can load it in half precision."
            )
    if args.score_estimates and not isinstance(model, LatentRewardModel):
        raise ValueError(
            f"`score_estimates=True` has no effect on an {model.label}, which always reads estimates: leave it unset."
        )


def _load_sharing(
    name: str, policy: FlowPolicy, torch_dtype: torch.dtype | None = None, base_model: str | None = None, **kwargs
) -> LatentRewardModel:
    """
    The reward model of a folder or on the Hub on the policy's own weights. The base model that it was trained from is read
    once, tensor by tensor, to see that it is the policy's.
    """
    hub_arguments = only(kwargs, HUB_ARGUMENTS)
    model_class = saved_class(name, **hub_arguments)
    config = model_class.load_config(name, **hub_arguments)
    _check_shares(model_class, config["lora"], policy, torch_dtype)
    recorded = (
        {"revision": config.get("base_revision"), "variant": config.get("base_variant")} if base_model is None else {}
    )
    base_model = base_model or config["base_model_name_or_path"]
    if not base_model:
        raise ValueError(
            f"`share_backbone=True` cannot work: the {model_class.label} `{name}` was trained on a model in memory, whose name "
            "was not known, so nothing tells whether that was this policy. Load it with `load_reward_model(..., "
            "base_model=policy, share_base=True)` if it was, and pass it as `reward_model`."
        )
    subfolder = config.get("base_subfolder", "transformer")
    base = base_tensors(policy.experts.get(subfolder, policy.transformer))
    files = only(kwargs, BASE_ARGUMENTS) | recorded
    check_same(saved_tensors(base_model, base, subfolder=subfolder, **files), base, model_class.label)
    return model_class.from_pretrained(name, base_model=policy, share_base=True, **kwargs)


def _check_shares(
    model_class: type[StepRewardModel], lora: bool, policy: FlowPolicy, dtype: torch.dtype | None
) -> None:
    label = model_class.label
    if not issubclass(model_class, LatentRewardModel):
        raise ValueError(f"`share_backbone=True` cannot work: the backbone of an {label} is no diffusion transformer.")
    if not lora:
        raise ValueError(
            f"`share_backbone=True` cannot work: the {label} was trained in full, and its backbone is no longer that of the "
            "policy. Train one with LoRA (`use_peft: true` in its recipe)."
        )
    if dtype not in (None, policy.transformer.dtype):
        raise ValueError(
            f"`share_backbone=True` cannot work: the policy's weights are {policy.transformer.dtype}, but the {label}'s "
            f"{dtype}. Leave `torch_dtype` out of `reward_model_init_kwargs`, or load both in the same precision."
        )


def _check_engine(policy: FlowPolicy, args: RolloutConfig) -> None:
    """DeepSpeed casts all of the policy's weights to its precision, and with them the reward model's."""
    dtypes = {tensor.dtype for tensor in policy.transformer.parameters()}
    expected = {autocast_dtype(args) or torch.float32}
    if args.deepspeed_plugin is not None and dtypes != expected:
        raise ValueError(
            f"`share_backbone=True` cannot work: DeepSpeed casts the policy's weights from {dtypes} to {expected}, and the reward "
            "model's would go with them. Load the policy in that precision, or use DDP."
        )


def move_rewards(rewards: Sequence[LatentReward | PixelReward], policy: FlowPolicy, args: RolloutConfig) -> None:
    """[`move_reward`] for each of them. What they share with the policy is at its place before they come."""
    if args.share_backbone:
        policy.transformer.to(args.device)
        share_with_rewards(rewards, policy)
    for reward in rewards:
        move_reward(reward, args)


def share_with_rewards(rewards: Sequence[LatentReward | PixelReward], policy: FlowPolicy) -> None:
    """Let all latent reward models have the policy's own base tensors, see [`~networks.sharing.share_parameters`]."""
    for reward in rewards:
        if isinstance(reward, LatentReward):
            share_parameters(reward.model.transformer, reward.model.base_network(policy))


class ShareCallback(TrainerCallback):
    """Shares once more when the launcher's engine has placed the policy: that makes buffers anew."""

    def __init__(self, rewards: Sequence[LatentReward | PixelReward], policy: FlowPolicy):
        self.rewards, self.policy = rewards, policy

    def on_train_begin(self, args, state, control, **kwargs):
        share_with_rewards(self.rewards, self.policy)


def move_reward(reward: LatentReward | EstimateReward | PixelReward, args: RolloutConfig) -> None:
    """Put a reward model where it computes, in the way that the configuration asks for. Pixel rewards have nothing to place."""
    if isinstance(reward, PixelReward):
        return
    if args.reward_layerwise_casting:
        store_in_float8(reward.model)
    if args.reward_group_offload:
        offload_blocks(reward.model, args.device)
    else:
        reward.model.to(args.device)


def store_in_float8(model: LatentRewardModel) -> None:
    """
    Keep the linear layers of a frozen reward model's backbone in float8, one byte per weight; each is cast to the backbone's
    precision for its own forward. The score stream or head, norms and embeddings, and LoRA matrices stay as they are.
    """
    transformer = model.transformer
    transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn,
        compute_dtype=transformer.backbone_dtype,
        skip_modules_pattern=(*DEFAULT_SKIP_MODULES_PATTERN, *SCORE_LAYERS),
    )


def offload_blocks(model: LatentRewardModel, device: torch.device) -> None:
    """Keep a frozen backbone on the CPU; each block comes to `device` for its own forward, the next one on its way already."""
    for name, child in model.named_children():
        if name != "transformer":
            child.to(device)
    for name, buffer in model.named_buffers(recurse=False):
        model.register_buffer(name, buffer.to(device))
    model.transformer.enable_group_offload(
        onload_device=device,
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=device.type == "cuda",
    )
