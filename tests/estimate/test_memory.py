# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tapo_trl.estimate.memory import (
    count_bytes,
    count_parameters,
    policy_activations,
    reward_activations,
    reward_memory,
    shared_reward_memory,
)
from tapo_trl.estimate.meta_models import load_meta_policy
from tapo_trl.rewards import SLRMModel


SD35, WAN = "stabilityai/stable-diffusion-3.5-medium", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


class TestActivations:
    @pytest.mark.parametrize(("name", "shape", "length"), [(SD35, (16, 20, 20), 28), (WAN, (16, 1, 20, 20), 28)])
    def test_with_lora_in_half_precision(self, name, shape, length):
        policy, _ = load_meta_policy(name)
        transformer = policy.transformer.requires_grad_(False).bfloat16()
        with torch.device("meta"):
            get_peft_model(transformer, LoraConfig(r=64, target_modules=policy.lora_target_modules))
        found = policy_activations(policy, shape, length, torch.bfloat16)
        tokens, text = policy.num_tokens(shape, length)
        stream = tokens + text if policy.joint_text else tokens
        config = transformer.config
        dim = config.num_attention_heads * config.attention_head_dim
        assert found.num_blocks == config.num_layers
        # A block keeps about 60 bytes per token and channel, and one number of two bytes of its input
        assert 45 < found.kept / (found.num_blocks * stream * dim) < 75
        assert 1.9 < found.inputs / (found.num_blocks * stream * dim) < 4.1
        (whole,) = found.rows(4, checkpointing=False)
        inputs, block = found.rows(4, checkpointing=True)
        assert whole.value == 4 * found.kept and inputs.value == 4 * found.inputs
        assert whole.value == pytest.approx(found.num_blocks * block.value)

    def test_are_what_a_backward_pass_keeps(self, tiny_sd3_policy):
        """Of a small network whose tensors are real ones."""
        policy, shape = tiny_sd3_policy, (4, 8, 8)
        kept = []
        for batch_size in (1, 2):
            storages = {}

            def pack(tensor):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # noqa: B023
                return tensor

            embeds = policy.encode_prompts(["cat"] * batch_size, 3)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                policy.forward(policy.transformer, torch.randn(batch_size, *shape), torch.rand(batch_size), embeds)
            kept.append(sum(storage.nbytes() for storage in storages.values()))
        meta = type(policy)(policy.pipeline)
        assert policy_activations(meta, shape, 3, None).kept == pytest.approx(kept[1] - kept[0], rel=0.02)

    def test_of_an_slrm(self):
        policy, _ = load_meta_policy(SD35)
        base = policy_activations(policy, (16, 20, 20), 28, torch.bfloat16)
        slrm = SLRMModel.without_weights(policy, max_sequence_length=28)
        found = reward_activations(slrm, policy, (16, 20, 20), torch.bfloat16)
        assert found.num_blocks == base.num_blocks
        assert 1 < found.kept / base.kept < 1.5


class TestMemory:
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
