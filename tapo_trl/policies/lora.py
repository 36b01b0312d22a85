# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Which adapters can be trained, saved, and told from the base that they are put on."""

from dataclasses import fields

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from . import FlowPolicy


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
