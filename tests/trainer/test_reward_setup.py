# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tapo_trl import SLRMModel, TAPOConfig
from tapo_trl.policies import SD3Policy, WanPolicy
from tapo_trl.rewards.scoring import LatentReward, PixelReward
from tapo_trl.trainer.reward_setup import (
    check_reward_functions,
    check_rewards,
    load_reward,
    move_reward,
    store_in_float8,
)
from tests.testing_utils import tiny_sd3_pipeline, tiny_wan_pipeline


FAMILIES = {
    "sd3": (lambda: SD3Policy(tiny_sd3_pipeline()), (32, 32)),
    "wan": (lambda: WanPolicy(tiny_wan_pipeline()), (32, 32, 5)),
}


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def make_args(tmp_path, **kwargs):
    return TAPOConfig(str(tmp_path), use_cpu=True, bf16=False, max_sequence_length=6, **kwargs)


@pytest.fixture(params=sorted(FAMILIES))
def policy_and_inputs(request):
    """A policy, and latents, their noise level, prompts and a target."""
    make_policy, size = FAMILIES[request.param]
    policy = make_policy()
    shape = policy.latent_shape(*size)
    embeds = policy.encode_prompts(["cat", "dog"] * 3, 6)
    inputs = (torch.randn(6, *shape), torch.tensor(0.5), embeds.prompt_embeds, embeds.pooled_prompt_embeds)
    return policy, (*inputs, torch.randn(6, *shape))


class TestLayerwiseCasting:
    @torch.no_grad()
    def test_scores_hardly_change(self, policy_and_inputs):
        policy, inputs = policy_and_inputs
        slrm = SLRMModel.from_policy(policy)
        before = slrm.score(*inputs)
        store_in_float8(slrm)
        after = slrm.score(*inputs)
        assert not torch.equal(after, before), "the weights were rounded"
        torch.testing.assert_close(after, before, rtol=0.02, atol=0.02)

    @pytest.mark.parametrize("lora", [False, True])
    def test_the_score_stream_norms_and_lora_keep_their_precision(self, policy_and_inputs, lora):
        policy, inputs = policy_and_inputs
        slrm = SLRMModel.from_policy(policy)
        if lora:
            slrm.add_lora(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="gaussian"))
        store_in_float8(slrm)
        rounded = {name for name, p in slrm.named_parameters() if p.dtype == torch.float8_e4m3fn}
        kept = {name for name, p in slrm.named_parameters() if p.dtype == torch.float32}
        assert rounded | kept == {name for name, _ in slrm.named_parameters()}
        assert any("to_q" in name for name in rounded) and any(".ff" in name for name in rounded)
        assert {f"transformer.{name}" for name in slrm.transformer.score_parameters()} <= kept
        assert all(name in kept for name, _ in slrm.named_parameters() if "norm" in name or "lora_" in name)
        assert slrm.score(*inputs).isfinite().all()


class TestLoading:
    def test_an_slrm_is_frozen_and_cast(self, tmp_path):
        policy = SD3Policy(tiny_sd3_pipeline())
        SLRMModel.from_policy(policy, max_sequence_length=6).save_pretrained(tmp_path / "slrm")
        args = make_args(tmp_path, reward_model_init_kwargs={"torch_dtype": "bfloat16"}, reward_layerwise_casting=True)
        reward = load_reward(str(tmp_path / "slrm"), policy, args)
        assert isinstance(reward, LatentReward)
        assert not any(parameter.requires_grad for parameter in reward.model.parameters())
        move_reward(reward, args)
        dtypes = {parameter.dtype for parameter in reward.model.parameters()}
        assert dtypes == {torch.bfloat16, torch.float8_e4m3fn}

    def test_a_function_stays_a_function(self, tmp_path):
        args = make_args(tmp_path)
        reward = load_reward(brightness, SD3Policy(tiny_sd3_pipeline()), args)
        move_reward(reward, args)
        assert isinstance(reward, PixelReward) and reward.function is brightness

    @pytest.mark.parametrize(
        ("rewards", "options", "message"),
        [
            ([3], {}, "`reward_model` must be"),
            ([brightness], {"reward_layerwise_casting": True}, "`reward_layerwise_casting=True` is for SLRMs"),
            ([brightness], {"reward_group_offload": True}, "`reward_group_offload=True` is for SLRMs"),
            (["outputs/slrm"], {"reward_group_offload": True}, "this run is on the CPU"),
            ([brightness], {"reward_model_init_kwargs": {"revision": "a"}}, "loaded by name, but none is"),
        ],
    )
    def test_what_cannot_work_is_refused_before_anything_is_loaded(self, tmp_path, rewards, options, message):
        with pytest.raises(ValueError, match=message):
            check_rewards(rewards, make_args(tmp_path, **options))


def test_columns_of_every_dataset_are_checked_before_loading():
    train, held_out = Dataset.from_dict({"prompt": ["fox"]}), Dataset.from_dict({"prompt": ["owl"], "style": ["oil"]})
    check_reward_functions(["outputs/slrm", brightness], [train, None])
    with pytest.raises(ValueError, match="`brightness.*'style'"):
        check_reward_functions([brightness], [train, held_out])
