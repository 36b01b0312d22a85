# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Making a policy ready for training: its adapter, how it is loaded, its sizes, its reference, and options that save memory."""

import copy
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import FrozenDict
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import TrainingArguments, set_seed
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.utils import logging
from trl.trainer.utils import disable_dropout_in_model

from ..data.prompts import PromptCache
from ..networks.attention import has_attention_backends, set_attention_backend
from ..networks.compilation import compile_blocks
from ..networks.float8 import store_base_in_float8
from ..policies import FlowPolicy, load_policy
from ..policies.loading import pop_dtype
from ..rewards.scoring import LatentReward, PixelReward
from ..runs.checks import autocast_dtype, check_without_effect, uses_fsdp
from .rollout_config import RolloutConfig


logger = logging.get_logger(__name__)

FULL_LEARNING_RATE = 1e-5  # which fits full fine-tuning

# By field of `LoraConfig`, what diffusers loads again and what leaves the base as it is; everything else is refused.
_ALLOWED = {
    "bias": ("none",),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "kasa_config": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
}
_NOT_FOR_TRAINING = {"inference_mode": "freezes the LoRA", "task_type": "is for language models"}
_POLICY_INITS = (True, "gaussian")
_REWARD_MODEL_INITS = (True, False, "gaussian", "orthogonal")


def check_peft_config(peft_config: PeftConfig | None, has_reference: bool = True) -> None:
    """
    Check that what a configuration trains can be saved and loaded again, before anything is loaded.

    Args:
        peft_config ([`~peft.PeftConfig`], *optional*): the configuration.
        has_reference (`bool`, *optional*, defaults to `True`):
            Whether the network without its adapter is the reference, from which the training must start.

    Raises:
        ValueError: if it is no LoRA or none to be trained, if it trains more than LoRA matrices, or if it starts from other
            weights than those of the base.
    """
    if peft_config is None:
        return
    if type(peft_config) is not LoraConfig:
        raise ValueError(
            f"`peft_config` is a `{type(peft_config).__name__}`, whose weights diffusers does not load: use a `LoraConfig`."
        )
    for name, reason in _NOT_FOR_TRAINING.items():
        if getattr(peft_config, name):
            raise ValueError(f"`{name}={getattr(peft_config, name)!r}` of `peft_config` {reason}: leave it unset.")
    inits = _POLICY_INITS if has_reference else _REWARD_MODEL_INITS
    names = {own.name for own in fields(peft_config)}
    for name, allowed in (_ALLOWED | {"init_lora_weights": inits}).items():
        value = getattr(peft_config, name) if name in names else None
        if name not in names or value in allowed:
            continue
        if name == "init_lora_weights":
            reason = "starts from other weights than the base's, which are " + (
                "the reference" if has_reference else "what the LoRA is loaded on again"
            )
        else:
            reason = "trains or changes more than LoRA matrices, which are all that is saved"
        raise ValueError(
            f"`{name}={value!r}` of `peft_config` {reason}: "
            + (
                f"choose one of {allowed}."
                if len(allowed) > 1 and allowed[-1] != []
                else f"leave it at {allowed[0]!r}."
            )
        )


def check_no_adapter(policy: FlowPolicy) -> None:
    """
    Check that the transformer of a policy has no adapter: it would be trained or dropped by accident, and not be saved.

    Raises:
        ValueError: if it has one, whether active, disabled or fused.
    """
    transformer = policy.transformer
    if not isinstance(transformer, PeftModel) and not any(
        isinstance(module, BaseTunerLayer) for module in transformer.modules()
    ):
        return
    raise ValueError(
        "The transformer of `model` has an adapter already, such as the LoRA of an earlier training. Merge it, with "
        "`pipeline.fuse_lora()` and `pipeline.unload_lora_weights()`, or with `pipeline.transformer = "
        "pipeline.transformer.merge_and_unload()` if it was made by `get_peft_model`; or detach it, with "
        "`pipeline.unload_lora_weights()` or `unload()` in the place of `merge_and_unload()`. To go on with a training, use "
        "`resume_from_checkpoint`."
    )


