# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Policies and reward models without weights, on the meta device: their shapes, and nothing else."""

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from peft import get_peft_model
from torch import nn
from transformers import CLIPTokenizer

from ..policies import FlowPolicy, SD3Policy, load_policy
from ..rewards import SLRMModel, StepRewardModel
from ..rewards.loading import saved_class
from ..trainer.diffusion_dpo_config import DiffusionDPOConfig
from ..trainer.model_config import DiffusionModelConfig, get_lora_config
from ..trainer.rollout_config import RolloutConfig
from ..trainer.slrm_config import SLRMConfig
from .known_pipelines import KNOWN_PIPELINES


def load_meta_policy(name: str, revision: str | None = None) -> tuple[FlowPolicy, str]:
    """
    A policy without weights. Configurations come from the folder or the local cache; else, for the pipelines of the
    recipes, from the copies in `known_pipelines.py`; else from the Hub.

    Args:
        name (`str`): Hub id or folder of a diffusers pipeline.
        revision (`str`, *optional*): Branch, tag or commit of the repository.

    Returns:
        `tuple[FlowPolicy, str]`: The policy, and in words where its configuration is from.

    Raises:
        ValueError: if there is no configuration.
    """
    tokenizer = {}
    try:
        pipeline_class, components, tokenizer = _read_configs(name, revision, local_files_only=True)
        source = "the folder's configuration" if Path(name).is_dir() else "the configuration in the local cache"
    except OSError:
        if name in KNOWN_PIPELINES:
            pipeline_class, components = KNOWN_PIPELINES[name]
            source = "the configuration that ships with tapo_trl"
        else:
            try:
                pipeline_class, components, tokenizer = _read_configs(name, revision, local_files_only=False)
            except OSError as error:
                raise ValueError(
                    f"There is no pipeline `{name}` here, and none could be read from the Hub. Without a network, a dry run "
                    f"needs a folder or one of {sorted(KNOWN_PIPELINES)}."
                ) from error
            source = "the configuration on the Hub"

    policy = make_meta_policy(pipeline_class, components, tokenizer)
    policy.name_or_path = name
    return policy, source


def make_meta_policy(
    pipeline_class: str, components: dict[str, tuple[str, dict[str, Any]]], tokenizer: dict[str, Any] | None = None
) -> FlowPolicy:
    """
    A policy without weights and text encoders.

    Args:
        pipeline_class (`str`): Class of the pipeline in diffusers.
        components (`dict`): Class and configuration of `transformer`, `vae` and `scheduler`, as in `KNOWN_PIPELINES`.
        tokenizer (`dict`, *optional*): `tokenizer`, where its length counts.
    """
    built = dict(tokenizer or {})
    for component, (class_name, config) in components.items():
        with torch.device("cpu" if component == "scheduler" else "meta"):
            built[component] = getattr(diffusers, class_name).from_config(config)
    pipeline_class = getattr(diffusers, pipeline_class)
    parameters = inspect.signature(pipeline_class.__init__).parameters.values()
    required = [p.name for p in parameters if p.default is inspect.Parameter.empty and p.name != "self"]
    return load_policy(pipeline_class(**{**dict.fromkeys(required), **built}))


def _read_configs(name: str, revision: str | None, local_files_only: bool):
    options = {"revision": revision, "local_files_only": local_files_only}
    index = DiffusionPipeline.load_config(name, **options)
    components = {}
    for component in ("transformer", "vae", "scheduler"):
        class_name = index[component][1]
        config = getattr(diffusers, class_name).load_config(name, subfolder=component, **options)
        components[component] = (class_name, config)
    tokenizer = {}
    if index["_class_name"] == StableDiffusion3Pipeline.__name__:  # whose length counts
        tokenizer["tokenizer"] = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **options)
    return index["_class_name"], components, tokenizer


def add_meta_lora(
    network: nn.Module, model_args: DiffusionModelConfig, policy: FlowPolicy, target_modules: list[str] | None = None
) -> int:
    """Number of parameters of the LoRA that is added to `network`, see [`get_lora_config`]."""
    with torch.device("meta"):
        model = get_peft_model(network, get_lora_config(model_args, policy, target_modules))
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def load_meta_reward_model(policy: FlowPolicy, name: str) -> tuple[StepRewardModel, list[str]]:
    """The reward model of a folder or in the cache, without weights; else an SLRM with default options, and a remark."""
    try:
        model_class = saved_class(name, local_files_only=True)
        config = model_class.load_config(name, local_files_only=True)
    except OSError:
        return SLRMModel.without_weights(policy), [
            f"There is no reward model {name} here (yet): an SLRM with the default options stands in."
        ]
    with torch.device("meta"):
        return model_class.from_config({**config, "lora": False}), []


def count_tokens(policy: FlowPolicy, latent_shape: Sequence[int], max_sequence_length: int) -> tuple[int, int]:
    """
    Tokens of a sample and of a prompt.

    Args:
        policy ([`FlowPolicy`]): The policy.
        latent_shape (`Sequence[int]`): Shape of one latent, channels first.
        max_sequence_length (`int`): Tokens of the T5 or UMT5 text encoder.

    Returns:
        `tuple[int, int]`: The number of patches, and that of text tokens (with CLIP's, where the family has them).
    """
    _, *sides = latent_shape
    patch = policy.transformer.config.patch_size
    patches = [patch] * len(sides) if isinstance(patch, int) else patch
    clip = policy.pipeline.tokenizer_max_length if isinstance(policy, SD3Policy) else 0
    return math.prod(side // size for side, size in zip(sides, patches, strict=True)), clip + max_sequence_length


def sample_sizes(
    policy: FlowPolicy, args: SLRMConfig | RolloutConfig | DiffusionDPOConfig
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, int]]:
    """Size of a sample, shape of its latent, and tokens."""
    height, width = args.height or args.resolution, args.width or args.resolution
    latent_shape = policy.latent_shape(height, width, args.num_frames)
    size = (height, width) if args.num_frames is None else (height, width, args.num_frames)
    tokens = count_tokens(policy, latent_shape, args.max_sequence_length or policy.max_sequence_length)
    return size, latent_shape, tokens


def block_tokens(policy: FlowPolicy, tokens: tuple[int, int]) -> int:
    """Tokens of the stream that a block transforms: SD3 joins the text to the image, Wan only looks at it."""
    return sum(tokens) if isinstance(policy, SD3Policy) else tokens[0]
