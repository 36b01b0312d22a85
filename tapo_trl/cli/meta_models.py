# Copyright 2026 The tapo_trl authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Policies and reward models without weights, on the meta device: their shapes, and nothing else."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from peft import get_peft_model
from torch import nn
from transformers import CLIPTokenizer

from ..policies import FlowPolicy, load_policy
from ..rewards import SLRMModel, StepRewardModel
from ..rewards.loading import saved_class
from .arguments import DiffusionModelConfig, get_lora_config
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
