# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tapo_trl.schedulers import (
    FlowMatchSDEScheduler,
    draw_candidates,
    gaussian_kl,
    gaussian_log_prob,
    gaussian_log_ratio,
    normalised_log_ratio,
    sde_step_indices,
    window_step_indices,
)


SDE_TYPES = ["flow", "constant", "cps"]


def make_scheduler(num_inference_steps=20, **kwargs):
    scheduler = FlowMatchSDEScheduler(**{"shift": 3.0} | kwargs)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


class TestWindowStepIndices:
    def test_by_hand(self):
        steps = [1, 3, 6, 8, 11]
        windows = [window_step_indices(steps, 2, i, interval=2) for i in range(10)]
        starts = [[1, 3], [3, 6], [6, 8], [8, 11]]
        assert windows == [window for window in starts for _ in range(2)] + [[8, 11]] * 2
        cyclic = [window_step_indices(steps, 2, i, interval=1, stride=2, strategy="cyclic") for i in range(4)]
        assert cyclic == [[1, 3], [6, 8], [1, 3], [6, 8]]
        assert window_step_indices(steps, 5, 1000) == steps

    def test_random_ones_depend_on_seed_and_iteration_alone(self):
        steps = list(range(6))
        drawn = [window_step_indices(steps, 3, i, strategy="random", seed=1) for i in range(200)]
        assert drawn == [window_step_indices(steps, 3, i, strategy="random", seed=1) for i in range(200)]
        assert drawn != [window_step_indices(steps, 3, i, strategy="random", seed=2) for i in range(200)]
        assert sorted({window[0] for window in drawn}) == [0, 1, 2, 3]
        assert all(window == list(range(window[0], window[0] + 3)) for window in drawn)

    def test_unknown_strategy(self):
        with pytest.raises(ValueError, match="strategy"):
            window_step_indices([0, 1], 1, 0, strategy="decay")


class TestNormalisedLogRatio:
    def test_is_the_noise_times_the_difference_of_the_means(self):
        generator = torch.Generator().manual_seed(0)
        mean, old, noise = torch.randn(3, 4, 2, 5, 5, dtype=torch.float64, generator=generator)
        std = torch.tensor([0.1, 0.4, 0.9, 2.0], dtype=torch.float64).view(-1, 1, 1, 1)
        log_ratio = gaussian_log_ratio(old + std * noise, mean, old, std)
        normalised = normalised_log_ratio(log_ratio, gaussian_kl(mean, old, std), std)
        torch.testing.assert_close(normalised, (noise * (mean - old)).flatten(1).mean(1))

    def test_has_no_bias_and_a_spread_that_std_does_not_change(self):
        generator = torch.Generator().manual_seed(0)
        delta, noise = torch.randn(1, 16, generator=generator), torch.randn(200_000, 16, generator=generator)
        for std in (0.2, 1.5):
            std = torch.full((len(noise), 1), std)
            log_ratio = gaussian_log_ratio(std * noise, delta.expand_as(noise), torch.zeros_like(noise), std)
            divergence = gaussian_kl(delta.expand_as(noise), torch.zeros_like(noise), std)
            normalised = normalised_log_ratio(log_ratio, divergence, std)
            assert log_ratio.mean().item() == pytest.approx(-divergence[0].item(), abs=0.02)
            assert normalised.mean().item() == pytest.approx(0, abs=2e-3)
            assert normalised.std().item() == pytest.approx(delta.norm().item() / 16, rel=0.01)


class TestSDEStepIndices:
    def test_eq_10(self):
        assert sde_step_indices(20, 8) == [1, 3, 6, 8, 11, 13, 16, 18]
        assert sde_step_indices(40, 8) == [1, 6, 11, 16, 21, 26, 31, 36]
        assert sde_step_indices(20, 2, t_init=4) == [4, 14]
        assert sde_step_indices(4, 4, t_init=0) == [0, 1, 2, 3]

    @pytest.mark.parametrize("steps, n, t_init", [(8, 9, 0), (8, 0, 0), (8, 8, 1), (8, 4, 3), (8, 4, -1)])
    def test_rejects_steps_that_do_not_fit(self, steps, n, t_init):
        with pytest.raises(ValueError, match="num_sde_steps|t_init"):
            sde_step_indices(steps, n, t_init)


