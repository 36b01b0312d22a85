# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from tapo_trl.losses import group_advantages
from tapo_trl.policies import SD3Policy
from tapo_trl.rewards import PixelReward, WeightedReward
from tapo_trl.rollouts import FlowGRPOSampler
from tests.rollouts.test_pairs import PROMPTS, RecordingReward, first_value, run


STEPS, K = [0, 2, 4], 3


def make_sampler(
    policy, reward, num_generations=K, step_indices=STEPS, store_on=None, shared_noise=False, **scheduler_kwargs
):
    latent_shape = policy.latent_shape(32, 32)
    return FlowGRPOSampler(
        policy=policy,
        scheduler=policy.build_scheduler(6, latent_shape, **scheduler_kwargs),
        step_indices=step_indices,
        num_generations=num_generations,
        reward=WeightedReward([reward]),
        latent_shape=latent_shape,
        guidance_scale=3.0,
        store_on=store_on,
        shared_noise=shared_noise,
    )


class TestFlowGRPOSampler:
    @pytest.mark.parametrize("shared_noise", [False, True])
    def test_trajectories_follow_the_sde_at_its_steps_and_the_ode_elsewhere(self, tiny_sd3_policy, shared_noise):
        """Written down once more for every trajectory on its own, in the order of its draws."""
        policy = tiny_sd3_policy
        sampler = make_sampler(policy, RecordingReward(first_value), shared_noise=shared_noise)
        groups = run(sampler, policy)
        embeds, negative = policy.encode_prompts(PROMPTS, 3), policy.encode_prompts([""], 3)
        sigmas = sampler.scheduler.sigmas
        for b in range(len(PROMPTS)):
            generator = torch.Generator().manual_seed(b)
            x = torch.randn(1 if shared_noise else K, 4, 8, 8, generator=generator).expand(K, -1, -1, -1)
            for index in range(6):
                sigma, dt = sigmas[index], sigmas[index + 1] - sigmas[index]
                with torch.no_grad():
                    v = policy.velocity(policy.transformer, x, sigma, embeds[[b] * K], negative, 3.0)
                if index not in STEPS:
                    x = x + dt * v
                    continue
                s = 0.7 * (sigma / (1 - sigmas[max(index, 1)])).sqrt()
                mean = x + (v + s**2 / (2 * sigma) * (x + (1 - sigma) * v)) * dt
                rows = torch.arange(K) * len(PROMPTS) + b
                level = STEPS.index(index)
                torch.testing.assert_close(groups.latents[level, rows], x, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(groups.means[level, rows], mean, rtol=1e-4, atol=1e-5)
                x = mean + s * (-dt).sqrt() * torch.randn(K, 4, 8, 8, generator=generator)
                torch.testing.assert_close(groups.next_latents[level, rows], x, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(groups.final_latents[:, b], x, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("step_indices", [[0, 2], [2], [3, 5]])
    def test_from_the_same_noise_they_are_one_up_to_the_first_stochastic_step(self, tiny_sd3_policy, step_indices):
        rows, reward = [], RecordingReward(first_value)
        policy = SD3Policy(tiny_sd3_policy.pipeline)

        def velocity(model, latents, *args, **kwargs):
            rows.append(len(latents))
            return SD3Policy.velocity(policy, model, latents, *args, **kwargs)

        policy.velocity = velocity
        sampler = make_sampler(policy, reward, step_indices=step_indices, shared_noise=True)
        groups = run(sampler, policy)
        first = step_indices[0] + 1
        assert rows == first * [len(PROMPTS)] + (6 - first) * [K * len(PROMPTS)]

        starts = groups.latents[0].unflatten(0, (K, -1))
        assert torch.equal(starts, starts[:1].expand_as(starts)) and groups.rewards.std(1).min() > 0
        assert torch.equal(
            reward.calls[0].initial_noise[: len(PROMPTS)], reward.calls[0].initial_noise[-len(PROMPTS) :]
        )

    def test_final_samples_are_rewarded_once_and_clean(self, tiny_sd3_policy):
        reward = RecordingReward(first_value)
        groups = run(make_sampler(tiny_sd3_policy, reward), tiny_sd3_policy, columns={"label": [5, 6, 7]})
        (samples,) = reward.calls
        assert samples.sigma == 0 and samples.prompts == PROMPTS * K and samples.columns == {"label": [5, 6, 7] * K}
        assert not samples.has_velocity
        assert torch.equal(samples.latents, groups.final_latents.flatten(0, 1))
        assert torch.equal(groups.rewards, groups.final_latents.flatten(2)[..., 0].T)

    def test_pixel_rewards_see_the_decoded_samples_without_another_forward(self, tiny_sd3_policy):
        seen = []

        def brightness(images, prompts):
            seen.append(images)
            return images.mean((1, 2, 3))

        policy = SD3Policy(tiny_sd3_policy.pipeline)
        forwards = []
        policy.velocity = lambda *args, **kwargs: forwards.append(0) or SD3Policy.velocity(policy, *args, **kwargs)
        groups = run(make_sampler(policy, PixelReward(brightness, policy)), policy)
        assert len(forwards) == 6
        expected = policy.decode(groups.final_latents.flatten(0, 1))
        assert torch.equal(seen[0], expected)
        torch.testing.assert_close(groups.rewards.T.flatten(), expected.mean((1, 2, 3)))

    def test_an_all_but_noiseless_rollout_is_the_pipelines(self, tiny_sd3_policy):
        groups = run(
            make_sampler(tiny_sd3_policy, RecordingReward(first_value), noise_level=1e-6), tiny_sd3_policy, ["cat"]
        )
        noise = torch.randn(K, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        expected = tiny_sd3_policy.pipeline(
            ["cat"] * K,
            height=32,
            width=32,
            num_inference_steps=6,
            guidance_scale=3.0,
            latents=noise,
            max_sequence_length=3,
            output_type="latent",
        ).images
        torch.testing.assert_close(groups.final_latents[:, 0], expected, rtol=1e-3, atol=1e-3)

    def test_a_prompt_gets_the_same_trajectories_in_any_batch(self, tiny_sd3_policy):
        sampler = make_sampler(tiny_sd3_policy, RecordingReward(first_value))
        together, alone = run(sampler, tiny_sd3_policy), run(sampler, tiny_sd3_policy, [PROMPTS[1]], seeds=[1])
        torch.testing.assert_close(together.final_latents[:, 1], alone.final_latents[:, 0], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("chunk_size", [1, 4, 100])
    def test_chunks_hold_every_step_once_with_its_own_advantage(self, tiny_sd3_policy, chunk_size):
        groups = run(make_sampler(tiny_sd3_policy, RecordingReward(first_value), store_on="cpu"), tiny_sd3_policy)
        groups.advantages = group_advantages(groups.rewards)
        chunks = list(groups.transitions(chunk_size))
        assert sum(chunk.share for chunk in chunks) == pytest.approx(1)
        assert torch.equal(torch.cat([c.step_indices for c in chunks]), torch.tensor(STEPS).repeat_interleave(9))
        for name in ("latents", "next_latents", "means"):
            assert torch.equal(torch.cat([getattr(c, name) for c in chunks]), getattr(groups, name).flatten(0, 1))
        rows = [(k, b) for _ in STEPS for k in range(K) for b in range(3)]
        expected = torch.stack([groups.advantages[b, k] for k, b in rows])
        assert torch.equal(torch.cat([chunk.advantages for chunk in chunks]), expected)
        found = torch.cat([chunk.prompt_embeds.prompt_embeds for chunk in chunks])
        assert torch.equal(found, groups.prompt_embeds.prompt_embeds[:3][[b for _, b in rows]])