def check_not_parallel(policy: FlowPolicy) -> None:
    """
    Check that no transformer of a policy splits tokens or layers over processes, each of which trains on rows of its own here.

    Raises:
        ValueError: if diffusers' `enable_parallelism` was called on one, or `parallel_config` was given when it was loaded.
    """
    if any(transformer._parallel_config is not None for transformer in policy.experts.values()):
        raise ValueError(
            "A transformer of `model` has context or tensor parallelism, for which all processes of a group must get the same "
            "rows and their gradients be added up. The trainers give each process rows of its own: load `model` without "
            "`parallel_config`, and leave `enable_parallelism` out. Long videos need less memory with `activation_checkpointing` "
            "and a smaller `transition_batch_size`; ZeRO-3 and FSDP2 shard the weights."
        )


@contextmanager
def whole_weights(args: TrainingArguments) -> Iterator[None]:
    """
    Inside, models are loaded whole on every process. Under ZeRO-3 Transformers would split them over the processes right
    away, also those that no engine ever puts together again, such as text encoders.
    """
    if args.deepspeed_plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(args.deepspeed_plugin.hf_ds_config)


def policy_init_kwargs(args: TrainingArguments, peft_config: PeftConfig | None) -> dict[str, Any]:
    """Loading arguments. A base that LoRA keeps frozen is loaded in the precision it is used in."""
    kwargs = dict(args.model_init_kwargs or {})
    dtype = pop_dtype(kwargs)
    if dtype is None and peft_config is not None:
        dtype = autocast_dtype(args)
    return kwargs | {"torch_dtype": dtype}


def load_trained_policy(
    model: str | DiffusionPipeline | FlowPolicy, args: TrainingArguments, peft_config: PeftConfig | None
) -> FlowPolicy:
    """
    The policy to train, with the configuration's choice of experts.

    Raises:
        ValueError: if it cannot be trained so.
    """
    policy = load_policy(model, **policy_init_kwargs(args, peft_config))
    check_not_parallel(policy)
    policy.configure_experts(args.expert, args.guidance_scale_2, args.guidance_scale)
    if len(policy.trained_experts) > 1 and (args.deepspeed_plugin is not None or uses_fsdp(args)):
        raise ValueError(
            "DeepSpeed and FSDP need the same layers in each process, but of two experts each process trains the one of its own "
            "noise levels: set `expert`, or use DDP."
        )
    return policy


