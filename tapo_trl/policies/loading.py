# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The table of model families, and loading a pipeline as the policy of its family."""

import difflib
import inspect
import os
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open

from .base import FlowPolicy


RUNS_CODE = ("custom_pipeline", "trust_remote_code")

# What says where and how files are found, for every request alike
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision")

# What else the loading of pipelines and of networks takes, beside names of components
OTHER_ARGUMENTS = (
    "variant",
    "use_safetensors",
    "device_map",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "low_cpu_mem_usage",
    "quantization_config",
    "disable_mmap",
)

AUTO = "auto"  # the precision in which the transformer was saved
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
}


@dataclass(frozen=True)
class Family:
    """
    Class names of a model family. A new one is a line in [`FAMILIES`], a policy, and backbones for latent reward models on it.

    Args:
        pipeline (`str`): pipeline in diffusers.
        transformer (`str`): transformer in diffusers.
        policy (`str`): subclass of [`FlowPolicy`], as `"module:class"`.
        score (`str`, *optional*): the transformer with score tokens, for [`SLRMModel`].
        features (`str`, *optional*): its first blocks, for [`DiNaModel`] and [`LRMModel`].
    """

    pipeline: str
    transformer: str
    policy: str
    score: str | None = None
    features: str | None = None

    @property
    def policy_class(self) -> type[FlowPolicy]:
        return pkgutil.resolve_name(self.policy)

    def backbone_class(self, kind: str) -> type | None:
        """The reward backbone of this kind, `"score"` or `"features"`, if there is one."""
        name = getattr(self, kind)
        return None if name is None else pkgutil.resolve_name(name)


FAMILIES = [
    Family(
        pipeline="StableDiffusion3Pipeline",
        transformer="SD3Transformer2DModel",
        policy="tapo_trl.policies.sd3:SD3Policy",
        score="tapo_trl.rewards.backbones.sd3:SD3ScoreTransformer2DModel",
        features="tapo_trl.rewards.backbones.sd3:SD3FeatureTransformer2DModel",
    ),
    Family(
        pipeline="FluxPipeline",
        transformer="FluxTransformer2DModel",
        policy="tapo_trl.policies.flux:FluxPolicy",
        score="tapo_trl.rewards.backbones.flux:FluxScoreTransformer2DModel",
        features="tapo_trl.rewards.backbones.flux:FluxFeatureTransformer2DModel",
    ),
    Family(
        pipeline="Flux2KleinPipeline",
        transformer="Flux2Transformer2DModel",
        policy="tapo_trl.policies.flux2:Flux2KleinPolicy",
        score="tapo_trl.rewards.backbones.flux2:Flux2ScoreTransformer2DModel",
        features="tapo_trl.rewards.backbones.flux2:Flux2FeatureTransformer2DModel",
    ),
    Family(
        pipeline="Flux2Pipeline",
        transformer="Flux2Transformer2DModel",
        policy="tapo_trl.policies.flux2:Flux2Policy",
        score="tapo_trl.rewards.backbones.flux2:Flux2ScoreTransformer2DModel",
        features="tapo_trl.rewards.backbones.flux2:Flux2FeatureTransformer2DModel",
    ),
    Family(
        pipeline="QwenImagePipeline",
        transformer="QwenImageTransformer2DModel",
        policy="tapo_trl.policies.qwen_image:QwenImagePolicy",
        score="tapo_trl.rewards.backbones.qwen_image:QwenImageScoreTransformer2DModel",
        features="tapo_trl.rewards.backbones.qwen_image:QwenImageFeatureTransformer2DModel",
    ),
    Family(
        pipeline="QwenImage21Pipeline",
        transformer="QwenImage21Transformer2DModel",
        policy="tapo_trl.policies.qwen_image21:QwenImage21Policy",
        score="tapo_trl.rewards.backbones.qwen_image21:QwenImage21ScoreTransformer2DModel",
        features="tapo_trl.rewards.backbones.qwen_image21:QwenImage21FeatureTransformer2DModel",
    ),
    Family(
        pipeline="ZImagePipeline",
        transformer="ZImageTransformer2DModel",
        policy="tapo_trl.policies.z_image:ZImagePolicy",
        score="tapo_trl.rewards.backbones.z_image:ZImageScoreTransformer2DModel",
        features="tapo_trl.rewards.backbones.z_image:ZImageFeatureTransformer2DModel",
    ),
    Family(
        pipeline="HunyuanVideoPipeline",
        transformer="HunyuanVideoTransformer3DModel",
        policy="tapo_trl.policies.hunyuan_video:HunyuanVideoPolicy",
        score="tapo_trl.rewards.backbones.hunyuan_video:HunyuanVideoScoreTransformer3DModel",
        features="tapo_trl.rewards.backbones.hunyuan_video:HunyuanVideoFeatureTransformer3DModel",
    ),
    Family(
        pipeline="HunyuanVideo15Pipeline",
        transformer="HunyuanVideo15Transformer3DModel",
        policy="tapo_trl.policies.hunyuan_video15:HunyuanVideo15Policy",
        score="tapo_trl.rewards.backbones.hunyuan_video:HunyuanVideo15ScoreTransformer3DModel",
        features="tapo_trl.rewards.backbones.hunyuan_video:HunyuanVideo15FeatureTransformer3DModel",
    ),
    Family(
        pipeline="WanPipeline",
        transformer="WanTransformer3DModel",
        policy="tapo_trl.policies.wan:WanPolicy",
        score="tapo_trl.rewards.backbones.wan:WanScoreTransformer3DModel",
        features="tapo_trl.rewards.backbones.wan:WanFeatureTransformer3DModel",
    ),
]


