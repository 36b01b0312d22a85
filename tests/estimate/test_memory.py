# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from tapo_trl.estimate.memory import (
    activation_rows,
    count_bytes,
    count_parameters,
    reward_memory,
    shared_reward_memory,
)
from tapo_trl.estimate.meta_models import load_meta_policy
from tapo_trl.rewards import SLRMModel


SD35, WAN = "stabilityai/stable-diffusion-3.5-medium", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


class TestMemory:
    def test_activations(self):
        policy, _ = load_meta_policy(WAN)
        (whole,) = activation_rows(policy.transformer, 4, 100, checkpointing=False)
        inputs, block = activation_rows(policy.transformer, 4, 100, checkpointing=True)
        assert inputs.value == 30 * 4 * 100 * 1536 * 2
        assert whole.value == 30 * block.value

    def test_reward_model_in_float8_and_block_by_block(self):
        policy, _ = load_meta_policy(WAN)
        whole = reward_memory(SLRMModel.without_weights(policy), False, False).value
        rounded = reward_memory(SLRMModel.without_weights(policy), True, False).value
        offloaded = reward_memory(SLRMModel.without_weights(policy), False, True).value
        assert whole == count_bytes(SLRMModel.without_weights(policy))
        assert 0.25 * whole < rounded < 0.45 * whole
        assert offloaded < 0.2 * whole

    def test_shared_backbone_is_counted_once(self):
        policy, _ = load_meta_policy(SD35)
        slrm = SLRMModel.without_weights(policy)
        own = shared_reward_memory(slrm, 1000).value
        in_full = count_parameters(slrm) - count_parameters(policy.transformer)
        assert own == 4 * (in_full + 1000)
