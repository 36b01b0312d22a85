# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""DiNa-LRMs in the format of their authors (Liu et al., 2026): a LoRA of PEFT, a head of `torch.save` and a configuration."""

import os
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from ..files import local_file
from ..policies import FlowPolicy, load_policy
from ..policies.loading import check_arguments, only, pop_dtype
from .dina import DEFAULT_NUM_QUERIES, MAX_HEADS, DiNaModel
from .pretrained.checkpoints import read_state_dict
from .step_reward import DEFAULT_RESOLUTION, HUB_ARGUMENTS


HEAD, ADAPTER = "checkpoint/rm_head.pt", "checkpoint/backbone_lora/adapter_model.safetensors"
ADAPTER_CONFIG = "checkpoint/backbone_lora/adapter_config.json"

TRAINED_LENGTH = 128
"""Tokens of T5 in the authors' training. Their examples of inference encode 256."""

# The design that `DiNaModel` has. Fields that a configuration leaves out have these values.
DESIGN = {
    "use_lora": True,
    "freeze_backbone": False,
    "use_logistic": False,
    "use_t_embed": True,
    "use_text_features": True,
}
HEAD_DESIGN = {"use_proj_in": False, "width": -1, "out_dim": 1, "num_attn_heads": MAX_HEADS}

# From our names of the head's tensors to the authors', one pattern after the other
NAMES = (
    (r"^(visual|text)_adapter\.adapters\.", r"layer_adapters_\1."),
    (r"^(visual|text)_adapter\.merge\.", r"agg_\1."),
    (r"\.modulation\.", ".cond_mlp."),
    (r"\.layer_embedding$", ".layer_embed"),
    (r"\.projection\.", ".proj."),
    (r"^queries$", "query_tokens"),
    (r"^joint_attention\.", "attn1."),
    (r"^visual_attention\.", "attn2."),
    (r"\.contexts\.0\.norm\.", ".norm_v."),
    (r"\.contexts\.1\.norm\.", ".norm_t."),
    (r"\.contexts\.0\.(key|value)\.", r".to_\1_vis."),
    (r"\.contexts\.1\.(key|value)\.", r".to_\1_text."),
    (r"\.to_(k|v)(ey|alue)_", r".to_\1_"),
    (r"\.contexts\.0\.gate\.", ".gate_vis."),
    (r"\.contexts\.1\.gate\.", ".gate_text."),
    (r"^(attn\d)\.norm\.", r"\1.norm_q."),
    (r"^(attn\d)\.query\.", r"\1.to_q."),
    (r"^(attn\d)\.output\.", r"\1.to_out.0."),
    (r"^ff_norm\.", "norm_ff."),
    (r"^readout\.", "head."),
)


