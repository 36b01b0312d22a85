# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from tapo_trl.data.prompts import PromptCache
from tapo_trl.metrics import diagnose_scores, evaluate_preference_accuracy, score_pairs, score_pairs_of_pixels
from tapo_trl.metrics.pair_scores import evaluation_noise
from tapo_trl.rewards.slrm import SLRMModel, SLRMOutput
from tests.data.preference_pairs import latent_pairs


@pytest.fixture
def slrm(tiny_sd3_policy):
    return SLRMModel.from_policy(tiny_sd3_policy, num_task_tokens=2, max_sequence_length=16, resolution=32)


class FlippingModel(SLRMModel):
    """Likes the first channel at sigma < 1/2, and dislikes it above: every pair flips once, between 0.4 and 0.6."""

    def forward(self, latents, sigma, prompt_embeds, pooled_prompt_embeds=None):
        self.calls += len(latents)
        sign = torch.where(sigma < 0.5, 1.0, -1.0)
        return SLRMOutput(sign * latents[:, 0].mean((1, 2)), torch.zeros_like(latents))


@pytest.fixture
def flipping(tiny_sd3_policy):
    model = FlippingModel.from_policy(tiny_sd3_policy, num_task_tokens=2, max_sequence_length=16, resolution=32)
    model.calls = 0
    return model


class TestScorePairs:
    def test_scores_of_single_latents(self, slrm, tiny_sd3_policy, tmp_path):
        pairs = latent_pairs(5).add_column("label", [1.0] * 4 + [0.5])
        sigmas = (0.2, 0.7)
        scores = score_pairs(
            slrm, tiny_sd3_policy, pairs, sigmas, ("ground_truth", "none"), batch_size=2, seed=3, cache_dir=tmp_path
        )
        assert scores.sigmas == sigmas and scores.labels.tolist() == [1, 1, 1, 1, 0.5]
        prompts = PromptCache(tiny_sd3_policy, tmp_path, 16)
        for side in ("chosen", "rejected"):
            by_rule = getattr(scores, side)
            assert by_rule["none"].shape == (2, 5)
            for row, pair in enumerate(pairs):
                noise, clean = evaluation_noise([row], (4, 8, 8), 3), torch.tensor([pair[side]])
                embeds = prompts.load([pair["prompt"]])
                for number, sigma in enumerate(sigmas):
                    args = (
                        (1 - sigma) * clean + sigma * noise,
                        sigma,
                        embeds.prompt_embeds,
                        embeds.pooled_prompt_embeds,
                    )
                    expected = slrm.score(*args, velocity_target=noise - clean).item()
                    assert by_rule["ground_truth"][number, row].item() == pytest.approx(expected, abs=1e-4)
                    assert by_rule["none"][number, row].item() == pytest.approx(slrm.score(*args).item(), abs=1e-4)

    def test_accuracy_is_that_of_its_margins(self, slrm, tiny_sd3_policy, tmp_path):
        arguments = (slrm, tiny_sd3_policy, latent_pairs(6), (0.1, 0.9))
        scores = score_pairs(*arguments, cache_dir=tmp_path)
        accuracy = evaluate_preference_accuracy(*arguments, cache_dir=tmp_path)
        for rule, margins in scores.margins.items():
            assert list(accuracy[rule].values()) == pytest.approx((margins > 0).double().mean(1).tolist())

    def test_every_latent_is_scored_once_per_level_for_all_rules(self, flipping, tiny_sd3_policy, tmp_path):
        rules = ("ground_truth", "reference", "none")
        scores = score_pairs(
            flipping, tiny_sd3_policy, latent_pairs(5), (0.1, 0.6, 0.1), rules, batch_size=2, cache_dir=tmp_path
        )
        assert scores.sigmas == (0.1, 0.6)
        assert flipping.calls == 2 * 5 * 2

    def test_a_reward_that_flips_shows_it(self, flipping, tiny_sd3_policy, tmp_path):
        scores = score_pairs(
            flipping, tiny_sd3_policy, latent_pairs(8), (0.0, 0.4, 0.6, 0.8), ("none",), cache_dir=tmp_path
        )
        result = diagnose_scores(scores)["none"]
        assert result["consistency"] == {
            "flips_from_next_cleaner": {0.4: 0, 0.6: 1, 0.8: 0},
            "flips_from_cleanest": {0.4: 0, 0.6: 1, 0.8: 1},
            "flips_per_pair": 1,
            "never_flips": 0,
        }
        assert result["accuracy"]["by_sigma"] == {0.0: 1, 0.4: 1, 0.6: 0, 0.8: 0}
        assert {name: values["accuracy"] for name, values in result["accuracy"]["by_range"].items()} == {
            "clean": 1,
            "1-500": 1,
            "501-1000": 0,
        }
        areas = [values["auc"] for values in result["distributions"].values()]
        assert areas == [1, 1, 0, 0]


class TestScorePairsOfPixels:
    options = {"height": 32, "width": 32, "max_sequence_length": 16, "batch_size": 2, "seed": 3}

    def test_scores_of_single_latents(self, tiny_sd3_policy, tmp_path):
        policy, pairs, sigmas = tiny_sd3_policy, latent_pairs(3).add_column("label", [1.0, 1.0, 0.5]), (0.0, 0.4)

        def redness(images, prompts):
            return images[:, 0].mean((1, 2)) + torch.tensor([float(len(prompt)) for prompt in prompts])

        scores = score_pairs_of_pixels(redness, policy, pairs, sigmas, cache_dir=tmp_path, **self.options)
        assert scores.sigmas == sigmas and scores.labels.tolist() == [1, 1, 0.5]
        prompts = PromptCache(policy, tmp_path, 16)
        for side in ("chosen", "rejected"):
            by_reading = getattr(scores, side)
            assert set(by_reading) == {"estimate", "noisy"} and by_reading["noisy"].shape == (2, 3)
            for row, pair in enumerate(pairs):
                noise, clean = evaluation_noise([row], (4, 8, 8), 3), torch.tensor([pair[side]])
                for number, sigma in enumerate(sigmas):
                    noisy = (1 - sigma) * clean + sigma * noise
                    with torch.no_grad():
                        velocity = policy.velocity(policy.transformer, noisy, sigma, prompts.load([pair["prompt"]]))
                    latents = {"noisy": noisy, "estimate": noisy - sigma * velocity}
                    for reading, values in latents.items():
                        expected = redness(policy.decode(values), [pair["prompt"]]).item()
                        assert by_reading[reading][number, row].item() == pytest.approx(expected, abs=1e-4)

    def test_clean_latents_and_noisy_ones_cost_no_forward(self, tiny_sd3_policy, tmp_path, monkeypatch):
        monkeypatch.setattr(tiny_sd3_policy, "velocity", None)
        reward, pairs = (lambda images, prompts: images.mean((1, 2, 3))), latent_pairs(2)
        options = self.options | {"cache_dir": tmp_path}
        score_pairs_of_pixels(reward, tiny_sd3_policy, pairs, (0.0,), **options)
        score_pairs_of_pixels(reward, tiny_sd3_policy, pairs, (0.5,), ("noisy",), **options)
