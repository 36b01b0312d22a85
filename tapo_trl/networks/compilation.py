# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Transformer blocks compiled in place."""

from collections.abc import Sequence

import torch
from torch import nn


# Of a block: with and without gradients, with and without the adapter, for each kind of block and batch
MAX_GRAPHS = 64


def compile_blocks(networks: Sequence[nn.Module | None], backend: str | None = None, mode: str | None = None) -> None:
    """
    Compile every transformer block where it is.

    `Trainer` would compile the whole network and hand the compiled one to the loss alone: the reference, which is the same
    network without its adapter, would run uncompiled and round differently. Compiled in place, each block serves rollouts,
    policy and reference alike.

    Args:
        networks (`Sequence[nn.Module]`): diffusers transformers, or `None`.
        backend (`str`, *optional*): see `torch.compile`.
        mode (`str`, *optional*): see `torch.compile`.
    """
    # A block that hits the limit would silently go on uncompiled, for example without the adapter only.
    torch._dynamo.config.cache_size_limit = max(MAX_GRAPHS, torch._dynamo.config.cache_size_limit)
    torch._dynamo.config.fail_on_cache_limit_hit = True
    for network in networks:
        if network is not None:
            for module in network.modules():
                if type(module).__name__ in network._no_split_modules:
                    module.compile(backend=backend, mode=mode)
