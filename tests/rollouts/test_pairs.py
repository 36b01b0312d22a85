# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import math
from contextlib import nullcontext

import pytest
import torch

from tapo_trl.policies import SD3Policy
from tapo_trl.policies.flux import FluxPolicy
from tapo_trl.rewards import LatentReward, PixelReward, SLRMModel, WeightedReward
from tapo_trl.rewards.targets import training_targets, velocity_target
from tapo_trl.rollouts import TAPOSampler, TrajectoryPairs
from tapo_trl.schedulers import draw_candidates, sde_step_indices


PROMPTS = ["fox", "cat", "owl"]
STEPS = [1, 3, 5]


class RecordingReward:
    """Scores by a function of the candidates, and keeps them."""

    def __init__(self, function):
        self.function, self.calls, self.__name__ = function, [], "recording"

    def __call__(self, candidates):
        self.calls.append(candidates)
        return self.function(candidates)


def first_value(candidates):
    return candidates.latents.flatten(1)[:, 0].clone()


def make_sampler(policy, reward, num_candidates=4, guidance_scale=3.0, reference=None, **scheduler_kwargs):
    latent_shape = policy.latent_shape(32, 32)
    return TAPOSampler(
        policy=policy,
        scheduler=policy.build_scheduler(7, latent_shape, **scheduler_kwargs),
        step_indices=STEPS,
        num_candidates=num_candidates,
        reward=WeightedReward([reward]),
        latent_shape=latent_shape,
        guidance_scale=guidance_scale,
        reference=reference,
    )


def run(sampler, policy, prompts=PROMPTS, seeds=None, columns=None):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or range(len(prompts))]
    return sampler.sample(
        policy.transformer,
        prompts,
        policy.encode_prompts(prompts, 3),
        policy.encode_prompts([""], 3),
        generators,
        columns,
    )


class TestSelection:
    def test_kept_candidates_are_the_best_and_the_worst_of_their_own_prompt(self, tiny_sd3_policy):
        reward = RecordingReward(first_value)
        pairs = run(make_sampler(tiny_sd3_policy, reward), tiny_sd3_policy)
        for step, candidates in enumerate(reward.calls):
            values = first_value(candidates).view(2, 3, 4)
            kept = pairs.next_latents[step].flatten(2)[..., 0]
            assert torch.equal(kept[0], values[0].amax(-1))
            assert torch.equal(kept[1], values[1].amin(-1))
            assert torch.equal(pairs.rewards[step], values)
            assert values.std(-1).min() > 0, "candidates of one parent must differ"

    def test_win_and_lose_grow_apart(self, tiny_sd3_policy):
        pairs = run(make_sampler(tiny_sd3_policy, RecordingReward(first_value)), tiny_sd3_policy)
        gaps = (pairs.next_latents[:, 0] - pairs.next_latents[:, 1]).flatten(2)[..., 0].mean(1)
        assert (gaps > 0).all()
        assert not torch.equal(pairs.final_latents[0], pairs.final_latents[1])


