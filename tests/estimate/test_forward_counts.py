# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tapo_trl import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    FlowGRPOConfig,
    FlowGRPOTrainer,
    OnlineDiffusionDPOConfig,
    OnlineDiffusionDPOTrainer,
    SLRMConfig,
    SLRMTrainer,
    TAPOConfig,
    TAPOTrainer,
)
from tapo_trl.estimate.forward_counts import count_pair, count_reward_pair, count_rollout
from tapo_trl.estimate.meta_models import load_meta_policy
from tapo_trl.policies import SD3Policy
from tapo_trl.rewards import LatentReward, SLRMModel, WeightedReward
from tapo_trl.rollouts import PAIRINGS, TAPOSampler, get_pairing
from tapo_trl.schedulers import sde_step_indices
from tests.data.preference_pairs import color_pairs
from tests.testing_utils import tiny_sd3_pipeline


class CountingPolicy(SD3Policy):
    """Counts the latents that go through each network."""

    def forward(self, model, latents, *args):
        self.latents.append(len(latents))
        return super().forward(model, latents, *args)


def meta_policy(folder):
    tiny_sd3_pipeline().save_pretrained(folder / "pipeline")
    return load_meta_policy(str(folder / "pipeline"))[0]


def values_of(counts):
    return {row.name: row.value for row in counts.rows()}


class TestForwards:
    @pytest.mark.parametrize("velocity_target", ["parent", "policy", "reference", "estimates"])
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
        of_estimates = velocity_target == "estimates"
        velocity_target = None if of_estimates else velocity_target
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
            reward=WeightedReward([LatentReward(slrm, velocity_target, of_estimates=of_estimates)]),
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
            velocity_target=velocity_target,
            score_estimates=of_estimates,
            height=32,
            width=32,
            max_sequence_length=3,
            use_cpu=True,
            bf16=False,
        )
        meta = meta_policy(tmp_path)
        counts, rollout, at_once = count_rollout(TAPOTrainer, args, meta, [SLRMModel.without_weights(meta)])
        rows = values_of(counts)
        assert sum(scored) == rows.pop("reward model")
        assert at_once == 2 * PAIRINGS[pairing].num_branches
        training = PAIRINGS[pairing].num_branches * sde_steps * (2 if guidance_scale > 1 else 1)
        assert rows.pop("policy, training (forward and backward)") == rows.pop("reference, training") == training
        assert rollout.num_examples == sde_steps * PAIRINGS[pairing].pairs_per_prompt
        assert sum(policy.latents) == sum(rows.values())
        at_candidates = {"parent": set(), "reference": {"reference, at the candidates"}}
        expected = {"policy, rollout"} | at_candidates.get(velocity_target, {"policy, at the candidates"})
        assert rows.keys() == expected

    def test_functions_ask_for_the_velocity_at_the_candidates(self, tmp_path):
        args = TAPOConfig(
            str(tmp_path), num_inference_steps=5, num_sde_steps=2, num_candidates=3, guidance_scale=1.0, height=32,
            width=32, max_sequence_length=3, use_cpu=True, bf16=False,
        )  # fmt: skip
        counts, _, _ = count_rollout(TAPOTrainer, args, meta_policy(tmp_path), has_function=True)
        assert values_of(counts)["policy, at the candidates"] == 2 * 2 * 3


