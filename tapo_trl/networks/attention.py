# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Implementations of attention."""

import torch
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import nn


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
