# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Making a policy ready for training: how it is loaded, its sizes, its reference, and options that save memory."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import TrainingArguments, set_seed
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.utils import logging
from trl.trainer.utils import disable_dropout_in_model

from ..data.prompts import PromptCache
from ..media.tracking import make_config_trackable
from ..networks.attention import has_attention_backends, set_attention_backend
from ..networks.compilation import compile_blocks
from ..networks.float8 import store_base_in_float8
from ..policies import FlowPolicy
from ..policies.loading import pop_dtype
from ..rewards.scoring import LatentReward, PixelReward
from ..runs.option_checks import autocast_dtype, check_without_effect
from .rollout_config import RolloutConfig


logger = logging.get_logger(__name__)

FULL_LEARNING_RATE = 1e-5  # which fits full fine-tuning


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


def make_trainable(
    policy: FlowPolicy, args: TrainingArguments, peft_config: PeftConfig | None
) -> tuple[ModelMixin | PeftModel, ModelMixin | None]:
    """
    Make a policy's network ready for training.

    Args:
        policy ([`FlowPolicy`]): the policy. Its transformer is changed in place.
        args ([`TAPOConfig`] or [`DiffusionDPOConfig`]): the configuration.
        peft_config ([`~peft.PeftConfig`], *optional*): LoRA configuration. Without it all weights are trained, in float32.

    Returns:
        `tuple`: the network to train, and the frozen copy that is its reference, or `None` if the reference is the
        network without its adapter.
    """
    transformer, ref_model = policy.transformer.requires_grad_(peft_config is None), None
    make_config_trackable(transformer)
    if peft_config is not None:
        if peft_config.target_modules is None:
            peft_config.target_modules = policy.lora_target_modules
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
        ref_model = copy.deepcopy(transformer).requires_grad_(False).eval()
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


def fill_in_sizes(args: TrainingArguments, policy: FlowPolicy) -> tuple[int, ...]:
    """Put what `args` leaves to `resolution` and to the policy's family into it, and return the shape of one latent."""
    if policy.modality == "image":
        check_without_effect(args, ["fps"], "because `model` makes images")
    args.height, args.width = args.height or args.resolution, args.width or args.resolution
    if args.max_sequence_length is None:
        args.max_sequence_length = policy.max_sequence_length
    return policy.latent_shape(args.height, args.width, args.num_frames)


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
    if (losses - math.log(2)).abs().max() > 1e-6:
        raise RuntimeError(
            f"The sigmoid loss at the start is {losses.tolist()}, not ln 2 = {math.log(2):.6f}: the policy and the "
            "reference differ before the first update. Does the adapter start from trained weights, or is some "
            "layer (dropout, batch norm) random? Set `self_check=False` if the difference is meant."
        )
