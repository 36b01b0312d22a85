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

import pytest
import torch

from tapo_trl.policies import PromptEmbeddings
from tapo_trl.rewards import Candidates, LatentReward, SLRMModel, WeightedReward, velocity_target
from tapo_trl.rewards.candidates import CleanSamples


def make_candidates(sigma=0.4, count=4):
    generator = torch.Generator().manual_seed(3)
    latents, clean, noise, velocity, reference = torch.randn(5, count, 4, 8, 8, generator=generator)
    return Candidates(
        latents=latents,
        sigma=torch.tensor(sigma),
        clean_estimate=clean,
        initial_noise=noise,
        prompts=["fox"] * count,
        prompt_embeds=PromptEmbeddings(
            torch.randn(count, 11, 24, generator=generator), torch.randn(count, 20, generator=generator)
        ),
        columns={},
        predict_velocity=lambda: velocity,
        predict_reference_velocity=lambda: reference,
    )


class TestVelocityTarget:
    def test_every_kind(self):
        candidates = make_candidates()
        x, sigma = candidates.latents, 0.4
        expected = {
            "parent": (x - candidates.clean_estimate) / sigma,
            "policy": candidates.velocity,
            "reference": candidates.reference_velocity,
            "initial_noise": (candidates.initial_noise - x) / (1 - sigma),
        }
        for kind, target in expected.items():
            torch.testing.assert_close(velocity_target(candidates, kind), target)
        assert velocity_target(candidates, "none") is None

    @pytest.mark.parametrize("kind", ["parent", "initial_noise"])
    def test_free_targets_equal_the_truth_when_the_estimate_is_right(self, kind):
        """With x0_hat = x0, or with the trajectory's own noise, the target is x1 - x0."""
        candidates = make_candidates()
        clean, noise = candidates.clean_estimate, candidates.initial_noise
        candidates.latents = 0.6 * clean + 0.4 * noise
        torch.testing.assert_close(velocity_target(candidates, kind), noise - clean)

    @pytest.mark.parametrize("kind", ["parent", "policy", "reference", "initial_noise"])
    def test_undefined_at_the_end_of_the_trajectory(self, kind):
        assert velocity_target(make_candidates(sigma=0.0089), kind) is None

    def test_unknown_kind(self):
        with pytest.raises(ValueError, match="velocity_target"):
            velocity_target(make_candidates(), "grandparent")

    def test_forwards_are_lazy(self):
        candidates = make_candidates()
        velocity_target(candidates, "parent")
        assert not candidates.has_velocity
        velocity_target(candidates, "policy")
        assert candidates.has_velocity


class TestRewards:
    @pytest.mark.parametrize("kind", ["parent", "none"])
    def test_latent_reward_is_the_score_at_the_candidates_own_sigma(self, tiny_sd3_policy, kind):
        slrm, candidates = SLRMModel.from_policy(tiny_sd3_policy), make_candidates()
        embeds = candidates.prompt_embeds
        expected = slrm.score(
            candidates.latents,
            0.4,
            embeds.prompt_embeds,
            embeds.pooled_prompt_embeds,
            velocity_target=velocity_target(candidates, kind),
        )
        for batch_size in (None, 3):
            scores = LatentReward(slrm, kind, batch_size)(candidates)
            torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
            assert not scores.requires_grad

    def test_weighted_sum_and_names(self):
        def one(candidates):
            return torch.ones(len(candidates))

        def row(candidates):
            return torch.arange(float(len(candidates)))

        reward = WeightedReward([one, row, one], weights=[2.0, 0.5, 1.0])
        assert reward.names == ["one_0", "row", "one_1"]
        assert reward(make_candidates()).tolist() == [3.0, 3.5, 4.0, 4.5]
        assert reward.last_scores["row"].tolist() == [0.0, 1.0, 2.0, 3.0]

    def test_wrong_number_of_weights(self):
        with pytest.raises(ValueError, match="reward_weights"):
            WeightedReward([lambda candidates: None], weights=[1.0, 2.0])


class TestCleanSamples:
    def make(self):
        candidates = make_candidates()
        names = ("latents", "initial_noise", "prompts", "prompt_embeds", "columns")
        return CleanSamples(**{name: getattr(candidates, name) for name in names})

    def test_are_their_own_estimates_and_need_no_velocity(self):
        samples = self.make()
        assert torch.equal(samples.denoised, samples.latents)
        assert all(
            velocity_target(samples, kind) is None for kind in ("parent", "policy", "reference", "initial_noise")
        )
        with pytest.raises(RuntimeError, match="no noise"):
            samples.velocity  # noqa: B018

    @pytest.mark.parametrize("kind", ["parent", "reference", "none"])
    def test_a_latent_reward_is_the_models_score_at_noise_level_0(self, tiny_sd3_policy, kind):
        slrm, samples = SLRMModel.from_policy(tiny_sd3_policy), self.make()
        embeds = samples.prompt_embeds
        with torch.no_grad():
            expected = slrm.score(samples.latents, 0.0, embeds.prompt_embeds, embeds.pooled_prompt_embeds)
        assert torch.equal(LatentReward(slrm, kind)(samples), expected)
