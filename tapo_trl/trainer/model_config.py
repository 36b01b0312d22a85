# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass
from typing import Literal

import torch
from peft import LoraConfig

from ..field_types import option
from ..policies import FlowPolicy
from ..policies.loading import AUTO, parse_dtype


@dataclass
class PipelineConfig:
    """Configuration of the diffusers pipeline that a command loads. `tapo-trl sample --help` describes the fields."""

    model_name_or_path: str | None = option(
        "Hub id or folder of a diffusers pipeline, such as `stabilityai/stable-diffusion-3.5-medium`."
    )
    model_revision: str | None = option("Branch, tag or commit of the pipeline's repository.")
    torch_dtype: str = option(
        "Precision of the frozen weights: float32, bfloat16 (bf16) or float16 (fp16), or auto, that of the saved "
        "transformer.",
        "float32",
    )

    def __post_init__(self):
        _ = self.dtype  # refuses what is none

    @property
    def dtype(self) -> torch.dtype | str:
        """`torch_dtype` as PyTorch's own type, or `"auto"`."""
        return parse_dtype(self.torch_dtype)

    @property
    def known_dtype(self) -> torch.dtype:
        """`dtype`, where no weights are at hand to tell what `"auto"` is."""
        if self.dtype == AUTO:
            raise ValueError("`torch_dtype: auto` depends on weights, but a dry run loads none: name the precision.")
        return self.dtype

    def require_model(self) -> str:
        """`model_name_or_path`, or an error that asks for it."""
        if self.model_name_or_path is None:
            raise ValueError(
                "`model_name_or_path` is missing: give the Hub id or folder of a diffusers pipeline, for example "
                "`--model_name_or_path stabilityai/stable-diffusion-3.5-medium`."
            )
        return self.model_name_or_path


@dataclass
class DiffusionModelConfig(PipelineConfig):
    """
    Configuration of the model that a command trains: that of [`PipelineConfig`] and its LoRA, whose matrices are always
    float32. (TRL's [`~trl.ModelConfig`] is made for language models.) `tapo-trl tapo --help` describes the fields.
    """

    use_peft: bool = option("Train LoRA matrices instead of the whole transformer.", False)
    lora_r: int = option("Rank of the LoRA matrices; 64 for SD3.5, 128 for Wan2.1.", 64)
    lora_alpha: int | None = option("Scale of the update, `lora_alpha / lora_r`. The default is `lora_r`.")
    lora_dropout: float = option("Dropout of LoRA's input.", 0.0)
    lora_target_modules: list[str] | None = option(
        "Names of the linear layers to adapt, or `all-linear`. The default is every attention projection of the model "
        "family."
    )
    init_lora_weights: Literal["gaussian", "default"] = option(
        "Initialisation of the LoRA matrices. Both start at a zero update.", "gaussian"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.lora_r < 1:
            raise ValueError(f"`lora_r` must be at least 1, but it is {self.lora_r}.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"`lora_dropout` must be in [0, 1), but it is {self.lora_dropout}.")


def get_lora_config(
    model_args: DiffusionModelConfig, policy: FlowPolicy | None = None, target_modules: list[str] | None = None
) -> LoraConfig | None:
    """
    The LoRA configuration that the arguments ask for.

    Args:
        model_args ([`DiffusionModelConfig`]): The arguments.
        policy ([`FlowPolicy`], *optional*): The policy; it knows the attention projections of its model family.
        target_modules (`list[str]`, *optional*): Those of another network, if it is not the policy's transformer. Without
            both, the trainer finds them out.

    Returns:
        `LoraConfig` or `None`: The configuration for `peft_config=`, or `None` without `use_peft`.
    """
    if not model_args.use_peft:
        return None
    modules = model_args.lora_target_modules or target_modules or (policy and policy.lora_target_modules)
    return LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_r if model_args.lora_alpha is None else model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules="all-linear" if modules == ["all-linear"] else modules,
        init_lora_weights=True if model_args.init_lora_weights == "default" else model_args.init_lora_weights,
    )