class TestGrid:
    @pytest.mark.parametrize("shift", [1.0, 3.0])
    @pytest.mark.parametrize("steps", [4, 20, 40])
    def test_is_that_of_the_euler_scheduler(self, shift, steps):
        reference = FlowMatchEulerDiscreteScheduler(shift=shift)
        reference.set_timesteps(steps)
        scheduler = make_scheduler(steps, shift=shift)
        assert torch.equal(scheduler.sigmas, reference.sigmas)
        assert torch.equal(scheduler.timesteps, reference.timesteps)

    def test_config_round_trip(self, tmp_path):
        make_scheduler(noise_level=0.3, sde_type="cps", logprob_reduction="sum").save_pretrained(tmp_path)
        loaded = FlowMatchSDEScheduler.from_pretrained(tmp_path)
        assert (loaded.config.shift, loaded.config.noise_level) == (3.0, 0.3)
        assert (loaded.config.sde_type, loaded.config.logprob_reduction) == ("cps", "sum")

    @pytest.mark.parametrize(
        "kwargs", [{"sde_type": "ddim"}, {"logprob_reduction": "max"}, {"noise_level": -1}, {"invert_sigmas": True}]
    )
    def test_rejects_bad_arguments(self, kwargs):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            FlowMatchSDEScheduler(**kwargs)