class TestTrajectories:
    def test_branches_share_everything_before_the_first_stochastic_step(self, tiny_sd3_policy):
        pairs = run(make_sampler(tiny_sd3_policy, RecordingReward(first_value)), tiny_sd3_policy)
        assert torch.equal(pairs.latents[0, 0], pairs.latents[0, 1])
        assert not torch.equal(pairs.latents[1, 0], pairs.latents[1, 1])

    def test_steps_follow_the_scheduler(self, tiny_sd3_policy):
        """Every parent is an ODE step away from the candidate kept before, and every candidate has the SDE's law."""
        sampler = make_sampler(tiny_sd3_policy, RecordingReward(first_value))
        pairs = run(sampler, tiny_sd3_policy)
        embeds = tiny_sd3_policy.encode_prompts(PROMPTS, 3).repeat(2)
        negative = tiny_sd3_policy.encode_prompts([""], 3)

        def velocity(latents, index):
            sigma = sampler.scheduler.sigma(index)
            return tiny_sd3_policy.velocity(tiny_sd3_policy.transformer, latents, sigma, embeds, negative, 3.0)

        for step, index in enumerate(STEPS[:-1]):
            latents = pairs.next_latents[step].flatten(0, 1)
            expected = sampler.scheduler.ode_step(latents, velocity(latents, index + 1), index + 1)
            torch.testing.assert_close(pairs.latents[step + 1].flatten(0, 1), expected)
        parent = pairs.latents[1].flatten(0, 1)
        mean, std = sampler.scheduler.sde_mean_std(parent, velocity(parent, 3), 3)
        noise = (pairs.next_latents[1].flatten(0, 1) - mean) / std
        assert abs(noise.mean().item()) < 0.1 and abs(noise.std().item() - 1) < 0.1

    def test_final_latents_of_an_all_but_noiseless_rollout_are_the_pipelines(self, tiny_sd3_policy):
        sampler = make_sampler(tiny_sd3_policy, RecordingReward(first_value), noise_level=1e-6)
        pairs = run(sampler, tiny_sd3_policy)
        latents = tiny_sd3_policy.sample(
            tiny_sd3_policy.transformer,
            tiny_sd3_policy.encode_prompts(PROMPTS, 3),
            tiny_sd3_policy.encode_prompts([""], 3),
            latent_shape=sampler.latent_shape,
            num_inference_steps=7,
            guidance_scale=3.0,
            generators=[torch.Generator().manual_seed(seed) for seed in range(3)],
        )
        for branch in pairs.final_latents:
            torch.testing.assert_close(branch, latents, rtol=0, atol=1e-3)

    def test_forwards_are_batched(self, tiny_sd3_policy):
        batch_sizes = []
        hook = tiny_sd3_policy.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: batch_sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        reward = RecordingReward(first_value)
        run(make_sampler(tiny_sd3_policy, reward), tiny_sd3_policy)
        hook.remove()
        # CFG doubles 3 prompts; one branch up to the first stochastic step (index 1), two after it.
        assert batch_sizes == [6, 6] + [12] * 5
        assert [len(candidates) for candidates in reward.calls] == [2 * 3 * 4] * 3

    def test_a_prompt_gets_the_same_trajectory_in_any_batch(self, tiny_sd3_policy):
        sampler = make_sampler(tiny_sd3_policy, RecordingReward(first_value))
        together = run(sampler, tiny_sd3_policy)
        alone = run(sampler, tiny_sd3_policy, prompts=PROMPTS[1:2], seeds=[1])
        torch.testing.assert_close(together.next_latents[:, :, 1:2], alone.next_latents, rtol=1e-4, atol=1e-4)