class TestUpdates:
    """The counts of a training on the CPU."""

    def count(self, tmp_path, config, kwargs, guidance_scale=1.0):
        policy = CountingPolicy(tiny_sd3_pipeline())
        policy.latents = []
        args = config(
            str(tmp_path),
            **kwargs,
            num_inference_steps=4,
            guidance_scale=guidance_scale,
            per_device_train_batch_size=1,
            max_steps=1,
            height=32,
            width=32,
            max_sequence_length=3,
            cache_dir=str(tmp_path / "cache"),
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            activation_checkpointing=False,
        )
        return policy, args, meta_policy(tmp_path), LoraConfig(r=2, lora_alpha=2)

    @pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
    @pytest.mark.parametrize(
        ("config", "trainer", "kwargs"),
        [
            (OnlineDiffusionDPOConfig, OnlineDiffusionDPOTrainer, {"num_noise_levels": 2}),
            (FlowGRPOConfig, FlowGRPOTrainer, {"num_sde_steps": 2}),
            (FlowGRPOConfig, FlowGRPOTrainer, {"beta": 0.0}),
            (FlowGRPOConfig, FlowGRPOTrainer, {"t_init": 1, "num_sde_steps": 2, "shared_noise": True}),
        ],
    )
    def test_on_samples(self, tmp_path, config, trainer, kwargs, guidance_scale):
        kwargs = kwargs | {"num_generations": 3}
        policy, args, meta, peft_config = self.count(tmp_path, config, kwargs, guidance_scale)
        counts, _, at_once = count_rollout(trainer, args, meta, [SLRMModel.without_weights(meta)])
        slrm, scored = SLRMModel.from_policy(policy, max_sequence_length=3), []
        slrm.register_forward_pre_hook(lambda module, args: scored.append(len(args[0])))
        trainer(policy, slrm, args, Dataset.from_dict({"prompt": ["cat"]}), peft_config=peft_config).train()
        rows = values_of(counts)
        assert sum(scored) == rows.pop("reward model") == at_once == 3
        assert sum(policy.latents) == sum(rows.values())
        assert ("reference, training" in rows) == (args.beta > 0)

    def test_on_samples_with_an_update_without_guidance(self, tmp_path):
        kwargs = {"num_sde_steps": 2, "train_cfg": False}
        self.test_on_samples(tmp_path, FlowGRPOConfig, FlowGRPOTrainer, kwargs, guidance_scale=2.0)

    @pytest.mark.parametrize(
        ("pairing", "pairs_per_update", "train_cfg", "guidance_scale"),
        [("tapo", 2, True, 2.0), ("tapo", None, False, 2.0), ("tapo_within", 3, True, 1.0), ("spo", 1, False, 2.0)],
    )
    def test_on_some_of_the_pairs(self, tmp_path, pairing, pairs_per_update, train_cfg, guidance_scale):
        kwargs = {"pairing": pairing, "pairs_per_update": pairs_per_update, "num_sde_steps": 3, "num_candidates": 2}
        kwargs |= {"train_cfg": train_cfg, "velocity_target": "parent"}
        policy, args, meta, peft_config = self.count(tmp_path, TAPOConfig, kwargs, guidance_scale)
        counts, rollout, _ = count_rollout(TAPOTrainer, args, meta, [SLRMModel.without_weights(meta)])
        slrm = SLRMModel.from_policy(policy, max_sequence_length=3)
        TAPOTrainer(policy, slrm, args, Dataset.from_dict({"prompt": ["cat"]}), peft_config=peft_config).train()
        rows = values_of(counts)
        rows.pop("reward model")
        assert sum(policy.latents) == sum(rows.values())
        assert rollout.num_examples == (pairs_per_update or 3)
        parents, rows_of_each = 2 if pairing == "tapo" else 1, 2 if train_cfg and guidance_scale > 1 else 1
        assert rows["reference, training"] == rollout.num_examples * parents * rows_of_each

    @pytest.mark.parametrize("variant", ["diffusion_dpo", "inversion_dpo"])
    def test_on_pairs(self, tmp_path, variant):
        kwargs = {"variant": variant, "cache_inversions": variant == "inversion_dpo"}
        policy, args, meta, peft_config = self.count(tmp_path, DiffusionDPOConfig, kwargs)
        rows = values_of(count_pair(DiffusionDPOTrainer, args, meta))
        pairs = color_pairs(1)
        DiffusionDPOTrainer(policy, args, pairs, peft_config=peft_config).train()
        assert sum(policy.latents) == sum(rows.values())
        assert rows.get("reference, inversion", 0) == (2 * 4 if variant == "inversion_dpo" else 0)

    @pytest.mark.parametrize("velocity_target", ["ground_truth", "reference"])
    def test_of_a_reward_model(self, tmp_path, velocity_target):
        _, _, meta, _ = self.count(tmp_path, DiffusionDPOConfig, {})
        args = SLRMConfig(
            str(tmp_path), velocity_target=velocity_target, height=32, width=32, max_sequence_length=3, use_cpu=True, bf16=False
        )  # fmt: skip
        args.fill_in({})
        rows = values_of(count_reward_pair(SLRMTrainer, args, meta, SLRMModel.without_weights(meta)))
        expected = {"reward model (forward and backward)": 2} | (
            {"base model": 2} if velocity_target == "reference" else {}
        )
        assert rows == expected