class TestSteps:
    def test_ode_step_is_the_diffusers_step(self):
        scheduler, reference = make_scheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)
        reference.set_timesteps(20)
        sample = torch.randn(2, 4, 3, 3)
        for index, timestep in enumerate(reference.timesteps):
            velocity = torch.randn_like(sample)
            expected = reference.step(velocity, timestep, sample, return_dict=False)[0]
            assert torch.equal(scheduler.ode_step(sample, velocity, index), expected)
            sample = expected

    @pytest.mark.parametrize("sde_type", ["flow", "constant"])
    def test_no_noise_is_the_ode_step_bit_for_bit(self, sde_type):
        scheduler = make_scheduler(noise_level=0.0, sde_type=sde_type)
        sample, velocity = torch.randn(2, 2, 4, 3, 3)
        for index in range(20):
            mean, std = scheduler.sde_mean_std(sample, velocity, index)
            assert torch.equal(mean, scheduler.ode_step(sample, velocity, index))
            assert (std == 0).all()

    def test_no_noise_is_the_ode_step_for_cps(self):
        scheduler = make_scheduler(noise_level=0.0, sde_type="cps")
        sample, velocity = torch.randn(2, 2, 4, 3, 3)
        mean, std = scheduler.sde_mean_std(sample, velocity, 7)
        torch.testing.assert_close(mean, scheduler.ode_step(sample, velocity, 7))
        assert std == 0

    def test_eq_11_by_hand(self):
        scheduler = make_scheduler(noise_level=0.7)
        x, v = torch.tensor([[2.0]]), torch.tensor([[-1.0]])
        t, t_next = scheduler.sigmas[5].item(), scheduler.sigmas[6].item()
        sigma_t = 0.7 * math.sqrt(t / (1 - t))
        phi = t - t_next
        mean, std = scheduler.sde_mean_std(x, v, 5)
        expected = 2.0 - (-1.0 + sigma_t**2 / (2 * t) * (2.0 + (1 - t) * -1.0)) * phi
        assert mean.item() == pytest.approx(expected, rel=1e-5)
        assert std.item() == pytest.approx(sigma_t * math.sqrt(phi), rel=1e-5)

    def test_singular_first_step_uses_the_next_sigma(self):
        scheduler = make_scheduler(noise_level=0.7)
        _, std = scheduler.sde_mean_std(torch.zeros(1, 1), torch.zeros(1, 1), 0)
        s0, s1 = scheduler.sigmas[:2].tolist()
        assert s0 == 1
        assert std.item() == pytest.approx(0.7 * math.sqrt(s0 / (1 - s1)) * math.sqrt(s0 - s1), rel=1e-5)

    @pytest.mark.parametrize("sde_type", SDE_TYPES)
    def test_batched_indices_equal_single_ones(self, sde_type):
        scheduler = make_scheduler(sde_type=sde_type)
        sample, velocity = torch.randn(2, 4, 3, 2, 2)
        index = torch.tensor([0, 3, 18, 10])
        means, stds = scheduler.sde_mean_std(sample, velocity, index)
        for row in range(4):
            mean, std = scheduler.sde_mean_std(sample[row : row + 1], velocity[row : row + 1], index[row].item())
            torch.testing.assert_close(means[row : row + 1], mean, rtol=0, atol=0)
            torch.testing.assert_close(stds[row].squeeze(), std.squeeze(), rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_maths_is_in_float32(self, dtype):
        scheduler = make_scheduler()
        sample, velocity = torch.randn(2, 2, 4).to(dtype)
        mean, std = scheduler.sde_mean_std(sample, velocity, 3)
        assert mean.dtype == std.dtype == torch.float32
        assert torch.equal(mean, scheduler.sde_mean_std(sample.float(), velocity.float(), 3)[0])

    def test_candidates_have_the_step_distribution(self):
        scheduler = make_scheduler()
        mean, std = scheduler.sde_mean_std(torch.randn(2, 1), torch.randn(2, 1), 4)
        candidates = draw_candidates(mean, std, torch.randn(2, 20000, 1))
        assert candidates.shape == (2, 20000, 1)
        torch.testing.assert_close(candidates.mean(1), mean, rtol=0, atol=4 * std.item() / math.sqrt(20000))
        torch.testing.assert_close(candidates.std(1), std.expand(2, 1), rtol=0.03, atol=0)


class TestMarginals:
    """For data N(0, c^2) everything is linear, so the variance after every step is known without sampling."""

    @staticmethod
    def final_variance(scheduler, data_std, num_steps, stochastic):
        variance = torch.ones(())
        for index in range(num_steps):
            sigma = scheduler.sigmas[index].double()
            velocity = (sigma - (1 - sigma) * data_std**2) / ((1 - sigma) ** 2 * data_std**2 + sigma**2)
            x = torch.ones(1, 1)
            if stochastic(index):
                mean, std = scheduler.sde_mean_std(x, velocity.float() * x, index)
                variance = mean.square() * variance + std**2
            else:
                variance = scheduler.ode_step(x, velocity.float() * x, index).square() * variance
        return variance.item()

    @pytest.mark.parametrize("sde_type", ["flow", "constant"])
    @pytest.mark.parametrize("data_std", [0.5, 2.0])
    @pytest.mark.parametrize("num_sde_steps", [8, None])
    def test_sde_and_mixed_sampling_keep_the_data_variance(self, sde_type, data_std, num_sde_steps):
        errors = []
        for num_steps in (250, 2000):
            scheduler = make_scheduler(num_steps, shift=1.0, sde_type=sde_type)
            first = num_steps // 10  # sigma = 0.9: away from the singular end, see the next test
            last = num_steps - 1
            steps = range(first, last) if num_sde_steps is None else sde_step_indices(num_steps, num_sde_steps, first)
            variance = self.final_variance(scheduler, data_std, num_steps, steps.__contains__)
            errors.append(abs(variance / data_std**2 - 1))
        assert errors[1] < 3e-3
        assert errors[1] < errors[0] / 3, "the error must vanish with the step size"

    def test_the_flow_law_is_coarse_at_its_singular_end_for_any_step_size(self):
        """At step 1, s^2 dt = a^2 sigma dt / (1 - sigma) stays near a^2 = 0.49 however small dt is."""
        for num_steps in (250, 2000):
            scheduler = make_scheduler(num_steps, shift=1.0, sde_type="flow")
            variance = self.final_variance(scheduler, 0.5, num_steps, lambda index: index == 1)
            assert 0.04 < variance / 0.25 - 1 < 0.08

    def test_wrong_drift_would_be_seen(self, monkeypatch):
        import tapo_trl.schedulers.flow_match_sde as module

        monkeypatch.setattr(module, "flow_sde_mean", lambda x, v, sigma, dt, s: x + v * dt)
        scheduler = make_scheduler(2000, shift=1.0)
        assert abs(self.final_variance(scheduler, 0.5, 2000, lambda index: index > 0) / 0.25 - 1) > 0.2

    @pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
    def test_cps_keeps_the_coefficients(self, noise_level):
        """With all data at one point the marginal at sigma is N((1 - sigma) x0, sigma^2), for steps of any size."""
        scheduler = make_scheduler(8, sde_type="cps", noise_level=noise_level)
        variance = scheduler.sigmas[0] ** 2
        for index in range(7):
            x = torch.ones(1, 1)
            mean, std = scheduler.sde_mean_std(x, x / scheduler.sigmas[index], index)
            variance = mean.square().squeeze() * variance + std**2
            assert variance.item() == pytest.approx(scheduler.sigmas[index + 1].item() ** 2, rel=1e-4)


class TestDensities:
    def setup_method(self):
        generator = torch.Generator().manual_seed(1)
        self.mean, self.ref_mean, self.sample = torch.randn(3, 4, 3, 5, generator=generator, dtype=torch.float64)
        self.std = torch.rand(4, 1, 1, generator=generator, dtype=torch.float64) + 0.1

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_log_ratio_is_the_difference_of_log_probs(self, reduction):
        ratio = gaussian_log_ratio(self.sample, self.mean, self.ref_mean, self.std, reduction)
        expected = gaussian_log_prob(self.sample, self.mean, self.std, reduction) - gaussian_log_prob(
            self.sample, self.ref_mean, self.std, reduction
        )
        torch.testing.assert_close(ratio, expected, rtol=1e-10, atol=1e-12)

    def test_sum_is_mean_times_dimensions(self):
        mean = gaussian_log_ratio(self.sample, self.mean, self.ref_mean, self.std)
        total = gaussian_log_ratio(self.sample, self.mean, self.ref_mean, self.std, "sum")
        torch.testing.assert_close(total, 15 * mean)

    def test_log_ratio_is_exactly_zero_for_equal_policies(self):
        ratio = gaussian_log_ratio(self.sample.float(), self.mean.float(), self.mean.float(), self.std.float())
        assert (ratio == 0).all()

    def test_log_ratio_does_not_cancel_in_float32(self):
        mean = self.ref_mean + 1e-3 * self.mean
        exact = gaussian_log_ratio(self.sample, mean, self.ref_mean, self.std)
        ratio = gaussian_log_ratio(*(x.float() for x in (self.sample, mean, self.ref_mean, self.std)))
        difference = gaussian_log_prob(*(x.float() for x in (self.sample, mean, self.std))) - gaussian_log_prob(
            *(x.float() for x in (self.sample, self.ref_mean, self.std))
        )
        assert (ratio - exact).abs().max() < (difference - exact).abs().max()

    def test_kl_is_the_expected_log_ratio(self):
        noise = torch.randn(40000, 4, 3, 5, dtype=torch.float64)
        samples = self.mean + self.std * noise
        ratios = torch.stack([gaussian_log_ratio(s, self.mean, self.ref_mean, self.std) for s in samples])
        torch.testing.assert_close(ratios.mean(0), gaussian_kl(self.mean, self.ref_mean, self.std), rtol=0.05, atol=0)
