# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest
from diffusers import Flux2KleinPipeline

from tapo_trl.estimate.memory import count_bytes, count_parameters
from tapo_trl.estimate.meta_models import load_meta_policy
from tapo_trl.policies import SD3Policy, WanPolicy
from tapo_trl.policies.flux2 import Flux2KleinPolicy
from tapo_trl.rewards import SLRMModel
from tests.testing_utils import tiny_sd3_pipeline, tiny_wan_pipeline


SD35, WAN = "stabilityai/stable-diffusion-3.5-medium", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


class TestKnownPipelines:
    @pytest.mark.parametrize(
        ("name", "parameters", "size", "latent_shape", "length", "tokens"),
        [
            (SD35, 2_243_171_520, (512, 512), (16, 64, 64), 256, (1024, 333)),
            (SD35.replace("medium", "large"), 8_056_627_520, (1024, 1024), (16, 128, 128), 256, (4096, 333)),
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
        assert policy.num_tokens(latent_shape, length) == tokens

    def test_14b_by_its_name(self):
        policy, _ = load_meta_policy("Wan-AI/Wan2.1-T2V-14B-Diffusers")
        assert 14.2e9 < count_parameters(policy.transformer) < 14.4e9

    def test_unknown_name(self):
        with pytest.raises(ValueError, match=f"no pipeline `user/model` here.*{WAN}"):
            load_meta_policy("user/model")


class TestFolders:
    def test_a_distilled_model_has_no_guidance(self, tmp_path):
        Flux2KleinPipeline(**Flux2KleinPolicy.tiny().components, is_distilled=True).save_pretrained(tmp_path)
        policy, _ = load_meta_policy(str(tmp_path))
        assert policy.guidance == "none" and not policy.is_guided(4.0)

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
            assert policy.num_tokens((4, 8, 8), 5) == (16, 8 + 5)
            assert family(pipeline).encode_prompts(["cat"], 5).prompt_embeds.shape[1] == 8 + 5
