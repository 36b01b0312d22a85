# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from tapo_trl.rollouts import PAIRINGS, get_pairing
from tests.rollouts.test_pairs import PROMPTS, STEPS, RecordingReward, first_value, make_sampler, run


def generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


class TestSelection:
    scores = torch.tensor([[[1.0, 5.0, 2.0], [9.0, 8.0, 7.0]], [[4.0, 1.0, 2.0], [6.0, 8.0, 7.0]]])

    def test_tapo_is_eq_12_per_prompt(self):
        pairing = PAIRINGS["tapo"]
        selection = pairing.select(self.scores, generators(2))
        assert selection.kept.tolist() == [
            [1, 0],
            [1, 0],
        ]  # the best of the winning branch, the worst of the losing one
        assert pairing.pairs(selection.chosen, selection.rejected).tolist() == [[1, 0], [1, 0]]

    def test_tapo_within_pairs_the_candidates_of_each_trajectory(self):
        pairing = PAIRINGS["tapo_within"]
        selection = pairing.select(self.scores, generators(2))
        assert selection.kept.tolist() == [[1, 0], [1, 0]]
        # Trajectory by trajectory, and prompt by prompt in each.
        assert pairing.pairs(selection.chosen, selection.rejected).tolist() == [[1, 0, 0, 1], [0, 2, 1, 0]]

    def test_spo_goes_on_with_any_candidate(self):
        scores, pairing = torch.randn(1, 400, 4), PAIRINGS["spo"]
        selection = pairing.select(scores, generators(400))
        assert torch.equal(pairing.pairs(selection.chosen, selection.rejected)[0], scores[0].argmax(-1))
        assert torch.equal(pairing.pairs(selection.chosen, selection.rejected)[1], scores[0].argmin(-1))
        shares = selection.kept.flatten().bincount(minlength=4) / 400
        assert shares.tolist() == pytest.approx([0.25] * 4, abs=0.08)
        assert torch.equal(selection.kept, pairing.select(scores, generators(400)).kept)

    def test_spo_may_go_on_with_the_best(self):
        scores = torch.randn(1, 5, 4)
        kept = get_pairing("spo", continue_with="best").select(scores, generators(5)).kept
        assert torch.equal(kept, scores.argmax(-1))


class TestThreshold:
    def weights(self, pairing, gaps, stds):
        rewards = torch.stack([torch.tensor(gaps), torch.zeros(len(gaps), len(gaps[0]))], dim=1)
        return pairing.weights(rewards, torch.tensor(stds)).tolist()

    def test_spos_is_a_difference_of_probabilities(self):
        gap = 2 * math.atanh(0.3)  # where a softmax of the two scores gives probabilities that differ by 0.3
        chosen, rejected = torch.tensor([gap, 0.0]).softmax(0).tolist()
        assert chosen - rejected == pytest.approx(0.3)
        assert self.weights(PAIRINGS["spo"], [[gap - 1e-3, gap + 1e-3]], [0.5]) == [[0.0, 1.0]]

    @pytest.mark.parametrize("num_steps", [3, 7, 40])
    def test_lpos_grows_with_the_noise_whatever_the_number_of_steps(self, num_steps):
        stds = torch.linspace(2.0, 0.5, num_steps).tolist()
        for index, std in enumerate(stds):
            threshold = 0.35 + 0.15 * (std - 0.5) / 1.5
            gaps = [[0.0, 0.0]] * num_steps
            gaps[index] = [2 * math.atanh(threshold) - 1e-3, 2 * math.atanh(threshold) + 1e-3]
            assert self.weights(PAIRINGS["lpo"], gaps, stds)[index] == [0.0, 1.0]

    @pytest.mark.parametrize("name", ["tapo", "tapo_within"])
    def test_tapo_has_none(self, name):
        assert self.weights(PAIRINGS[name], [[1e-6, -1.0]], [0.5]) == [[1.0, 1.0]]
        assert self.weights(PAIRINGS[name], [[0.0, -1.0]], [0.5]) == [[0.0, 1.0]]  # a tie has no winner
        assert self.weights(get_pairing(name, threshold=[0.1]), [[0.0, 1.0]], [0.5]) == [[0.0, 1.0]]