class TestCandidates:
    def test_what_rewards_see(self, tiny_sd3_policy):
        reward = RecordingReward(first_value)
        sampler = make_sampler(tiny_sd3_policy, reward)
        pairs = run(sampler, tiny_sd3_policy, columns={"label": [7, 8, 9]})
        for step, candidates in enumerate(reward.calls):
            assert candidates.sigma == sampler.scheduler.sigmas[STEPS[step] + 1]
            assert candidates.prompts == [prompt for prompt in PROMPTS * 2 for _ in range(4)]
            assert candidates.columns == {"label": [7] * 4 + [8] * 4 + [9] * 4 + [7] * 4 + [8] * 4 + [9] * 4}
            noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in range(3)])
            assert torch.equal(candidates.initial_noise, torch.cat([noise, noise]).repeat_interleave(4, 0))
            embeds = tiny_sd3_policy.encode_prompts(PROMPTS, 3).repeat(2)
            sigma = sampler.scheduler.sigmas[STEPS[step]]
            parent = pairs.latents[step].flatten(0, 1)
            velocity = tiny_sd3_policy.velocity(
                tiny_sd3_policy.transformer, parent, sigma, embeds, tiny_sd3_policy.encode_prompts([""], 3), 3.0
            )
            expected = (parent - sigma * velocity).repeat_interleave(4, 0)
            torch.testing.assert_close(candidates.clean_estimate, expected, rtol=1e-4, atol=1e-4)

    def test_velocity_at_the_candidates_is_reused_for_the_next_step(self, tiny_sd3_policy):
        """A reward that needs v(x') changes how often the network runs, not the trajectory."""

        def score(candidates):
            return candidates.velocity.flatten(1)[:, 0] * 0 + first_value(candidates)

        plain = run(make_sampler(tiny_sd3_policy, RecordingReward(first_value)), tiny_sd3_policy)
        calls = []
        hook = tiny_sd3_policy.transformer.register_forward_pre_hook(lambda *_: calls.append(1), with_kwargs=True)
        reused = run(make_sampler(tiny_sd3_policy, RecordingReward(score)), tiny_sd3_policy)
        hook.remove()
        assert len(calls) == 7  # of 7 steps 3 are spared, and 3 rewards need one
        torch.testing.assert_close(reused.final_latents, plain.final_latents, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("make_policy", [SD3Policy, FluxPolicy])
    def test_the_reference_is_compared_to_as_in_the_training_of_a_reward_model(self, make_policy):
        """Without guidance, or with the family's own; the policy's velocity, which the next step uses again, has the run's."""
        policy = make_policy(make_policy.tiny())
        network, targets = policy.transformer, []

        def score(candidates):
            targets.append((candidates, *(velocity_target(candidates, kind) for kind in ("reference", "policy"))))
            return first_value(candidates)

        # `with nullcontext(model) as reference`
        run(make_sampler(policy, RecordingReward(score), guidance_scale=4.5, reference=nullcontext), policy)
        negative = policy.encode_prompts([""], 3)
        for candidates, of_reference, of_policy in targets[:-1]:  # the last candidates are too clean for a target
            inputs = (candidates.latents, candidates.sigma, candidates.prompt_embeds)
            noise, sigma = torch.zeros_like(candidates.latents), candidates.sigma.expand(len(candidates))
            trained = training_targets(["reference"], policy, network, inputs[0], noise, sigma, inputs[2])["reference"]
            torch.testing.assert_close(of_reference, trained)
            torch.testing.assert_close(of_policy, policy.velocity(network, *inputs, negative, 4.5))
            assert (of_reference - of_policy).abs().max() > 0.01


class TestPixelReward:
    def test_scores_the_decoded_one_step_estimate(self, tiny_sd3_policy):
        seen = []

        def redness(images, prompts, label):
            seen.append((images, prompts, label))
            return images[:, 0].mean(dim=(1, 2))

        reward = PixelReward(redness, tiny_sd3_policy)
        recording = RecordingReward(reward)
        pairs = run(make_sampler(tiny_sd3_policy, recording), tiny_sd3_policy, columns={"label": [1, 2, 3]})
        candidates, (images, prompts, label) = recording.calls[0], seen[0]
        expected = tiny_sd3_policy.decode(candidates.latents - candidates.sigma * candidates.velocity)
        torch.testing.assert_close(images, expected)
        assert prompts == candidates.prompts and label == candidates.columns["label"]
        assert pairs.rewards.shape == (3, 2, 3, 4)

    def test_wrong_number_of_scores(self, tiny_sd3_policy):
        reward = PixelReward(lambda images, prompts: images.mean(), tiny_sd3_policy)
        with pytest.raises(ValueError, match="one score per candidate"):
            run(make_sampler(tiny_sd3_policy, reward), tiny_sd3_policy)

    def test_values_that_are_not_finite_are_passed_on(self, tiny_sd3_policy):
        """The rollout goes on with them: what to do about them is the trainer's business."""

        def broken(images, prompts):
            return [float("nan") if prompt == "cat" else 0.0 for prompt in prompts]

        pairs = run(make_sampler(tiny_sd3_policy, PixelReward(broken, tiny_sd3_policy)), tiny_sd3_policy)
        assert torch.equal(pairs.rewards.isnan().all(-1), torch.tensor([False, True, False]).expand(3, 2, 3))


class TestVideos:
    """The same code on latents with a time axis."""

    def make_sampler(self, policy, reward, **kwargs):
        latent_shape = policy.latent_shape(32, 48, 9)
        return TAPOSampler(
            policy=policy,
            scheduler=policy.build_scheduler(7, latent_shape),
            step_indices=STEPS,
            num_candidates=4,
            reward=WeightedReward([reward]),
            latent_shape=latent_shape,
            guidance_scale=3.0,
            **kwargs,
        )

    def test_rollout(self, tiny_wan_policy):
        reward = RecordingReward(first_value)
        pairs = run(self.make_sampler(tiny_wan_policy, reward), tiny_wan_policy)
        assert pairs.latents.shape == pairs.next_latents.shape == (3, 2, 3, 4, 3, 4, 6)
        assert torch.equal(pairs.latents[0, 0], pairs.latents[0, 1])
        assert not torch.equal(pairs.latents[1, 0], pairs.latents[1, 1])
        for step, candidates in enumerate(reward.calls):
            values = first_value(candidates).view(2, 3, 4)
            kept = pairs.next_latents[step].flatten(2)[..., 0]
            assert torch.equal(kept[0], values[0].amax(-1)) and torch.equal(kept[1], values[1].amin(-1))

    @pytest.mark.parametrize("kind", ["parent", "policy"])
    def test_slrm_scores_candidates_in_batches(self, tiny_wan_policy, kind):
        slrm = SLRMModel.from_policy(tiny_wan_policy, num_task_tokens=2)
        sizes = {"policy": [], "slrm": []}
        hooks = [
            module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: sizes[name].append(len(kwargs["hidden_states"])),
                with_kwargs=True,
            )
            for name, module in (("policy", tiny_wan_policy.transformer), ("slrm", slrm.transformer))
        ]
        reward = LatentReward(slrm, kind, batch_size=5)
        pairs = run(self.make_sampler(tiny_wan_policy, reward, score_batch_size=5), tiny_wan_policy)
        for hook in hooks:
            hook.remove()
        assert sizes["slrm"] == [5, 5, 5, 5, 4] * 3
        # With guidance everything is doubled. The last candidates are too clean for a target.
        candidates = [10, 10, 10, 10, 8] if kind == "policy" else []
        branches = [[12], [12, 12]] if kind == "policy" else [[12, 12], [12, 12, 12]]
        assert sizes["policy"] == [6, 6, *candidates, *branches[0], *candidates, *branches[1]]
        reward.batch_size = None
        together = run(self.make_sampler(tiny_wan_policy, reward), tiny_wan_policy)
        torch.testing.assert_close(together.rewards, pairs.rewards, rtol=1e-3, atol=1e-4)

    def test_pixel_rewards_see_videos(self, tiny_wan_policy):
        shapes = []

        def motion(videos, prompts):
            shapes.append(tuple(videos.shape))
            return videos.diff(dim=2).abs().mean(dim=(1, 2, 3, 4))

        reward = PixelReward(motion, tiny_wan_policy, batch_size=10)
        pairs = run(self.make_sampler(tiny_wan_policy, reward), tiny_wan_policy)
        assert shapes == [(24, 3, 9, 32, 48)] * 3
        assert pairs.rewards.std(-1).min() > 0

    @pytest.mark.parametrize("num_sde_steps", [8, 40])
    def test_sampling_keeps_the_marginals(self, tiny_wan_policy, num_sde_steps):
        """With the exact velocity of normal data, stochastic and mixed trajectories end in its distribution."""
        scheduler = tiny_wan_policy.build_scheduler(40, tiny_wan_policy.latent_shape(32, 48, 9))
        mean, std = 0.5, 0.8
        torch.manual_seed(0)
        latents = torch.randn(500, 4, 3, 4, 6)
        stochastic = sde_step_indices(40, num_sde_steps, t_init=0 if num_sde_steps == 40 else 1)
        for index in range(40):
            sigma = scheduler.sigma(index)
            variance = (1 - sigma) ** 2 * std**2 + sigma**2
            slope = (sigma - (1 - sigma) * std**2) / variance
            velocity = slope * (latents - (1 - sigma) * mean) - mean  # E[x1 - x0 | x]
            if index in stochastic:
                step_mean, step_std = scheduler.sde_mean_std(latents, velocity, index)
                latents = draw_candidates(step_mean, step_std, torch.randn(500, 1, 4, 3, 4, 6))[:, 0]
            else:
                latents = scheduler.ode_step(latents, velocity, index)
        assert latents.mean().item() == pytest.approx(mean, abs=0.02)
        assert latents.std().item() == pytest.approx(std, rel=0.05)


