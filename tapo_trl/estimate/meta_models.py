# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Policies and reward models on the meta device."""

import inspect
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from ..policies import FlowPolicy, PromptEmbeddings, load_policy
from ..policies.loading import family_of, known_pipelines
from ..rewards import SLRMModel, StepRewardModel
from ..rewards.loading import saved_class


def load_meta_policy(name: str, revision: str | None = None) -> tuple[FlowPolicy, str]:
    """
    A policy without weights. Configurations come from the folder or the local cache; else, for the pipelines that the package
    knows, from the policies; else from the Hub.

    Args:
        name (`str`): Hub id or folder of a diffusers pipeline.
        revision (`str`, *optional*): Branch, tag or commit of the repository.

    Returns:
        `tuple[FlowPolicy, str]`: The policy, and in words where its configuration is from.

    Raises:
        ValueError: if there is no configuration.
    """
    known = known_pipelines()
    try:
        policy = make_meta_policy(*_read_configs(name, revision, local_files_only=True))
        source = "the folder's configuration" if Path(name).is_dir() else "the configuration in the local cache"
    except OSError:
        if name in known:
            policy, source = make_meta_policy(*known[name]), "the configuration that ships with tapo_trl"
        else:
            try:
                policy = make_meta_policy(*_read_configs(name, revision, local_files_only=False))
            except OSError as error:
                raise ValueError(
                    f"There is no pipeline `{name}` here, and none could be read from the Hub. Without a network, a dry run "
                    f"needs a folder or one of {sorted(known)}."
                ) from error
            source = "the configuration on the Hub"
    policy.name_or_path = name
    return policy, source


def make_meta_policy(
    pipeline_class: str, components: dict[str, tuple[str, dict[str, Any]]], tokenizer: dict[str, Any] | None = None
) -> FlowPolicy:
    """
    A policy without weights and text encoders.

    Args:
        pipeline_class (`str`): Class of the pipeline in diffusers.
        components (`dict`): Class and configuration of transformers, `vae` and `scheduler`, and of the `pipeline` itself, as in
            [`~policies.loading.known_pipelines`].
        tokenizer (`dict`, *optional*): `tokenizer`, whose length counts in some families.
    """
    family = family_of(pipeline_class)
    built = (family.policy_class.placeholders() if family else {}) | (tokenizer or {})
    for component, (class_name, config) in components.items():
        if component == "pipeline":
            built |= config
            continue
        with torch.device("cpu" if component == "scheduler" else "meta"):
            built[component] = getattr(diffusers, class_name).from_config(config)
    pipeline_class = getattr(diffusers, pipeline_class)
    parameters = inspect.signature(pipeline_class.__init__).parameters.values()
    required = [p.name for p in parameters if p.default is inspect.Parameter.empty and p.name != "self"]
    return load_policy(pipeline_class(**{**dict.fromkeys(required), **built}))


def _read_configs(name: str, revision: str | None, local_files_only: bool) -> tuple[str, dict, dict]:
    options = {"revision": revision, "local_files_only": local_files_only}
    index = DiffusionPipeline.load_config(name, **options)
    components = {}
    for component in ("transformer", "transformer_2", "vae", "scheduler"):
        _, class_name = index.get(component) or (None, None)
        if class_name is None:
            continue
        config = getattr(diffusers, class_name).load_config(name, subfolder=component, **options)
        components[component] = (class_name, config)
    tokenizer, (_, class_name) = {}, index.get("tokenizer", (None, None))
    if class_name is not None:
        with suppress(OSError):
            tokenizer_class = getattr(transformers, class_name)
            tokenizer["tokenizer"] = tokenizer_class.from_pretrained(name, subfolder="tokenizer", **options)
    own = {name: value for name, value in index.items() if name[0] != "_" and not isinstance(value, (list, tuple))}
    components["pipeline"] = (index["_class_name"], own)
    return index["_class_name"], components, tokenizer


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Transformer blocks of a network: what activation checkpointing and offloading treat as one."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    return [block for blocks in lists for block in blocks if type(block).__name__ in network._no_split_modules]


def shrink(network: nn.Module) -> list[int]:
    """
    Keep one transformer block of each kind, in place. A forward takes as many latents as before. Networks that read the
    features of certain blocks stay as they are.

    Returns:
        `list[int]`: how many blocks each of those that are left stands for, in the order of [`blocks_of`].
    """
    counts: list[int] = []
    blocks = set(blocks_of(network))
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and blocks.intersection(child):
                kinds: dict[tuple, list[nn.Module]] = {}
                for block in child:
                    kind = (block,) if hasattr(parent, "feature_layers") else _shapes(block)
                    kinds.setdefault(kind, []).append(block)
                setattr(parent, name, nn.ModuleList(same[0] for same in kinds.values()))
                counts += [len(same) for same in kinds.values()]
    return counts


def _shapes(block: nn.Module) -> tuple:
    return tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


def prompts_of_shapes(
    policy: FlowPolicy, count: int, max_sequence_length: int, device: torch.device | str = "meta"
) -> PromptEmbeddings:
    """Embeddings of `count` prompts, without values."""
    shapes = policy.prompt_shapes(max_sequence_length)
    return PromptEmbeddings(**{name: torch.empty(count, *shape, device=device) for name, shape in shapes.items()})


def load_meta_reward_model(policy: FlowPolicy, name: str) -> tuple[StepRewardModel, list[str]]:
    """The reward model of a folder or in the cache, without weights; else an SLRM with default options, and a remark."""
    try:
        model_class = saved_class(name, local_files_only=True)
        config = model_class.load_config(name, local_files_only=True)
    except OSError:
        base = policy if len(policy.experts) == 1 else policy.only("high")
        return SLRMModel.without_weights(base), [
            f"There is no reward model {name} here (yet): an SLRM with the default options stands in."
        ]
    with torch.device("meta"):
        return model_class.from_config({**config, "lora": False}), []