class TrackedConfig(FrozenDict):
    """A diffusers configuration with the two methods that transformers' tracking callbacks call."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(dict(self), indent=2, sort_keys=True, default=str) + "\n"


def make_config_trackable(model: ModelMixin) -> None:
    """
    Lets `report_to` work with a diffusers model. transformers' callbacks for TensorBoard, MLflow, Comet and ClearML call
    `model.config.to_json_string()` or `.to_dict()`, which diffusers' [`FrozenDict`] lacks, and stop the training.

    Args:
        model ([`~diffusers.ModelMixin`]): The bare model, wrapped in PEFT or not yet. Changed in place.
    """
    model._internal_dict = TrackedConfig(model._internal_dict)


def make_trainable(
    policy: FlowPolicy, args: TrainingArguments, peft_config: PeftConfig | None, has_reference: bool = True
) -> tuple[ModelMixin | PeftModel, ModelMixin | None]:
    """
    Make a policy's network ready for training.

    Args:
        policy ([`FlowPolicy`]): the policy. Its network is changed in place.
        args ([`TAPOConfig`] or [`DiffusionDPOConfig`]): the configuration.
        peft_config ([`~peft.PeftConfig`], *optional*): LoRA configuration. Without it all weights are trained, in float32.
        has_reference (`bool`, *optional*, defaults to `True`): whether the training compares with a reference.

    Returns:
        `tuple`: the network to train, and the frozen copy that is its reference, or `None` if the reference is the
        network without its adapter, or if there is none.
    """
    transformer, ref_model = policy.transformer.requires_grad_(peft_config is None), None
    make_config_trackable(transformer)
    if peft_config is not None:
        if peft_config.target_modules is None:
            peft_config.target_modules = policy.lora_target_modules
        peft_config = leave_out_experts(policy, peft_config)
        set_seed(args.seed)  # LoRA starts at random
        transformer = get_peft_model(transformer, peft_config)
    else:
        default = next(own.default for own in fields(args) if own.name == "learning_rate")
        if args.learning_rate == default > FULL_LEARNING_RATE:
            logger.warning(
                f"Full fine-tuning with the default `learning_rate={default}`, which is for LoRA: set `learning_rate` to "
                f"{FULL_LEARNING_RATE} or less, or pass a `peft_config`."
            )
        if transformer.dtype != torch.float32:
            logger.warning(
                f"Full fine-tuning: the weights of the transformer are cast from {transformer.dtype} to float32, since most "
                "updates are smaller than what half precision can tell apart."
            )
            transformer.float()
        ref_model = copy.deepcopy(transformer).requires_grad_(False).eval() if has_reference else None
        for name, expert in policy.experts.items():
            expert.requires_grad_(name in policy.trained_experts)
    if args.disable_dropout:
        disable_dropout_in_model(transformer)
    if args.torch_compile:
        compile_blocks([policy.transformer, ref_model], args.torch_compile_backend, args.torch_compile_mode)
        # Done: `Trainer` would compile the policy, and not its reference
        args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
    if args.activation_checkpointing:
        policy.transformer.enable_gradient_checkpointing()
        args.activation_checkpointing = False  # done: diffusers models lack the method that Trainer would call
    return transformer, ref_model


def leave_out_experts(policy: FlowPolicy, peft_config: LoraConfig) -> LoraConfig:
    """
    The configuration of a LoRA that leaves out experts that are not trained.

    Raises:
        ValueError: if it leaves out other layers already.
    """
    left_out = [name for name in policy.experts if name not in policy.trained_experts]
    if left_out:
        if peft_config.exclude_modules is not None:
            raise ValueError("`expert` and `exclude_modules` of `peft_config` exclude each other: leave one unset.")
        peft_config = copy.copy(peft_config)
        peft_config.exclude_modules = rf"({'|'.join(left_out)})\..*"
    return peft_config


def trained_levels(policy: FlowPolicy, sigma: torch.Tensor) -> torch.Tensor:
    """
    Which noise levels of a training are those of experts that are trained: at the others there is no gradient.

    Args:
        policy ([`FlowPolicy`]): the policy.
        sigma (`torch.Tensor` of shape `(num_levels,)`): the noise levels.

    Returns:
        `torch.BoolTensor` of shape `(num_levels,)`: all true for most families, which have one transformer.

    Raises:
        ValueError: if there are none. If one of two experts that are trained has none, there is a warning.
    """
    sigma = sigma.cpu()
    missed = [name for name in policy.trained_experts if not policy.uses_expert(name, sigma).any()]
    if missed:
        text = f"No step of the training reaches the expert `{missed[0]}`: noise levels are {sigma.max():.3f} to {sigma.min():.3f}."
        if missed == policy.trained_experts:
            raise ValueError(f"{text} It would not be trained: choose other steps, or another `expert`.")
        logger.warning(
            f"{text} It stays as it is. Set `expert` to train the other one alone, which needs less memory."
        )
    return torch.stack([policy.uses_expert(name, sigma) for name in policy.trained_experts]).any(0)


def fill_in_sizes(args: TrainingArguments, policy: FlowPolicy) -> tuple[int, ...]:
    """Put what `args` leaves to `resolution` and to the policy's family into it, and return the shape of one latent."""
    if policy.modality == "image":
        check_without_effect(args, ["fps"], "because `model` makes images")
    args.height, args.width = args.height or args.resolution, args.width or args.resolution
    if args.max_sequence_length is None:
        args.max_sequence_length = policy.max_sequence_length
    latent_shape = policy.latent_shape(args.height, args.width, args.num_frames)
    if isinstance(args, RolloutConfig):
        warn_of_another_shift(policy, args.num_inference_steps, latent_shape)
    return latent_shape