def family_of(pipeline: DiffusionPipeline | str) -> Family | None:
    """The family of a pipeline, given as an object or by the name of its class. That of a subclass comes before its parent's."""
    names = [pipeline] if isinstance(pipeline, str) else [base.__name__ for base in type(pipeline).__mro__]
    return next((family for name in names for family in FAMILIES if family.pipeline == name), None)


def family_of_transformer(transformer_class: str) -> Family | None:
    """The family of a transformer, by the name of its class in diffusers: the first, where several share their backbones."""
    return next((family for family in FAMILIES if family.transformer == transformer_class), None)


def known_pipelines() -> dict[str, tuple[str, dict[str, tuple[str, dict[str, Any]]]]]:
    """Pipeline class and `known_configs` of all released pipelines that the package knows, by repository."""
    return {
        repository: (family.pipeline, components)
        for family in FAMILIES
        for repository, components in family.policy_class.known_configs.items()
    }


def base_license(name: str) -> tuple[str, str | None] | None:
    """
    `license` and `license_name` of released weights, which a fine-tuning inherits, by the name of their repository. The longest
    start of it that a policy names counts.
    """
    licenses = {start: license for family in FAMILIES for start, license in family.policy_class.licenses.items()}
    start = max((start for start in licenses if name.startswith(start)), key=len, default=None)
    return None if start is None else licenses[start]


def parse_dtype(dtype: str | torch.dtype | None, option: str = "torch_dtype") -> torch.dtype | str | None:
    """
    A precision as people write it.

    Args:
        dtype (`str` or `torch.dtype`, *optional*):
            `"bfloat16"`, `"bf16"`, `"torch.bfloat16"` and so on; `"auto"`, that of the saved transformer; or the type itself.
        option (`str`, *optional*, defaults to `"torch_dtype"`): its name, for the error.

    Returns:
        `torch.dtype`, `"auto"` or `None`.

    Raises:
        ValueError: if there is no such precision.
    """
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    name = dtype.lower().removeprefix("torch.") if isinstance(dtype, str) else None
    if name not in DTYPES and name != AUTO:
        raise ValueError(
            f"`{option}` must be one of {[*DTYPES, AUTO]}, or a floating-point `torch.dtype`, got {dtype!r}."
        )
    return DTYPES.get(name, AUTO)


def pop_dtype(kwargs: dict[str, Any]) -> torch.dtype | dict[str, torch.dtype] | str | None:
    """
    Take the precision out of loading arguments, where it is called `torch_dtype` or `dtype`.

    Raises:
        ValueError: if there is no such precision, or if both names are there and differ.
    """
    found = {}
    for name in ("torch_dtype", "dtype"):
        value = kwargs.pop(name, None)
        if isinstance(value, dict):
            found[name] = {part: parse_dtype(dtype, f"{name}[{part}]") for part, dtype in value.items()}
        elif value is not None:
            found[name] = parse_dtype(value, name)
    if len(found) == 2 and found["torch_dtype"] != found["dtype"]:
        raise ValueError(
            f"`torch_dtype={found['torch_dtype']}` and `dtype={found['dtype']}` are two names of one option: leave one out."
        )
    return next(iter(found.values()), None)


