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

"""Counts what a training spends."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


BACKWARD_COST = 2  # in forwards


@dataclass
class ForwardCounter:
    """
    Counts the rows that go through networks. With guidance a latent is two rows.

    Args:
        sampling (`int`): rows of the policy's and the reference's forwards without a gradient.
        training (`int`): rows of the policy's forwards with one.
        reward (`int`): rows of reward models.
    """

    sampling: int = 0
    training: int = 0
    reward: int = 0

    @property
    def policy_forwards(self) -> int:
        """Rows through the policy's network, in forwards: a backward counts as two of them."""
        return self.sampling + (1 + BACKWARD_COST) * self.training

    def watch_policy(self, network: nn.Module) -> None:
        """Count the forwards of a policy's bare network."""

        def count(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            rows = len(kwargs["hidden_states"])
            if torch.is_grad_enabled():
                self.training += rows
            else:
                self.sampling += rows

        network.register_forward_pre_hook(count, with_kwargs=True)

    def watch_reward(self, network: nn.Module) -> None:
        """Count the forwards of the bare network of a latent reward model."""

        def count(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.reward += len(kwargs["hidden_states"])

        network.register_forward_pre_hook(count, with_kwargs=True)
