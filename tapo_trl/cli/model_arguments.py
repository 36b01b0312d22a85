# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from peft import LoraConfig


if TYPE_CHECKING:
    from ..policies import FlowPolicy


@dataclass
class PipelineConfig:
    """
    Configuration of the diffusers pipeline that a command loads.

    Parameters:
        model_name_or_path (`str`, *optional*):
            Hub id or folder of a diffusers pipeline, such as `stabilityai/stable-diffusion-3.5-medium`.
        model_revision (`str`, *optional*):
            Branch, tag or commit of the pipeline's repository.
        torch_dtype (`str`, *optional*, defaults to `"float32"`):
            Precision of the frozen weights: `"float32"`, `"bfloat16"` or `"float16"`, also `"fp32"`, `"bf16"` or `"fp16"`, or
            `"auto"`, the one in which the transformer was saved.
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of a diffusers pipeline, such as `stabilityai/stable-diffusion-3.5-medium`."
        },
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the pipeline's repository."}
    )
    torch_dtype: str = field(
        default="float32",
        metadata={
            "help": "Precision of the frozen weights: float32, bfloat16 (bf16) or float16 (fp16), or auto, that of the saved "
            "transformer."
        },
    )

    def __post_init__(self):
        _ = self.dtype  # refuses what is none

    @property
    def dtype(self) -> torch.dtype | str:
        """`torch_dtype` as PyTorch's own type, or `"auto"`."""
        from ..policies.loading import parse_dtype

        return parse_dtype(self.torch_dtype)

    @property
    def known_dtype(self) -> torch.dtype:
        """`dtype`, where no weights are at hand to tell what `"auto"` is."""
        if self.dtype == "auto":
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
    Configuration of the model that a command trains. (TRL's [`~trl.ModelConfig`] is made for language models.)

    Parameters:
        > Parameters that control the model

        model_name_or_path (`str`, *optional*):
            Hub id or folder of a diffusers pipeline, such as `stabilityai/stable-diffusion-3.5-medium`.
        model_revision (`str`, *optional*):
            Branch, tag or commit of the pipeline's repository.
        torch_dtype (`str`, *optional*, defaults to `"float32"`):
            Precision of the frozen weights: `"float32"`, `"bfloat16"` or `"float16"`, also `"fp32"`, `"bf16"` or `"fp16"`, or
            `"auto"`, the one in which the transformer was saved. LoRA matrices are float32 always.

        > Parameters that control LoRA

        use_peft (`bool`, *optional*, defaults to `False`):
            Train LoRA matrices instead of the whole transformer.
        lora_r (`int`, *optional*, defaults to `64`):
            Rank; 64 for SD3.5 and 128 for Wan2.1 in the paper (Table 5).
        lora_alpha (`int`, *optional*):
            Scale of the update, `lora_alpha / lora_r`. The default is `lora_r`, as in diffusers' training scripts.
        lora_dropout (`float`, *optional*, defaults to `0.0`):
            Dropout of LoRA's input. With 0, the loss of the first step is exactly ln 2.
        lora_target_modules (`list[str]`, *optional*):
            Names of the linear layers to adapt, or `all-linear`. The default is every attention projection of the model
            family.
        init_lora_weights (`str`, *optional*, defaults to `"gaussian"`):
            Initialisation of the LoRA matrices, `"gaussian"` or `"default"` (Kaiming). Both start at a zero update.
    """

    use_peft: bool = field(default=False, metadata={"help": "Train LoRA matrices instead of the whole transformer."})
    lora_r: int = field(default=64, metadata={"help": "Rank of the LoRA matrices; 64 for SD3.5, 128 for Wan2.1."})
    lora_alpha: int | None = field(
        default=None,
        metadata={"help": "Scale of the update, `lora_alpha / lora_r`. The default is `lora_r`."},
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of LoRA's input."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the linear layers to adapt, or `all-linear`. The default is every attention projection of the "
            "model family."
        },
    )
    init_lora_weights: Literal["gaussian", "default"] = field(
        default="gaussian",
        metadata={"help": "Initialisation of the LoRA matrices. Both start at a zero update."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.lora_r < 1:
            raise ValueError(f"`lora_r` must be at least 1, but it is {self.lora_r}.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"`lora_dropout` must be in [0, 1), but it is {self.lora_dropout}.")


def get_lora_config(
    model_args: DiffusionModelConfig, policy: "FlowPolicy | None" = None, target_modules: list[str] | None = None
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
