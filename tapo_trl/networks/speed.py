# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Options that make networks faster or smaller: compiled blocks, attention backends, weights in float8."""

import os
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from peft import PeftConfig
from torch import nn
from transformers import TrainingArguments

from ..policies import FlowPolicy
from ..rewards.scoring import LatentReward, PixelReward
from ..runs.launch_checks import uses_fsdp
from ..trainer.base import autocast_dtype
from ..trainer.rollout_config import RolloutConfig


MAX_GRAPHS = (
    64  # of a block: with and without gradients, with and without the adapter, for each kind of block and batch
)


def check_speed_options(args: RolloutConfig, peft_config: PeftConfig | None) -> None:
    """
    Refuse what cannot work, before anything is loaded.

    Raises:
        ValueError: if an option has nothing to act on, or if two of them exclude each other.
    """
    if args.layerwise_casting and peft_config is None:
        raise ValueError(
            "`layerwise_casting=True` needs LoRA: weights in float8 cannot be trained. Pass a `peft_config`."
        )
    if args.layerwise_casting and uses_fsdp(args):
        raise ValueError("`layerwise_casting=True` and FSDP exclude each other: its shards have no buffers. Use DDP.")
    for option in ("reward_layerwise_casting", "reward_group_offload"):
        if args.torch_compile and getattr(args, option):
            raise ValueError(
                f"`torch_compile=True` and `{option}=True` exclude each other: the latter moves weights between the layers of a "
                "block, which is one program when it is compiled."
            )


def shrink_and_speed_up(
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


# Compiled blocks


def compile_blocks(args: TrainingArguments, networks: Sequence[nn.Module | None]) -> None:
    """
    Compile every transformer block where it is, if `args.torch_compile`.

    `Trainer` would compile the whole network and hand the compiled one to the loss alone: the reference, which is the same
    network without its adapter, would run uncompiled and round differently. Compiled in place, each block serves rollouts,
    policy and reference alike.

    Args:
        args ([`~transformers.TrainingArguments`]): the configuration, with `torch_compile`, `_backend` and `_mode`.
        networks (`Sequence[nn.Module]`): diffusers transformers, or `None`.

    Raises:
        ValueError: if the launcher is set to compile the whole network.
    """
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ValueError(
            "The accelerate configuration has a `dynamo_backend`, which compiles the policy but not its reference: set it to "
            "'no', and `torch_compile: true` in the training configuration."
        )
    if not args.torch_compile:
        return
    # A block that hits the limit would silently go on uncompiled, for example without the adapter only.
    torch._dynamo.config.cache_size_limit = max(MAX_GRAPHS, torch._dynamo.config.cache_size_limit)
    torch._dynamo.config.fail_on_cache_limit_hit = True
    for network in networks:
        if network is not None:
            for module in network.modules():
                if type(module).__name__ in network._no_split_modules:
                    module.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)


# Attention


def set_attention_backend(network: ModelMixin, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """
    Let a network attend with another implementation, see
    [Attention backends](https://huggingface.co/docs/diffusers/optimization/attention_backends).

    Args:
        network ([`~diffusers.ModelMixin`]): a diffusers transformer.
        name (`str`): name of the backend.
        device (`torch.device`): where it will run.
        dtype (`torch.dtype`): precision of queries, keys and values.

    Raises:
        ValueError: if diffusers has no such backend, if it does not run here, if it gives no gradients or other values, or
            if the network's attention does not ask for one.
    """
    names = [backend.value for backend in AttentionBackendName]
    if name not in names:
        raise ValueError(f"`attention_backend` must be one of {names}, got {name!r}.")
    if not has_attention_backends(network):
        raise ValueError(
            f"`attention_backend={name!r}` would change nothing: in this version of diffusers, the attention of "
            f"`{type(network).__name__}` always is PyTorch's own, which chooses a kernel itself. Leave it unset."
        )
    try:
        network.set_attention_backend(name)
        _check_attention(name, device, dtype)
    except (RuntimeError, ImportError, ValueError, NotImplementedError) as error:
        network.set_attention_backend("native")
        raise ValueError(
            f"`attention_backend={name!r}` does not work here: {error} Leave it unset, or choose another one of {names}."
        ) from error


def has_attention_backends(network: nn.Module) -> bool:
    """Whether a network's attention asks which backend to use."""
    processors = [getattr(module, "processor", None) for module in network.modules()]
    return any(hasattr(processor, "_attention_backend") for processor in processors)


def _check_attention(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """A backend without a backward pass would train nothing, silently."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 64, 2, 64, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]
    results = []
    for backend in (name, AttentionBackendName.NATIVE.value):
        output = dispatch_attention_fn(*inputs, backend=AttentionBackendName(backend))
        if not output.requires_grad:
            raise RuntimeError("it has no gradients.")
        results.append([output, *torch.autograd.grad(output.float().square().sum(), inputs)])
    for found, expected in zip(*results, strict=True):
        if not torch.allclose(found.float(), expected.float(), rtol=0.05, atol=0.05):
            raise RuntimeError("its values or gradients are not those of attention.")


# Weights in float8


class Float8Linear(nn.Module):
    """
    A frozen linear layer with weights of one byte, and one scale per row. They are cast to the input's precision for each
    forward and each backward, and kept in between as bytes only.

    The bytes are an integer buffer, so that nothing that casts or broadcasts a network's weights changes them.

    Args:
        linear (`nn.Linear`): the layer, whose weights are rounded.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
        self.register_buffer("weight_bytes", (weight / scale).to(torch.float8_e4m3fn).view(torch.uint8))
        self.register_buffer("weight_scale", scale.to(linear.weight.dtype))
        self.bias = linear.bias

    @property
    def weight(self) -> torch.Tensor:
        """The rounded weights, in the precision that the layer had."""
        return _dequantize(self.weight_bytes, self.weight_scale, self.weight_scale.dtype)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        device_type = hidden_states.device.type
        if torch.is_autocast_enabled(device_type):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device_type))
        return _Float8Product.apply(hidden_states, self.weight_bytes, self.weight_scale, self.bias)


class _Float8Product(torch.autograd.Function):
    """Keeps the bytes for the backward pass instead of the weights that they were cast to."""

    @staticmethod
    def forward(ctx, hidden_states, weight_bytes, scale, bias):
        ctx.save_for_backward(weight_bytes, scale)
        dtype = hidden_states.dtype
        weight = _dequantize(weight_bytes, scale, dtype)
        return F.linear(hidden_states, weight, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx, gradient):
        weight_bytes, scale = ctx.saved_tensors
        return gradient @ _dequantize(weight_bytes, scale, gradient.dtype), None, None, None


def _dequantize(weight_bytes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight_bytes.view(torch.float8_e4m3fn).to(dtype) * scale.to(dtype)


def store_base_in_float8(transformer: ModelMixin) -> int:
    """
    Replace the frozen linear layers of a transformer, under LoRA or not, by [`Float8Linear`]s. Embeddings, norms and the
    last projection stay as they are.

    Returns:
        `int`: number of layers.
    """
    patterns = (*DEFAULT_SKIP_MODULES_PATTERN, *transformer._skip_layerwise_casting_patterns)
    layers = [
        name
        for name, module in transformer.named_modules()
        if type(module) is nn.Linear
        and not module.weight.requires_grad
        and "lora_" not in name
        and not any(re.search(pattern, name) for pattern in patterns)
    ]
    for name in layers:
        transformer.set_submodule(name, Float8Linear(transformer.get_submodule(name)))
    return len(layers)
