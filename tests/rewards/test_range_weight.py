# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Rewards whose weights depend on the noise level."""

import math

import pytest
import torch

from tapo_trl.rewards import RangeWeight, WeightedReward
from tests.rewards.test_scoring import make_candidates
from tests.trainer.test_tapo_trainer import RolloutRecorder, make_slrm, make_trainer, redness


class Counted:
    """A reward that remembers the noise levels that it was asked at."""

    def __init__(self, name, values):
        self.__name__, self.values, self.sigmas = name, torch.tensor(values), []

    def __call__(self, candidates):
        self.sigmas.append(round(candidates.sigma.item(), 3))
        return self.values

    def score(self, candidates):
        return self(candidates) + 0 * candidates.latents.sum()


def two_rewards():
    return Counted("latent", [1.0, 2.0, 3.0, 4.0]), Counted("pixel", [0.0, 10.0, 0.0, 10.0])


class TestRangeWeight:
    def test_counts_from_the_first_on_and_below_the_second(self):
        weight = RangeWeight(2.0, 0.25, 0.75)
        assert [weight(sigma) for sigma in (0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 1.0)] == [0, 0, 2, 2, 2, 0, 0]
        assert RangeWeight(3.0)(0.0) == RangeWeight(3.0)(1.0) == 3.0


class TestWeights:
    @pytest.mark.parametrize("method", ["__call__", "score"])
    def test_one_reward_at_high_noise_and_the_other_at_low(self, method):
        latent, pixel = two_rewards()
        reward = WeightedReward([latent, pixel], [RangeWeight(2.0, 0.4), RangeWeight(0.5, 0.0, 0.4)])
        for sigma, expected in ((0.9, [2.0, 4.0, 6.0, 8.0]), (0.5, [2.0, 4.0, 6.0, 8.0]), (0.1, [0.0, 5.0, 0.0, 5.0])):
            values = getattr(reward, method)(make_candidates(sigma))
            assert values.tolist() == expected
        # What does not count is not computed
        assert (latent.sigmas, pixel.sigmas) == ([0.9, 0.5], [0.1])
        assert reward.last_scores["latent"].isnan().all() and reward.last_scores["pixel"].tolist() == [0, 10, 0, 10]

    def test_any_function_of_sigma(self):
        latent, pixel = two_rewards()
        reward = WeightedReward([latent, pixel], [lambda sigma: sigma, lambda sigma: 1 - sigma])
        values = reward(make_candidates(0.3))
        expected = [0.3 * a + 0.7 * b for a, b in zip([1, 2, 3, 4], [0, 10, 0, 10], strict=True)]
        assert values.tolist() == pytest.approx(expected, abs=1e-5)
        standard = WeightedReward([latent, pixel], [lambda sigma: sigma, lambda sigma: 1 - sigma], standardize=True)
        a, b = ((values - values.mean()) / values.std(correction=0) for values in (latent.values, pixel.values))
        torch.testing.assert_close(standard(make_candidates(0.3)), 0.3 * a + 0.7 * b)

    def test_a_constant_weight_of_0_is_computed_for_the_logs(self):
        latent, pixel = two_rewards()
        reward = WeightedReward([latent, pixel], [1.0, 0.0])
        assert reward(make_candidates(0.3)).tolist() == [1, 2, 3, 4] and pixel.sigmas == [0.3]

    def test_nothing_counts(self):
        latent, _ = two_rewards()
        with pytest.raises(ValueError, match="No reward counts at the noise level 0.2"):
            WeightedReward([latent], [RangeWeight(1.0, 0.5)])(make_candidates(0.2))


class TestTrainer:
    def test_candidates_are_scored_by_the_reward_of_their_noise_level(self, tmp_path):
        """With a slow reward for one step alone: its decodings, and the logs of both."""
        seen = []

        def counted(images, prompts):
            seen.append(len(prompts))
            return redness(images, prompts)

        slrm = make_slrm()
        plain = make_trainer(tmp_path, [slrm, redness], max_steps=1)
        sigmas = [plain.scheduler.sigmas[index + 1].item() for index in plain.step_indices]
        threshold = sum(sigmas[1:]) / 2  # between the second and the third step
        options = {"reward_min_sigma": [threshold, 0.0], "reward_max_sigma": [1.1, threshold]}
        trainer = make_trainer(tmp_path, [slrm, counted], reward_weights=[1.0, 3.0], max_steps=1, **options)
        recorder = RolloutRecorder(trainer)
        trainer.train()
        assert seen == [2 * 2 * 2]  # two branches, two prompts, two candidates at the last stochastic step
        (pairs,) = recorder.pairs
        latent, pixel = pairs.reward_parts["slrm"], pairs.reward_parts["counted"]
        torch.testing.assert_close(pairs.rewards[:2], latent[:2])
        torch.testing.assert_close(pairs.rewards[2], 3 * pixel[2])
        assert latent[2].isnan().all() and pixel[:2].isnan().all() and pairs.rewards.isfinite().all()
        logs = trainer.state.log_history[0]
        assert logs["rewards/slrm/mean"] == pytest.approx(latent[:2].mean().item(), abs=1e-4)
        assert logs["rewards/counted/mean"] == pytest.approx(pixel[2].mean().item(), abs=1e-4)
        assert logs["rewards/counted/std"] == pytest.approx(pixel[2].std(dim=-1).mean().item(), abs=1e-4)
        broken = pairs.rewards.new_zeros(()).fill_(math.nan)
        pixel[2, 0, 1, 0] = broken
        assert pairs.describe_reward(["cat", "dog"], (2, 0, 1, 0)).startswith(
            "the reward `counted` of a candidate for"
        )
        pixel[2] = broken  # of all candidates, as is the reward that does not count
        assert pairs.describe_reward(["cat", "dog"], (2, 0, 1, 0)).startswith("one of the rewards ['slrm', 'counted']")
        latent[2] = 0.0
        assert pairs.describe_reward(["cat", "dog"], (2, 0, 1, 0)).startswith("the reward `counted` of a candidate")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"reward_min_sigma": [0.3]}, "`reward_min_sigma` has 1 entries for 2 reward models"),
            ({"reward_max_sigma": [0.3, 0.4, 0.5]}, "`reward_max_sigma` has 3 entries for 2 reward models"),
            (
                {"reward_min_sigma": [0.3, 0.5], "reward_max_sigma": [0.3, 0.9]},
                "from `reward_min_sigma` 0.3 on .* never does",
            ),
            ({"reward_max_sigma": [0.5, 0.5]}, "No reward model counts for the candidates of step 1, at sigma 0.8"),
        ],
    )
    def test_errors(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, [redness, redness], **options)
