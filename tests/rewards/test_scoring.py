# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import functools

import pytest
import torch

from tapo_trl.policies import PromptEmbeddings
from tapo_trl.rewards import Candidates, LatentReward, SLRMModel, WeightedReward, velocity_target
from tapo_trl.rewards.scoring import CleanSamples, PixelReward, call_reward_function, check_reward_function


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
    @pytest.mark.parametrize("batch_size", [None, 3])
    def test_latent_reward_of_estimates_is_the_score_of_the_clean_estimate_without_noise(
        self, tiny_sd3_policy, batch_size
    ):
        slrm, candidates = SLRMModel.from_policy(tiny_sd3_policy), make_candidates()
        embeds = candidates.prompt_embeds
        estimates = candidates.latents - 0.4 * candidates.predict_velocity()
        expected = slrm.score(estimates, 0.0, embeds.prompt_embeds, embeds.pooled_prompt_embeds)
        reward = LatentReward(slrm, "parent", batch_size, of_estimates=True)
        torch.testing.assert_close(reward(candidates), expected.detach(), atol=1e-6, rtol=1e-5)
        assert candidates.has_velocity
        noisy = LatentReward(slrm, "none")(make_candidates())
        assert not torch.allclose(noisy, expected, atol=1e-3)

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
        standard = WeightedReward([one, row, one], weights=[2.0, 0.5, 1.0], standardize=True)
        assert standard(make_candidates()).tolist() != reward.last_sum.tolist() == [3.0, 3.5, 4.0, 4.5]
        assert standard.last_sum.tolist() == [3.0, 3.5, 4.0, 4.5]

    def test_names_are_unique(self):
        def rewards(*names):
            functions = []
            for index, name in enumerate(names):
                functions.append(lambda candidates, value=float(index): torch.full((len(candidates),), value))
                functions[-1].__name__ = name
            return functions

        reward = WeightedReward(rewards("r", "r", "r_0"))
        assert reward(make_candidates()).tolist() == [3.0] * 4, "each counts once"
        assert reward.names == ["r_1", "r_2", "r_0"]
        assert WeightedReward(rewards("r_1", "r", "r", "r")).names == ["r_1", "r_0", "r_2", "r_3"]

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


def plain(images, prompts):
    return images.mean((1, 2, 3))


def with_columns(images, prompts, **columns):
    return images.mean((1, 2, 3))


class Scorer:
    def __call__(self, images, prompts, **columns):
        return images.mean((1, 2, 3))

    def score(self, images, prompts, **columns):
        return images.mean((1, 2, 3))


class Network(torch.nn.Module):
    def forward(self, images, prompts, **columns):
        return images.mean((1, 2, 3))


class TestCheckRewardFunction:
    @pytest.mark.parametrize(
        ("function", "columns"),
        [
            (plain, []),
            (with_columns, ["style", "label", "self"]),
            (lambda i, p, **c: 0, ["images", "prompts"]),
            (lambda images, prompts, style: 0, ["style"]),
            (lambda images, prompts, style=None: 0, []),
            (functools.partial(with_columns, scale=2), ["style"]),
            (Scorer(), ["style"]),
            (Scorer().score, ["style"]),
            (Network(), ["style"]),
            (max, ["style"]),
        ],
    )
    def test_what_can_be_called(self, function, columns):
        check_reward_function(function, columns)

    @pytest.mark.parametrize(
        ("function", "columns", "expected"),
        [
            (plain, ["style"], r"`plain\(images, prompts\)` cannot be called: .*'style'.*`\*\*columns`"),
            (lambda images, prompts, metadata: 0, [], "metadata"),
            (lambda prompts: 0, [], "too many positional arguments"),
            (with_columns, ["images", "style"], r"columns .* `with_columns`: \['images'\].*rename_column"),
            (with_columns, ["prompts"], r"\['prompts'\]"),
            (lambda texts, style, **c: 0, ["style"], r"\['style'\]"),
            (Scorer(), ["self"], r"`Scorer`: \['self'\]"),
            (Network(), ["images"], r"`Network`: \['images'\]"),
            (Scorer, [], "`Scorer` is a class"),
        ],
    )
    def test_what_cannot(self, function, columns, expected):
        with pytest.raises(ValueError, match=expected):
            check_reward_function(function, columns)


class TestCallRewardFunction:
    images = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))

    def call(self, function):
        return call_reward_function(function, self.images, ["fox"] * 4)

    def test_outside_of_autocast(self, tiny_sd3_policy):
        """Under bfloat16 a linear scorer tells 16 candidates hardly apart, and `.numpy()` fails on what it returns."""
        scorer, seen = torch.nn.Linear(3 * 32 * 32, 1), []

        def linear(images, prompts):
            seen.append((images.dtype, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
            return scorer(images.flatten(1))[:, 0].numpy()

        candidates = make_candidates(count=16)
        expected = scorer(tiny_sd3_policy.decode(candidates.denoised).flatten(1))[:, 0]
        reward = PixelReward(linear, tiny_sd3_policy)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(reward(candidates), expected.detach())
        assert seen == [(torch.float32, False, False)]

    @pytest.mark.parametrize(
        "convert", [list, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.bfloat16, lambda scores: scores > 0.5]
    )
    def test_scores_of_every_kind(self, convert):
        scores = self.call(lambda images, prompts: convert(images.mean((1, 2, 3))))
        assert scores.dtype == torch.float32 and scores.shape == (4,)

    @pytest.mark.parametrize(
        ("returned", "expected"),
        [
            (None, "returned `NoneType`"),
            ((torch.zeros(4), {}), "returned a `tuple` of `Tensor`, `dict`"),
            ({"red": torch.zeros(4)}, "returned `dict`"),
            ([0.1, None, 0.2, None], "returned a `list` of `float`, `NoneType`"),
            (torch.zeros(3), r"returned shape \(3,\)"),
            (torch.zeros(4, 1), r"returned shape \(4, 1\)"),
            (0.5, r"returned shape \(\)"),
        ],
    )
    def test_others_are_refused_by_the_function_s_name(self, returned, expected):
        def judge(images, prompts):
            return returned

        with pytest.raises(ValueError, match=f"`judge` must return one score per candidate, 4, but {expected}"):
            self.call(judge)


def test_functions_that_return_no_scores_when_called():
    async def later(images, prompts):
        return [0.0]

    def one_by_one(images, prompts):
        yield 0.0

    for function in (later, one_by_one):
        with pytest.raises(ValueError, match=f"`{function.__name__}` is `async` or a generator"):
            check_reward_function(function)
