# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""For every family, each module reads its weights in its own forward alone, where ZeRO-3 has put them together."""

import torch
from torch import nn

from tests.networks.test_speed_of_families import subject  # noqa: F401
from tests.policies.test_families import family, world  # noqa: F401


def take_away_between_forwards(model: nn.Module) -> None:
    """Leave each module its own weights during its forward only. Otherwise they are empty."""
    for module in model.modules():
        own = [(parameter, parameter.data) for parameter in module.parameters(recurse=False)]

        def put_back(module, args, own=own):
            for parameter, data in own:
                parameter.data = data

        def take_away(module, args, output, own=own):
            for parameter, data in own:
                parameter.data = data.new_empty(0)

        module.register_forward_pre_hook(put_back)
        module.register_forward_hook(take_away)
        take_away(module, None, None)


@torch.no_grad()
def test_weights_are_read_in_their_own_forward(subject):  # noqa: F811
    expected = subject.call()
    take_away_between_forwards(subject.model)
    assert not any(parameter.numel() for parameter in subject.model.parameters())
    torch.testing.assert_close(subject.call(), expected, rtol=0, atol=0)