def warn_of_another_shift(policy: FlowPolicy, num_inference_steps: int, latent_shape: tuple[int, ...]) -> None:
    """Warn of noise levels whose shift is not that of the pipeline's default size and steps, where it depends on them."""
    usual = policy.defaults
    usual_shape = policy.latent_shape(usual.height, usual.width, usual.num_frames)
    mu, usual_mu = policy.mu(num_inference_steps, latent_shape), policy.mu(usual.num_inference_steps, usual_shape)
    if mu is None or math.isclose(mu, usual_mu):
        return
    logger.warning(
        f"The noise levels are shifted by exp(mu) = {math.exp(mu):.2f} with `num_inference_steps={num_inference_steps}` and "
        f"{policy.num_tokens(latent_shape)[0]:,} tokens per sample, but by {math.exp(usual_mu):.2f} with the pipeline's "
        f"defaults, {usual.num_inference_steps} steps and {policy.num_tokens(usual_shape)[0]:,} tokens. Sample with the steps "
        "and the size of the training, or train with those of use."
    )


def apply_memory_options(
    policy: FlowPolicy,
    ref_model: ModelMixin | None,
    rewards: Sequence[LatentReward | PixelReward],
    args: RolloutConfig,
) -> None:
    """
    Apply `layerwise_casting` and `attention_backend`.

    Args:
        policy ([`FlowPolicy`]): the policy, whose transformer has its adapter.
        ref_model ([`~diffusers.ModelMixin`], *optional*): a frozen copy, if the reference is one.
        rewards (`Sequence`): the rewards.
        args ([`RolloutConfig`]): the configuration.
    """
    if args.layerwise_casting:
        store_base_in_float8(policy.transformer)
    if args.attention_backend is not None:
        dtype = autocast_dtype(args) or policy.transformer.dtype
        models = [reward.model.transformer for reward in rewards if isinstance(reward, LatentReward)]
        for network in [policy.transformer, ref_model, *filter(has_attention_backends, models)]:
            if network is not None:
                set_attention_backend(network, args.attention_backend, args.device, dtype)


def release_text_encoders(model: Any, policy: FlowPolicy) -> None:
    """Drop the text encoders of a `model` that was loaded by name; those of a user's object wait on the CPU."""
    if isinstance(model, str):
        policy.unload_text_encoders()
    else:
        policy.move_text_encoders("cpu")


def set_vae_options(policy: FlowPolicy, args: TrainingArguments) -> None:
    """Apply `vae_tiling` and `vae_slicing`."""
    if args.vae_tiling:
        policy.vae.enable_tiling()
    if args.vae_slicing:
        policy.vae.enable_slicing()


def encode_late(prompts: list[str], cache: PromptCache, policy: FlowPolicy, args: TrainingArguments) -> None:
    """
    Encode prompts that are new since the start of the trainer.

    Raises:
        ValueError: if the text encoders are not there any more.
    """
    with args.main_process_first(desc="encoding prompts"):
        missing = cache.missing(prompts)
        if not missing:
            return
        if not policy.has_text_encoders:
            raise ValueError(
                f"The prompt {missing[0]!r} (one of {len(missing)}) was not encoded at the start, and the text encoders have "
                "left the memory since. Give its dataset to the trainer as `eval_dataset`, of which a `dict` may hold several; "
                "or pass a loaded pipeline as `model`, whose text encoders stay."
            )
        policy.move_text_encoders(args.device)
        cache.encode(missing)
        policy.move_text_encoders("cpu")


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode of all modules in `model`; its own `training` stays, by which trainers tell whose metrics they log."""
    modules = [module for module in model.children() if module.training]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module in modules:
            module.train()


# Some kernels round by the address of their inputs, and beta enlarges the difference. Networks that differ are far beyond this.
START_TOLERANCE = 1e-3


def check_start(margins: torch.Tensor) -> None:
    """
    Check that policy and reference are the same before the first update: then the rewards of both sides of a pair are, too,
    and every sigmoid loss is ln 2. Anything else is a bug upstream.

    Args:
        margins (`torch.Tensor` of shape `(num_pairs,)`): differences of the rewards.

    Raises:
        RuntimeError: if a loss is another.
    """
    losses = F.softplus(-margins.detach())
    if (losses - math.log(2)).abs().max() > START_TOLERANCE:
        raise RuntimeError(
            f"The sigmoid loss at the start is {losses.tolist()}, not ln 2 = {math.log(2):.6f}: the policy and the "
            "reference differ before the first update. Does the adapter start from trained weights, or is some "
            "layer (dropout, batch norm) random? Set `self_check=False` if the difference is meant."
        )
