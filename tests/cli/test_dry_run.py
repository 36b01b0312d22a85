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

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

import tapo_trl
from tapo_trl import FlowGRPOConfig, FlowGRPOTrainer, OnlineDiffusionDPOConfig, OnlineDiffusionDPOTrainer, TAPOConfig
from tapo_trl.cli.dry_run import (
    activation_rows,
    count_bytes,
    count_parameters,
    count_tokens,
    grpo_forwards,
    online_dpo_forwards,
    reward_memory,
    shared_reward_memory,
    tapo_forwards,
)
from tapo_trl.cli.main import main
from tapo_trl.cli.meta_models import load_meta_policy
from tapo_trl.policies import SD3Policy, WanPolicy
from tapo_trl.rewards import SLRMModel
from tapo_trl.rewards.scoring import LatentReward, WeightedReward
from tapo_trl.rollouts import PAIRINGS, TAPOSampler
from tapo_trl.schedulers import sde_step_indices

from ..testing_utils import tiny_sd3_pipeline, tiny_wan_pipeline


SD35, WAN = "stabilityai/stable-diffusion-3.5-medium", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
RECIPES = Path(tapo_trl.__file__).parents[1] / "recipes"


class TestKnownPipelines:
    @pytest.mark.parametrize(
        ("name", "parameters", "size", "latent_shape", "length", "tokens"),
        [
            (SD35, 2_243_171_520, (512, 512), (16, 64, 64), 256, (1024, 333)),
            (WAN, 1_418_996_800, (480, 832, 81), (16, 21, 60, 104), 512, (32_760, 512)),
            (WAN, 1_418_996_800, (480, 832, 49), (16, 13, 60, 104), 512, (20_280, 512)),
        ],
    )
    def test_parameters_and_tokens(self, name, parameters, size, latent_shape, length, tokens):
        policy, source = load_meta_policy(name)
        assert source == "the configuration that ships with tapo_trl"
        assert policy.transformer.device.type == policy.vae.device.type == "meta"
        assert count_parameters(policy.transformer) == parameters
        assert policy.latent_shape(*size) == latent_shape
        assert count_tokens(policy, latent_shape, length) == tokens

    def test_14b_by_its_name(self):
        policy, _ = load_meta_policy("Wan-AI/Wan2.1-T2V-14B-Diffusers")
        assert 14.2e9 < count_parameters(policy.transformer) < 14.4e9

    def test_unknown_name(self):
        with pytest.raises(ValueError, match=f"no pipeline `user/model` here.*{WAN}"):
            load_meta_policy("user/model")


class TestFolders:
    @pytest.mark.parametrize(("make", "family"), [(tiny_sd3_pipeline, SD3Policy), (tiny_wan_pipeline, WanPolicy)])
    def test_counts_are_those_of_the_loaded_model(self, tmp_path, make, family):
        pipeline = make()
        pipeline.save_pretrained(tmp_path)
        policy, source = load_meta_policy(str(tmp_path))
        assert isinstance(policy, family)
        assert source == "the folder's configuration"
        assert count_parameters(policy.transformer) == count_parameters(pipeline.transformer)
        assert count_bytes(policy.transformer) == count_bytes(pipeline.transformer)
        slrm = SLRMModel.from_policy(family(pipeline), num_task_tokens=3)
        assert count_parameters(SLRMModel.without_weights(policy, num_task_tokens=3)) == count_parameters(slrm)
        if family is SD3Policy:
            assert count_tokens(policy, (4, 8, 8), 5) == (16, 8 + 5)
            assert family(pipeline).encode_prompts(["cat"], 5).prompt_embeds.shape[1] == 8 + 5


class CountingPolicy(SD3Policy):
    """Counts the latents that go through each network."""

    def forward(self, model, latents, timestep, prompt_embeds):
        self.latents.append(len(latents))
        return super().forward(model, latents, timestep, prompt_embeds)


class TestForwards:
    @pytest.mark.parametrize("velocity_target", ["parent", "policy", "reference"])
    @pytest.mark.parametrize(
        ("steps", "sde_steps", "guidance_scale", "pairing"),
        [
            (6, 3, 2.0, "tapo"),
            (5, 2, 1.0, "tapo"),
            (9, 3, 2.0, "tapo"),
            (6, 3, 2.0, "tapo_within"),
            (6, 3, 2.0, "spo"),
        ],
    )
    def test_are_those_of_a_rollout(self, tmp_path, velocity_target, steps, sde_steps, guidance_scale, pairing):
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
            pairing=PAIRINGS[pairing],
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


