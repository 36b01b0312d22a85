# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from tapo_trl.rewards import WeightedReward
from tapo_trl.rollouts import OnlineDPOSampler
from tests.rollouts.test_pairs import PROMPTS, RecordingReward, first_value, run


K, LEVELS = 4, 3


def make_sampler(policy, reward, store_on=None):
    latent_shape = policy.latent_shape(32, 32)
    return OnlineDPOSampler(
        policy=policy,
        scheduler=policy.build_scheduler(6, latent_shape),
        num_generations=K,
        num_noise_levels=LEVELS,
        draw_sigma=lambda generator: torch.rand(1, generator=generator),
        reward=WeightedReward([reward]),
        latent_shape=latent_shape,
        guidance_scale=3.0,
        store_on=store_on,
    )


def pipeline_samples(policy, prompt, noise):
    return policy.pipeline(
        [prompt] * len(noise),
        height=32,
        width=32,
        num_inference_steps=6,
        guidance_scale=3.0,
        latents=noise,
        max_sequence_length=3,
        output_type="latent",
    ).images


class TestOnlineDPOSampler:
    def test_pairs_are_the_best_and_the_worst_of_the_pipelines_samples(self, tiny_sd3_policy):
        pairs = run(make_sampler(tiny_sd3_policy, RecordingReward(first_value)), tiny_sd3_policy)
        for b, prompt in enumerate(PROMPTS):
            noise = torch.randn(K, 4, 8, 8, generator=torch.Generator().manual_seed(b))
            samples = pipeline_samples(tiny_sd3_policy, prompt, noise)
            scores = samples.flatten(1)[:, 0].tolist()
            torch.testing.assert_close(pairs.rewards[b], torch.tensor(scores), rtol=1e-4, atol=1e-4)
            ends = samples[[scores.index(max(scores)), scores.index(min(scores))]]
            torch.testing.assert_close(pairs.samples[:, b], ends, rtol=1e-4, atol=1e-4)

    def test_a_tie_is_a_pair_of_one_sample(self, tiny_sd3_policy):
        constant = RecordingReward(lambda samples: torch.ones(len(samples)))
        pairs = run(make_sampler(tiny_sd3_policy, constant), tiny_sd3_policy)
        assert torch.equal(*pairs.samples)

    def test_draws_depend_on_the_generator_of_the_prompt_alone(self, tiny_sd3_policy):
        sampler = make_sampler(tiny_sd3_policy, RecordingReward(first_value))
        together, alone = run(sampler, tiny_sd3_policy), run(sampler, tiny_sd3_policy, [PROMPTS[2]], seeds=[2])
        assert torch.equal(together.sigmas[:, 2], alone.sigmas[:, 0])
        assert torch.equal(together.noise[:, 2], alone.noise[:, 0])
        assert len(together.sigmas.unique()) == LEVELS * len(PROMPTS)

    @pytest.mark.parametrize("chunk_size", [2, 100])
    def test_both_sides_have_one_noise_and_one_level(self, tiny_sd3_policy, chunk_size):
        pairs = run(make_sampler(tiny_sd3_policy, RecordingReward(first_value), store_on="cpu"), tiny_sd3_policy)
        seen = 0
        for chunk in pairs.transitions(chunk_size):
            for example in range(len(chunk.weights)):
                level, b = divmod(seen, len(PROMPTS))
                sigma, noise = pairs.sigmas[level, b], pairs.noise[level, b]
                assert chunk.sigmas[example] == sigma
                for side in range(2):
                    clean = pairs.samples[side, b]
                    noisy = chunk.noisy_latents[side, example]
                    torch.testing.assert_close(noisy, (1 - sigma) * clean + sigma * noise)
                    # The velocity leads from the noisy latent back to the clean one
                    torch.testing.assert_close(noisy - sigma * chunk.velocities[side, example], clean)
                seen += 1
        assert seen == LEVELS * len(PROMPTS)
