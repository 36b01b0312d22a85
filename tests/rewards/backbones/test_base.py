# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import torch
from diffusers import QwenImageTransformer2DModel

from tapo_trl.rewards.backbones.base import RewardBackboneMixin


class QwenCopy(RewardBackboneMixin, QwenImageTransformer2DModel):
    base_class = QwenImageTransformer2DModel
    interface_fields = ()
    backbone_dtype = torch.float32


@torch.no_grad()
def test_tables_of_positions_that_are_plain_attributes_are_copied():
    """Those of Qwen-Image are neither parameters nor buffers, and a copy is built on the meta device."""
    sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6), "num_layers": 1}
    base = QwenImageTransformer2DModel(**sizes, in_channels=16, out_channels=4, joint_attention_dim=16)
    with torch.device("meta"):
        copy = QwenCopy(**QwenCopy.base_config(base))
    copy._fill(base, added=set(), unused=set())
    inputs = {
        "hidden_states": torch.randn(1, 6, 16),
        "encoder_hidden_states": torch.randn(1, 3, 16),
        "encoder_hidden_states_mask": torch.ones(1, 3, dtype=torch.bool),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 2, 3)]],
    }
    assert torch.equal(copy(**inputs).sample, base(**inputs).sample)