class TestCommand:
    def run(self, capsys, *argv):
        assert main([*argv]) == 0
        return capsys.readouterr().out

    @pytest.mark.parametrize(
        ("recipe", "expected"),
        [
            ("sd35/tapo", ["16 x 64 x 64", "1,024 of a sample + 333", "2,243,171,520 policy", "47,775,744 LoRA"]),
            (
                "sd35/slrm",
                ["16 x 64 x 64", "2,243,171,520 base model", "for one pair, of which an optimizer step has 4"],
            ),
            (
                "sd35/dpo",
                ["16 x 64 x 64", "47,775,744 LoRA", "2 reference, training", "an optimizer step has 16"],
            ),
            ("sd35/tapo_24gb", ["4.60 policy", "0.93 reward model", "the backbone is the policy's", "7.29 sum"]),
            ("sd35/slrm_24gb", ["4.18 reward model", "8.48 sum"]),
            ("wan21/tapo_24gb", ["17 frames of 480 x 832", "the backbone is the policy's", "10.31 sum"]),
            (
                "wan21/tapo",
                ["81 frames of 480 x 832", "16 x 21 x 60 x 104", "32,760 of a sample + 512", "1,418,996,800"],
            ),
            (
                "wan21/slrm",
                ["49 frames of 480 x 832", "16 x 13 x 60 x 104", "20,280 of a sample + 512", "1,418,996,800"],
            ),
        ],
    )
    def test_recipes(self, capsys, tmp_path, monkeypatch, recipe, expected):
        monkeypatch.chdir(tmp_path)
        command = recipe.split("/")[1].removesuffix("_24gb")
        text = self.run(capsys, command, "--config", str(RECIPES / f"{recipe}.yaml"), "--dry_run")
        assert all(part in text for part in expected), text
        assert "is an estimate" in text
        assert list(tmp_path.iterdir()) == [], "nothing is written"

    @pytest.mark.parametrize("command", ["online_dpo", "grpo"])
    def test_online_methods(self, capsys, tmp_path, command):
        model = ["--model_name_or_path", "stabilityai/stable-diffusion-3.5-medium", "--use_peft", "--dry_run"]
        text = self.run(capsys, command, "--output_dir", str(tmp_path), "--reward_model", "judges:aesthetics", *model)
        assert f"`{command}` with stabilityai" in text and "16 x 64 x 64" in text and "47,775,744 LoRA" in text
        expected = {
            "online_dpo": [
                "320 policy, rollout",
                "8 reference, training",
                "of a rollout",
                "2 samples + noise at 4 levels",
            ],
            "grpo": ["160 policy, rollout", "144 reference, training", "n x 64 trajectories x 3 (x, x', mean)"],
        }
        assert all(part in text for part in expected[command]), text

    def test_weights_in_float8(self, capsys):
        flags = ["--dry_run", "true", "--layerwise_casting", "true", "--share_backbone", "false"]
        text = self.run(capsys, "tapo", "--config", str(RECIPES / "sd35" / "tapo_24gb.yaml"), *flags)
        assert "3.23 policy" in text and "linear layers x 1 byte" in text

    def test_inversions(self, capsys):
        flags = ["--dry_run", "true", "--variant", "inversion_dpo", "--cache_inversions", "true"]
        text = self.run(capsys, "dpo", "--config", str(RECIPES / "sd35" / "dpo.yaml"), *flags)
        assert "56 reference, inversion" in text  # both sides, 28 steps
        assert "0.01 inversions of one pair" in text and "on disk: 56 latents" in text

    @pytest.mark.parametrize("flags", [["--dry_run", "true"], ["--dry_run=true"]])
    def test_other_spellings(self, capsys, flags):
        text = self.run(capsys, "tapo", "--config", str(RECIPES / "wan21" / "tapo.yaml"), *flags)
        assert "1,418,996,800" in text and "is an estimate" in text

    def test_reads_the_recipe_and_the_folder(self, capsys, tmp_path):
        tiny_wan_pipeline().save_pretrained(tmp_path / "base")
        SLRMModel.from_policy(WanPolicy(tiny_wan_pipeline()), num_task_tokens=3).save_pretrained(tmp_path / "slrm")
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"model_name_or_path: {tmp_path}/base\nreward_model: [{tmp_path}/slrm]\noutput_dir: {tmp_path}/out\n"
            "resolution: 32\nnum_frames: 9\ndry_run: true\n"
        )
        text = self.run(capsys, "tapo", "--config", str(recipe))
        assert "4 x 3 x 4 x 4" in text
        assert "12 of a sample + 512 of its prompt" in text
        assert "one with the default options" not in text

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--num_frames", "80"], "`num_frames` one more than a multiple of 4"),
            (["--height", "470"], "nearest that fit are 464, 832 and 81"),
        ],
    )
    def test_sizes_that_do_not_fit(self, flags, message):
        recipe = str(RECIPES / "wan21" / "tapo.yaml")
        with pytest.raises(ValueError, match=message):
            main(["tapo", "--config", recipe, "--dry_run", "true", *flags])
