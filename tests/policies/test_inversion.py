# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Inversion of the sampling ODE, for every family, and its cache."""

import pytest
import torch

from tapo_trl.data.inversions import InversionCache
from tapo_trl.policies import SD3Policy, WanPolicy
from tests.testing_utils import tiny_sd3_pipeline, tiny_wan_pipeline


FAMILIES = {"sd3": (SD3Policy, tiny_sd3_pipeline, (4, 8, 8)), "wan": (WanPolicy, tiny_wan_pipeline, (4, 2, 4, 4))}


@pytest.fixture(params=FAMILIES)
def family(request):
    make_policy, make_pipeline, shape = FAMILIES[request.param]
    policy = make_policy(make_pipeline())
    return policy, policy.encode_prompts(["a cat", "a dog"], 4), torch.randn(2, *shape)


class TestInvert:
    def test_is_the_euler_loop(self, family):
        policy, embeds, latents = family
        trajectory = policy.invert(policy.transformer, latents, embeds, num_inference_steps=5)
        assert trajectory.shape == (5, *latents.shape) and trajectory.dtype == torch.float32
        sigmas = policy.build_scheduler(5, latents.shape[1:]).sigmas
        assert sigmas[0] == 1 and sigmas[5] == 0
        x = latents
        with torch.no_grad():
            for index in (4, 3, 2, 1, 0):
                x = x + (sigmas[index] - sigmas[index + 1]) * policy.velocity(
                    policy.transformer, x, sigmas[index + 1], embeds
                )
                torch.testing.assert_close(trajectory[index], x)

    def test_stops_where_it_is_told_to(self, family):
        policy, embeds, latents = family
        whole = policy.invert(policy.transformer, latents, embeds, num_inference_steps=5)
        part = policy.invert(policy.transformer, latents, embeds, num_inference_steps=5, first_index=3)
        assert torch.equal(part, whole[3:])

    def test_sampling_leads_back(self, family):
        """The better, the more steps there are."""
        policy, embeds, latents = family
        errors = []
        for steps in (10, 80):
            noise = policy.invert(policy.transformer, latents, embeds, num_inference_steps=steps)[0]
            scheduler, x = policy.build_scheduler(steps, latents.shape[1:]), noise
            with torch.no_grad():
                for index in range(steps):
                    x = scheduler.ode_step(
                        x, policy.velocity(policy.transformer, x, scheduler.sigma(index), embeds), index
                    )
            errors.append((x - latents).abs().max().item())
        assert errors[1] < 0.25 * errors[0] and errors[1] < 0.05


class TestInversionCache:
    def test_gives_back_what_was_saved(self, tmp_path):
        policy = SD3Policy(tiny_sd3_pipeline())
        cache = InversionCache(policy, tmp_path, 3)
        latents, trajectories = torch.randn(2, 4, 8, 8), torch.randn(3, 2, 4, 8, 8)
        assert cache.load(["a", "b"], latents) is None
        cache.save(["a", "b"], latents, trajectories)
        assert torch.equal(cache.load(["b", "a"], latents.flip(0)), trajectories.flip(1))
        assert cache.load(["b", "a"], latents) is None, "another prompt"
        assert cache.load(["a", "b"], latents + 1e-6) is None, "another latent"
        assert not list(tmp_path.rglob("*.tmp"))

    def test_is_of_one_transformer_and_scheduler(self, tmp_path):
        def folder(pipeline, *args):
            return InversionCache(SD3Policy(pipeline), tmp_path, *args).folder

        tuned, shifted = tiny_sd3_pipeline(), tiny_sd3_pipeline()
        tuned.transformer.pos_embed.proj.bias.data += 1e-3
        shifted.scheduler = shifted.scheduler.from_config(shifted.scheduler.config, shift=2.0)
        folders = [
            folder(tiny_sd3_pipeline(), 3),
            folder(tuned, 3),
            folder(shifted, 3),
            folder(tiny_sd3_pipeline(), 4),
        ]
        assert len({*folders, folder(tiny_sd3_pipeline(), 3, (torch.bfloat16,))}) == 5
        assert folder(tiny_sd3_pipeline(), 3) == folders[0]

    def test_is_of_one_way_to_embed_prompts(self, tmp_path):
        def folder(pipeline, **kwargs):
            return InversionCache(SD3Policy(pipeline), tmp_path, 3, **kwargs).folder

        tuned = tiny_sd3_pipeline()
        tuned.text_encoder_2.get_input_embeddings().weight.data[40, 7] += 1e-3
        folders = {
            folder(tiny_sd3_pipeline()),
            folder(tuned),
            folder(tiny_sd3_pipeline(), max_sequence_length=4),
            folder(tiny_sd3_pipeline(), embeds_dtype=torch.bfloat16),
        }
        assert len(folders) == 4