class TestTransitions:
    @pytest.mark.parametrize("chunk_size", [1, 2, 4, 100])
    def test_chunks_hold_every_pair_once(self, tiny_sd3_policy, chunk_size):
        pairs: TrajectoryPairs = run(make_sampler(tiny_sd3_policy, RecordingReward(first_value)), tiny_sd3_policy)
        chunks = list(pairs.transitions(chunk_size))
        assert sum(chunk.share for chunk in chunks) == pytest.approx(1)
        assert max(len(chunk.step_indices) for chunk in chunks) == min(chunk_size, 9)
        assert torch.cat([chunk.step_indices for chunk in chunks]).tolist() == [1] * 3 + [3] * 3 + [5] * 3
        for name in ("latents", "next_latents"):
            flat = torch.cat([getattr(chunk, name) for chunk in chunks], dim=1)
            assert torch.equal(flat, getattr(pairs, name).transpose(0, 1).flatten(1, 2))
        assert len(chunks) == math.ceil(pairs.num_pairs / chunk_size)
        embeds = torch.cat([chunk.prompt_embeds.prompt_embeds for chunk in chunks])
        assert torch.equal(embeds, pairs.prompt_embeds.prompt_embeds.repeat(3, 1, 1))

    def test_storing_elsewhere_changes_where_they_are_and_nothing_else(self, tiny_sd3_policy):
        """`meta` stands in for the other device, and a copy on it for the move."""
        sampler = make_sampler(tiny_sd3_policy, RecordingReward(first_value))
        expected = run(sampler, tiny_sd3_policy)
        sampler.store_on = "cpu"
        stored = run(sampler, tiny_sd3_policy)
        for name in ("latents", "next_latents", "rewards", "final_latents"):
            assert torch.equal(getattr(stored, name), getattr(expected, name)), name

        sampler.store_on = "meta"
        pairs = run(sampler, tiny_sd3_policy)
        assert pairs.latents.device.type == pairs.next_latents.device.type == "meta"
        assert pairs.rewards.device.type == pairs.final_latents.device.type == "cpu"
        moved = next(stored.transitions(2)).to("meta")
        tensors = (moved.latents, moved.next_latents, moved.prompt_embeds.prompt_embeds)
        assert {tensor.device.type for tensor in tensors} == {"meta"}
        assert moved.step_indices.tolist() == [1, 1] and moved.share == pytest.approx(2 / 9)