def is_released_dina(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of a DiNa-LRM in the authors' format."""
    return isinstance(config.get("model"), Mapping) and "visual_head_idx" in config["model"]


def load_released_dina(
    name_or_path: str | os.PathLike,
    config: Mapping[str, Any],
    base_model: str | DiffusionPipeline | FlowPolicy | None = None,
    torch_dtype: torch.dtype | str | None = None,
    max_sequence_length: int = TRAINED_LENGTH,
    **kwargs,
) -> DiNaModel:
    """
    Load a DiNa-LRM that its authors' code wrote, such as `liuhuohuo/DiNa-LRM-SD35M-12layers`.
    [`~StepRewardModel.save_pretrained`] writes it in the format of this library.

    Args:
        name_or_path (`str` or `os.PathLike`): folder or Hub id.
        config (`Mapping`): its `config.json`.
        base_model (`str`, [`~diffusers.DiffusionPipeline`] or [`FlowPolicy`], *optional*):
            the SD3 that it was trained from. Defaults to the one it names, loaded without text encoders.
        torch_dtype (`torch.dtype` or `str`, *optional*):
            precision of the backbone. Defaults to float32, or to that of a `base_model` in memory.
        max_sequence_length (`int`, *optional*, defaults to `128`):
            length at which prompts will be encoded: 128 in the authors' training, 256 in their examples of inference.
        kwargs: `revision`, `token`, `cache_dir` and other arguments of requests to the Hub.

    Returns:
        [`DiNaModel`]: in evaluation mode, with a LoRA.

    Raises:
        ValueError: if it has another design, or if its tensors are not those of the design.
    """
    torch_dtype = pop_dtype({"torch_dtype": torch_dtype, **kwargs})
    kwargs.pop("dtype", None)
    check_arguments(kwargs)
    layers, num_queries = _check_design(name_or_path, config["model"])
    if base_model is None or isinstance(base_model, str):
        base_model = base_model or config["model"]["backbone_model_id"]
        unread = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
        policy = load_policy(base_model, torch_dtype=torch_dtype, **dict.fromkeys(unread))
    else:
        policy = load_policy(base_model)
    model = DiNaModel.from_policy(
        policy,
        layers=layers,
        num_queries=num_queries,
        max_sequence_length=max_sequence_length,
        resolution=config.get("data", {}).get("train", {}).get("reference_size", DEFAULT_RESOLUTION),
    )
    if torch_dtype is not None:
        model._cast_backbone(torch_dtype)
    local = partial(local_file, name_or_path, **only(kwargs, HUB_ARGUMENTS))
    model.add_lora(LoraConfig.from_pretrained(os.path.dirname(local(ADAPTER_CONFIG))))
    model.register_to_config(trained=True)

    adapter = {f"base_model.model.{name}": own for name, own in get_peft_model_state_dict(model.backbone).items()}
    weights = _checked(read_state_dict(local(ADAPTER)), adapter, f"{name_or_path}/{ADAPTER}")
    set_peft_model_state_dict(
        model.backbone, {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
    )
    head = {released_name(name): own for name, own in model.head.named_parameters()}
    weights = _checked(read_state_dict(local(HEAD)), head, f"{name_or_path}/{HEAD}")
    with torch.no_grad():
        for name, own in head.items():
            own.copy_(weights[name])
    return model.eval()


def released_name(name: str) -> str:
    """What the authors call a tensor of [`~rewards.dina.DiNaHead`]."""
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _check_design(name_or_path: str | os.PathLike, model: Mapping[str, Any]) -> tuple[list[int], int]:
    """Blocks that are read, and number of queries."""
    head, layers = model.get("reward_head", {}), list(model["visual_head_idx"])
    found = {name: (model.get(name, value), value) for name, value in DESIGN.items()}
    found |= {f"reward_head.{name}": (head.get(name, value), value) for name, value in HEAD_DESIGN.items()}
    found["text_head_idx"] = (list(model["text_head_idx"]), layers)
    found["num_transformer_layers"] = (model["num_transformer_layers"], layers[-1] if layers else None)
    for name, (value, expected) in found.items():
        if value != expected:
            raise ValueError(
                f"`{name_or_path}` is a DiNa-LRM of another design: `model.{name}` of its `config.json` is {value}, but `DiNaModel` "
                f"can only be loaded with {expected}."
            )
    return layers, head.get("num_queries", DEFAULT_NUM_QUERIES)


def _checked(
    weights: dict[str, torch.Tensor], expected: Mapping[str, torch.Tensor], file: str
) -> dict[str, torch.Tensor]:
    """The tensors of a file, whose names and shapes are those that are expected."""
    problems = [f"{name} is missing" for name in sorted(expected.keys() - weights.keys())]
    problems += [f"{name} is not known" for name in sorted(weights.keys() - expected.keys())]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)} in place of {tuple(own.shape)}"
        for name, own in expected.items()
        if name in weights and weights[name].shape != own.shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"`{file}` does not fit its `config.json` and the base model: {'; '.join(problems[:3])}{more}."
        )
    return weights
