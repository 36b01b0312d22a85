# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from types import MethodType

import pytest
import torch
from diffusers import ClassifierFreeGuidance, SkipLayerGuidance

from tapo_trl.policies import load_policy
from tapo_trl.policies.hunyuan_video import HunyuanVideoPolicy
from tapo_trl.policies.hunyuan_video15 import HunyuanVideo15Policy, forward_of_shapes


class TestPrompts:
    @pytest.mark.parametrize(("policy_class", "end"), [(HunyuanVideoPolicy, 10), (HunyuanVideo15Policy, 13)])
    def test_the_template_is_cut_off(self, policy_class, end):
        """The prompt's bytes are left, and those that end the template."""
        policy = load_policy(policy_class.tiny())
        prompts = policy.encode_prompts(["red cat", "é"])
        assert [len(row["prompt_embeds"]) for row in prompts.rows()] == [7 + end, 2 + end]
        assert not prompts.prompt_embeds[1, 2 + end :].any()
        assert prompts.prompt_embeds[1, : 2 + end].any(-1).all()

    def test_quoted_text_is_encoded_once_more(self):
        policy = load_policy(HunyuanVideo15Policy.tiny())
        plain, quoted = policy.encode_prompts(["a sign", 'a sign that says "hi"']).rows()
        assert plain["prompt_embeds_2_mask"].tolist() == [False] and quoted["prompt_embeds_2_mask"].sum() > 2
        latents = torch.randn(1, *policy.latent_shape(32, 32, 5))
        prompts = policy.encode_prompts(['a sign that says "hi"'])
        with torch.no_grad():
            velocity = policy.velocity(policy.transformer, latents, 0.5, prompts)
            prompts.tensors["prompt_embeds_2"] = -prompts.tensors["prompt_embeds_2"]
            other = policy.velocity(policy.transformer, latents, 0.5, prompts)
        assert velocity.isfinite().all() and not torch.allclose(velocity, other, atol=1e-4)

    @pytest.mark.parametrize("policy_class", [HunyuanVideoPolicy, HunyuanVideo15Policy])
    def test_after_unloading_there_is_a_clear_error(self, policy_class):
        policy = load_policy(policy_class.tiny())
        policy.unload_text_encoders()
        with pytest.raises(ValueError, match="no text encoder"):
            policy.encode_prompts(["cat"])


class TestVideos:
    def test_groups_of_frames_are_those_of_the_vae(self):
        """From 17 frames on: the autoencoder's own overlap."""
        policy = load_policy(HunyuanVideoPolicy.tiny())
        videos = torch.rand(1, 3, 21, 16, 16)
        latents = policy.encode(videos)
        assert latents.shape[1:] == policy.latent_shape(16, 16, 21)
        with torch.no_grad():
            expected = policy.vae.encode(videos * 2 - 1).latent_dist.mode() * policy.vae.config.scaling_factor
        assert torch.equal(latents, expected)
        policy.vae.use_framewise_encoding = False
        assert not torch.allclose(policy.encode(videos), latents, atol=1e-3)

    def test_one_video_at_a_time(self):
        policy = load_policy(HunyuanVideo15Policy.tiny())
        latents = torch.randn(2, *policy.latent_shape(32, 32, 5))
        both = policy.decode(latents)
        torch.testing.assert_close(both[1:], policy.decode(latents[1:]))
        torch.testing.assert_close(policy.encode(both)[:1], policy.encode(both[:1]))


class TestRefused:
    def test_conditions(self):
        with pytest.raises(ValueError, match="Only text to video.*`hunyuanvideo-community/HunyuanVideo`"):
            load_policy(HunyuanVideoPolicy.tiny(image_condition_type="latent_concat"))
        with pytest.raises(ValueError, match="Only text to video.*480p_t2v"):
            load_policy(HunyuanVideo15Policy.tiny(task_type="i2v"))

    @pytest.mark.parametrize(
        "guider",
        [
            SkipLayerGuidance(skip_layer_guidance_layers=[0]),
            ClassifierFreeGuidance(guidance_rescale=0.5),
            ClassifierFreeGuidance(stop=0.8),
        ],
    )
    def test_other_guidance(self, guider):
        pipeline = HunyuanVideo15Policy.tiny()
        pipeline.guider = guider
        with pytest.raises(ValueError, match="`guider` must be a `ClassifierFreeGuidance`"):
            load_policy(pipeline)


def test_without_values_the_forward_is_the_same():
    policy = load_policy(HunyuanVideo15Policy.tiny())
    latents = torch.randn(2, *policy.latent_shape(32, 64, 5))
    prompts = policy.encode_prompts(["a cat", 'a "dog" that runs'])
    with torch.no_grad():
        expected = policy.velocity(policy.transformer, latents, 0.5, prompts)
        policy.transformer.forward = MethodType(forward_of_shapes, policy.transformer)
        found = policy.velocity(policy.transformer, latents, 0.5, prompts)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