def only(arguments: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those of the arguments that have these names."""
    return {name: value for name, value in arguments.items() if name in names}


def only_hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of loading arguments that hold for every request."""
    return only(kwargs, HUB_ARGUMENTS)


def check_arguments(given: Iterable[str], others: Iterable[str] = ()) -> None:
    """
    Check names of loading arguments: diffusers only warns of those that it does not know, or says nothing.

    Args:
        given (`Iterable[str]`): the names.
        others (`Iterable[str]`, *optional*): names that are right beside those that hold for all models.

    Raises:
        ValueError: if one is none; with the nearest one that is.
    """
    known = {*HUB_ARGUMENTS, *OTHER_ARGUMENTS, *RUNS_CODE, "torch_dtype", "dtype", *others}
    known = sorted(name for name in known if name != "self" and not name.startswith("_"))
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"Did you mean `{near[0]}`?" if near else f"There are {known}."
            raise ValueError(f"`{name}` is no argument with which this model can be loaded. {hint}")


def load_policy(
    model: str | DiffusionPipeline | FlowPolicy,
    torch_dtype: torch.dtype | str | dict[str, torch.dtype | str] | None = None,
    **model_init_kwargs,
) -> FlowPolicy:
    """
    The policy for a diffusers pipeline. Weights are read from safetensors only, and no code of a repository is run.

    Args:
        model (`str`, [`~diffusers.DiffusionPipeline`] or [`FlowPolicy`]):
            Hub id or folder of a pipeline, a pipeline, or a policy, which is returned as it is.
        torch_dtype (`torch.dtype`, `str` or `dict` of those, *optional*):
            Precision of the weights when they are loaded, see [`parse_dtype`], or one for each component. `dtype` is another
            name for it. Defaults to float32, in which a family's `component_dtypes` stay unless a `dict` names them.
        model_init_kwargs:
            Further arguments of [`~diffusers.DiffusionPipeline.from_pretrained`], such as `revision`, `variant`, `token` or
            `text_encoder_3=None`; and `subfolder`, for a pipeline in a folder of a folder.

    Returns:
        [`FlowPolicy`]

    Raises:
        ValueError: if no policy is written for the pipeline's class, if an argument would run code from a repository, or if
            there is no such precision or argument.
    """
    refused = [name for name in RUNS_CODE if model_init_kwargs.get(name)]
    if refused or not model_init_kwargs.get("use_safetensors", True):
        name = refused[0] if refused else "use_safetensors=False"
        raise ValueError(f"`{name}` would run code that comes with the model: load the pipeline yourself and pass it.")
    dtype = pop_dtype(model_init_kwargs := {"torch_dtype": torch_dtype, **model_init_kwargs})
    if isinstance(model, FlowPolicy):
        return model
    pipeline = model
    if isinstance(model, str):
        model = _folder(model, model_init_kwargs.pop("subfolder", None))
        hub_arguments = only_hub_arguments(model_init_kwargs)
        if not os.path.isdir(model):
            try:  # its errors say more than those of diffusers, of a gated repository for example
                hf_hub_download(model, DiffusionPipeline.config_name, **hub_arguments)
            except HFValidationError as error:
                raise ValueError(f"There is no folder {model}, and it cannot be the name of a repository.") from error
        # A component that was saved as absent has to be passed as `None` to diffusers.
        components = DiffusionPipeline.load_config(model, **hub_arguments)
        family = family_of(str(components["_class_name"]))  # a list if it has own code
        pipeline_class = getattr(diffusers, family.pipeline) if family else DiffusionPipeline
        check_arguments(model_init_kwargs, [*components, *inspect.signature(pipeline_class.__init__).parameters])
        absent = {name: None for name, value in components.items() if value == [None, None]}
        if dtype == AUTO:
            dtype = _saved_dtype(model, absent | model_init_kwargs)
        dtype = dtype or torch.float32
        if family and family.policy_class.component_dtypes:
            named = dtype if isinstance(dtype, dict) else {"default": dtype}
            dtype = family.policy_class.component_dtypes | named
        options = {"dtype": dtype, "use_safetensors": True}
        pipeline = DiffusionPipeline.from_pretrained(model, **absent | options | model_init_kwargs)
    family = family_of(pipeline)
    if family is None:
        supported = ", ".join(f"`{family.pipeline}`" for family in FAMILIES)
        raise ValueError(
            f"`model` is a `{type(pipeline).__name__}`, which no policy supports. Supported: {supported}. To add a family, "
            "subclass `FlowPolicy` and pass an instance of it as `model`."
        )
    policy = family.policy_class.from_pipeline(pipeline)
    policy.revision, policy.variant = model_init_kwargs.get("revision"), model_init_kwargs.get("variant")
    return policy


def _folder(name: str, subfolder: str | None) -> str:
    """Name of a pipeline with the home directory and the subfolder in it."""
    folder = os.path.expanduser(name)
    if subfolder is None:
        return folder if os.path.isdir(folder) else name
    if not os.path.isdir(os.path.join(folder, subfolder)):
        raise ValueError(
            f"There is no folder `{subfolder}` (`subfolder`) in the folder {name}. Of a repository on the Hub, a pipeline can "
            "only be loaded from the root: download it first."
        )
    return os.path.join(folder, subfolder)


def _saved_dtype(model: str, kwargs: dict[str, Any]) -> torch.dtype:
    """Precision of the first weight in a saved pipeline's transformer."""
    folder = model if os.path.isdir(model) else DiffusionPipeline.download(model, use_safetensors=True, **kwargs)
    variant = kwargs.get("variant")
    files = sorted(Path(folder, "transformer").glob("*.safetensors"))
    for file in [file for file in files if variant is None or variant in file.name] or files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                return tensors.get_tensor(name).dtype
    raise ValueError(f"`torch_dtype={AUTO!r}`: there are no weights of a transformer in {folder}.")
