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

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, WanPipeline

from .base import FlowPolicy
from .sd3 import SD3Policy
from .wan import WanPolicy


RUNS_CODE = ("custom_pipeline", "trust_remote_code")


def load_policy(
    model: str | DiffusionPipeline | FlowPolicy, torch_dtype: torch.dtype | None = None, **model_init_kwargs
) -> FlowPolicy:
    """
    The policy for a diffusers pipeline. Weights are read from safetensors only, and no code of a repository is run.

    Args:
        model (`str`, [`~diffusers.DiffusionPipeline`] or [`FlowPolicy`]):
            Hub id or folder of a pipeline, a pipeline, or a policy, which is returned as it is.
        torch_dtype (`torch.dtype`, *optional*):
            Precision of the weights when they are loaded. Defaults to float32, in which Wan's VAE always stays.
        model_init_kwargs:
            Further arguments of [`~diffusers.DiffusionPipeline.from_pretrained`], such as `revision` or
            `text_encoder_3=None`.

    Returns:
        [`FlowPolicy`]

    Raises:
        ValueError: if no policy is written for the pipeline's class, or if an argument would run code from a repository.
    """
    refused = [name for name in RUNS_CODE if model_init_kwargs.get(name)]
    if refused or not model_init_kwargs.get("use_safetensors", True):
        name = refused[0] if refused else "use_safetensors=False"
        raise ValueError(f"`{name}` would run code that comes with the model: load the pipeline yourself and pass it.")
    if isinstance(model, FlowPolicy):
        return model
    pipeline = model
    if isinstance(model, str):
        # A component that was saved as absent has to be passed as `None` to diffusers.
        revision = model_init_kwargs.get("revision")
        components = DiffusionPipeline.load_config(model, revision=revision)
        absent = {name: None for name, value in components.items() if value == [None, None]}
        dtype = torch_dtype or torch.float32
        if components["_class_name"] == WanPipeline.__name__:
            dtype = {"default": dtype, "vae": torch.float32}  # it loses detail in half precision
        options = {"dtype": dtype, "use_safetensors": True}
        pipeline = DiffusionPipeline.from_pretrained(model, **absent | options | model_init_kwargs)
    if isinstance(pipeline, StableDiffusion3Pipeline):
        return SD3Policy(pipeline)
    if isinstance(pipeline, WanPipeline):
        return WanPolicy(pipeline)
    raise ValueError(
        f"`model` is a `{type(pipeline).__name__}`, which no policy supports. Supported: `StableDiffusion3Pipeline` and "
        "`WanPipeline`. To add a family, subclass `FlowPolicy` and pass an instance of it as `model`."
    )
