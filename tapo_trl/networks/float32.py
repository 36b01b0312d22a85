# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
Layers that compute in float32, whatever their precision is. Each reads its weights in its own forward: ZeRO-3 gathers them
for that, and for nobody else.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Float32LayerNorm(nn.LayerNorm):
    """A layer norm without bias. Input `(..., dim)`, output float32."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(hidden_states.float(), self.normalized_shape, self.weight.float(), eps=self.eps)


class Readout(nn.Linear):
    """`(batch_size, dim) -> (batch_size,)`, float32. Not a matrix product, which autocast would round."""

    def __init__(self, dim: int):
        super().__init__(dim, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return (hidden_states.float() * self.weight.float()).sum(dim=1) + self.bias.float()