class TestConsistency:
    stds = torch.tensor([0.5, 0.4])
    rewards = torch.tensor([[[2.0, 2.0, 2.0], [1.0, 1.0, 1.0]], [[2.0, 2.0, 1.0], [1.0, 1.0, 2.0]]])  # (n, 2, B)

    def test_a_pair_counts_if_its_ranking_holds_at_its_step_and_at_the_end(self):
        final_rewards = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])  # flips for the second prompt
        weights = get_pairing("tapo", consistent=True).weights(self.rewards, self.stds, final_rewards)
        assert weights.tolist() == [[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]  # and at the second step for the third

    def test_the_threshold_holds_as_well(self):
        final_rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
        pairing = get_pairing("tapo", threshold=[0.9], consistent=True)
        assert not pairing.weights(self.rewards, self.stds, final_rewards).any()

    @pytest.mark.parametrize("name", ["spo", "lpo", "tapo_within"])
    def test_needs_two_trajectories_that_make_one_pair(self, name):
        with pytest.raises(ValueError, match="consistent_pairs"):
            get_pairing(name, consistent=True)


class TestRollouts:
    def rollout(self, policy, pairing):
        sampler = make_sampler(policy, RecordingReward(first_value))
        sampler.pairing = pairing
        return sampler, run(sampler, policy)

    @pytest.mark.parametrize(("name", "branches"), [("spo", 1), ("tapo_within", 2)])
    def test_both_sides_are_candidates_of_one_parent(self, tiny_sd3_policy, name, branches):
        sampler, pairs = self.rollout(tiny_sd3_policy, get_pairing(name, threshold=[0.0]))
        num_pairs = branches * len(PROMPTS)
        assert pairs.latents.shape == (3, 1, num_pairs, 4, 8, 8)
        assert pairs.next_latents.shape == (3, 2, num_pairs, 4, 8, 8)
        assert len(pairs.prompt_embeds) == num_pairs and pairs.final_latents.shape == (branches, 3, 4, 8, 8)
        for step, candidates in enumerate(sampler.reward.rewards[0].calls):
            values = first_value(candidates).view(branches, 3, 4)
            kept = pairs.next_latents[step].flatten(2)[..., 0]
            assert torch.equal(kept[0], values.amax(-1).flatten())
            assert torch.equal(kept[1], values.amin(-1).flatten())
            assert torch.equal(pairs.pair_rewards[step], kept)

    def test_a_pair_has_the_law_of_the_step_from_its_parent(self, tiny_sd3_policy):
        sampler, pairs = self.rollout(tiny_sd3_policy, PAIRINGS["spo"])
        embeds, negative = tiny_sd3_policy.encode_prompts(PROMPTS, 3), tiny_sd3_policy.encode_prompts([""], 3)
        for step, index in enumerate(STEPS):
            parent, sigma = pairs.latents[step, 0], sampler.scheduler.sigma(index)
            velocity = tiny_sd3_policy.velocity(tiny_sd3_policy.transformer, parent, sigma, embeds, negative, 3.0)
            mean, std = sampler.scheduler.sde_mean_std(parent, velocity, index)
            noise = (pairs.next_latents[step] - mean) / std
            assert abs(noise.mean().item()) < 0.1 and abs(noise.std().item() - 1) < 0.1

    def test_spo_takes_half_the_forwards(self, tiny_sd3_policy):
        sizes = []
        hook = tiny_sd3_policy.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        self.rollout(tiny_sd3_policy, PAIRINGS["spo"])
        hook.remove()
        assert sizes == [6] * 7  # guidance doubles 3 prompts, always one trajectory

    def test_pairs_below_the_threshold_have_no_weight(self, tiny_sd3_policy):
        _, pairs = self.rollout(tiny_sd3_policy, get_pairing("spo", threshold=[0.3]))
        expected = (pairs.pair_rewards.float().softmax(1).diff(dim=1)[:, 0] < -0.3).float()
        assert torch.equal(pairs.weights, expected)
        assert 0 < expected.mean() < 1
        assert torch.equal(torch.cat([chunk.weights for chunk in pairs.transitions(2)]), expected.flatten())

    def test_pairs_whose_trajectories_end_the_other_way_round_have_no_weight(self, tiny_sd3_policy):
        def falls_at_the_end(candidates):
            """The first value, but the other way round for the second prompt's clean samples."""
            flips = torch.tensor([prompt == PROMPTS[1] and candidates.sigma == 0 for prompt in candidates.prompts])
            return torch.where(flips, -1.0, 1.0) * first_value(candidates)

        sampler = make_sampler(tiny_sd3_policy, RecordingReward(falls_at_the_end))
        sampler.pairing = get_pairing("tapo", consistent=True)
        pairs = run(sampler, tiny_sd3_policy)
        final = sampler.reward.rewards[0].calls[-1]
        assert torch.equal(final.latents, pairs.final_latents.flatten(0, 1)) and len(final) == 6
        assert (pairs.final_latents[0] > pairs.final_latents[1]).flatten(1)[:, 0].all(), "pick other seeds"
        assert (pairs.pair_rewards[:, 0] > pairs.pair_rewards[:, 1]).all(), "pick other seeds"
        assert pairs.weights.tolist() == [[1.0, 0.0, 1.0]] * 3
