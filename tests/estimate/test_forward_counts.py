# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tapo_trl import FlowGRPOConfig, FlowGRPOTrainer, OnlineDiffusionDPOConfig, OnlineDiffusionDPOTrainer, TAPOConfig
from tapo_trl.estimate.forward_counts import grpo_forwards, online_dpo_forwards, tapo_forwards
from tapo_trl.policies import SD3Policy
from tapo_trl.rewards import SLRMModel
from tapo_trl.rewards.scoring import LatentReward, WeightedReward
from tapo_trl.rollouts import PAIRINGS, TAPOSampler, get_pairing
from tapo_trl.schedulers import sde_step_indices
from tests.testing_utils import tiny_sd3_pipeline


class CountingPolicy(SD3Policy):
    """Counts the latents that go through each network."""

    def forward(self, model, latents, *args):
        self.latents.append(len(latents))
        return super().forward(model, latents, *args)


class TestForwards:
    @pytest.mark.parametrize("velocity_target", ["parent", "policy", "reference"])
    @pytest.mark.parametrize(
        ("steps", "sde_steps", "guidance_scale", "pairing"),
        [
            (6, 3, 2.0, "tapo"),
            (6, 3, 2.0, "tapo, consistent"),
            (5, 2, 1.0, "tapo"),
            (9, 3, 2.0, "tapo"),
            (6, 3, 2.0, "tapo_within"),
            (6, 3, 2.0, "spo"),
        ],
    )
    def test_are_those_of_a_rollout(self, tmp_path, velocity_target, steps, sde_steps, guidance_scale, pairing):
        pairing, consistent = pairing.partition(",")[0], pairing.endswith("consistent")
        policy = CountingPolicy(tiny_sd3_pipeline())
        policy.latents = []
        slrm = SLRMModel.from_policy(policy)
        scored = []
        slrm.register_forward_pre_hook(lambda module, args: scored.append(len(args[0])))
        scheduler = policy.build_scheduler(steps, (4, 8, 8))
        sampler = TAPOSampler(
            policy=policy,
            scheduler=scheduler,
            step_indices=sde_step_indices(steps, sde_steps),
            num_candidates=2,
            reward=WeightedReward([LatentReward(slrm, velocity_target)]),
            latent_shape=(4, 8, 8),
            pairing=get_pairing(pairing, consistent=consistent),
            guidance_scale=guidance_scale,
            reference=nullcontext,  # `with nullcontext(model) as reference`
        )
        embeds = policy.encode_prompts(["cat", ""], 3)
        sampler.sample(policy.transformer, ["cat"], embeds[:1], embeds[1:], [torch.Generator().manual_seed(0)])
        args = TAPOConfig(
            str(tmp_path),
            num_inference_steps=steps,
            num_sde_steps=sde_steps,
            num_candidates=2,
            pairing=pairing,
            consistent_pairs=consistent,
            guidance_scale=guidance_scale,
            use_cpu=True,
            bf16=False,
        )
        rows = {
            row.name: row.value for row in tapo_forwards(args, scheduler.sigmas, velocity_target, latents_per_score=1)
        }
        assert sum(scored) == rows.pop("reward model")
        training = PAIRINGS[pairing].num_branches * sde_steps * (2 if guidance_scale > 1 else 1)
        assert rows.pop("policy, training (forward and backward)") == rows.pop("reference, training") == training
        assert sum(policy.latents) == sum(rows.values())


class TestSampleForwards:
    @pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
    @pytest.mark.parametrize(
        ("config", "trainer", "forwards", "kwargs"),
        [
            (OnlineDiffusionDPOConfig, OnlineDiffusionDPOTrainer, online_dpo_forwards, {"num_noise_levels": 2}),
            (FlowGRPOConfig, FlowGRPOTrainer, grpo_forwards, {"num_sde_steps": 2}),
            (FlowGRPOConfig, FlowGRPOTrainer, grpo_forwards, {"beta": 0.0}),
        ],
    )
    def test_are_those_of_an_update(self, tmp_path, config, trainer, forwards, kwargs, guidance_scale):
        policy = CountingPolicy(tiny_sd3_pipeline())
        policy.latents = []
        slrm, scored = SLRMModel.from_policy(policy, max_sequence_length=3), []
        slrm.register_forward_pre_hook(lambda module, args: scored.append(len(args[0])))
        args = config(
            str(tmp_path),
            **kwargs,
            num_generations=3,
            num_inference_steps=4,
            guidance_scale=guidance_scale,
            per_device_train_batch_size=1,
            max_steps=1,
            resolution=32,
            max_sequence_length=3,
            cache_dir=str(tmp_path / "cache"),
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            activation_checkpointing=False,
        )
        peft_config = LoraConfig(r=2, lora_alpha=2)
        dataset = Dataset.from_dict({"prompt": ["cat"]})
        trainer(policy, slrm, args, train_dataset=dataset, peft_config=peft_config).train()
        rows = {row.name: row.value for row in forwards(args, latents_per_score=1)}
        assert sum(scored) == rows.pop("reward model") == 3
        assert sum(policy.latents) == sum(rows.values())
        assert ("reference, training" in rows) == (args.beta > 0)
