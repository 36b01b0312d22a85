# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import math
import statistics

import pytest
import torch

from tapo_trl.losses import (
    diffusion_dpo_loss,
    diffusion_nft_loss,
    flow_dppo_loss,
    flow_grpo_loss,
    group_advantages,
    logit_noise,
    optimality_rewards,
    rare_pair_weights,
    slrm_loss,
    tapo_loss,
    thurstone_loss,
    transferred_beta,
    velocity_error_change,
)
from tapo_trl.schedulers import gaussian_log_ratio


class TestSLRMLoss:
    def test_is_eq_9_in_the_plain_domain(self):
        chosen, rejected = torch.randn(2, 50, dtype=torch.float64)
        for eta in (0.5, 1.0, 3.0):
            losses, _ = slrm_loss(chosen, rejected, eta=eta)
            s_w, s_l = chosen.exp() ** eta, rejected.exp() ** eta
            torch.testing.assert_close(losses, -(s_w / (s_w + s_l)).log())

    def test_survives_scores_that_overflow_in_the_plain_domain(self):
        losses, metrics = slrm_loss(torch.tensor([500.0, -500.0]), torch.tensor([0.0, 0.0]))
        assert losses.tolist() == [0.0, 500.0]
        assert metrics["accuracy"].tolist() == [1.0, 0.0]

    def test_ties_margin_and_smoothing(self):
        zero = torch.zeros(1)
        losses, metrics = slrm_loss(zero, zero)
        assert losses.item() == pytest.approx(math.log(2)) and metrics["accuracy"].item() == 0.5
        assert slrm_loss(zero + 2, zero, margin=zero + 2)[0].item() == pytest.approx(math.log(2))
        smooth = slrm_loss(zero + 2, zero, label_smoothing=0.25)[0].item()
        expected = -0.75 * math.log(1 / (1 + math.exp(-2))) - 0.25 * math.log(1 / (1 + math.exp(2)))
        assert smooth == pytest.approx(expected, rel=1e-6)


class TestThurstoneLoss:
    def test_is_the_fidelity_of_the_winning_probability(self):
        """By the error function of the standard library, number by number."""
        torch.manual_seed(0)
        chosen, rejected = torch.randn(2, 50, dtype=torch.float64)
        sigma, margin = torch.rand(50, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
        for q in (0.0, 0.1, 0.5):
            losses, metrics = thurstone_loss(chosen, rejected, sigma, margin, label_smoothing=q)
            for s_w, s_l, level, m, loss in zip(chosen, rejected, sigma, margin, losses, strict=True):
                variance = 2 * level.item() ** 2 + 0.05
                z = (s_w - s_l - (m if q < 0.5 else 0)).item() / math.sqrt(2 * variance)
                p = 0.5 * (1 + math.erf(z / math.sqrt(2)))
                assert loss.item() == pytest.approx(1 - math.sqrt((1 - q) * p) - math.sqrt(q * (1 - p)), abs=1e-12)
            torch.testing.assert_close(metrics["margin"], chosen - rejected)
            assert metrics["accuracy"].tolist() == (chosen > rejected).double().tolist()

    def test_the_probability_is_that_two_noisy_scores_compare_so(self):
        generator = torch.Generator().manual_seed(0)
        for sigma, gap in ((0.1, 0.3), (0.9, 0.3)):
            std = math.sqrt(2 * sigma**2 + 0.05)
            noise = std * torch.randn(2, 400_000, generator=generator)
            share = (gap + noise[0] > noise[1]).float().mean().item()
            loss, _ = thurstone_loss(torch.tensor([gap]), torch.tensor([0.0]), torch.tensor([sigma]))
            assert loss.item() == pytest.approx(1 - math.sqrt(share), abs=2e-3)

    def test_noise_asks_for_less_certainty(self):
        gap, sigma = torch.full((3,), 1.0, requires_grad=True), torch.tensor([0.0, 0.5, 1.0])
        losses, _ = thurstone_loss(gap, torch.zeros(3), sigma)
        assert losses[0] < losses[1] < losses[2]
        losses.sum().backward()
        assert gap.grad[0].abs() < gap.grad[1].abs()  # the clean pair is settled, the noisy one not yet

    def test_far_from_zero(self):
        gap = torch.tensor([-30.0, -8.0, 8.0, 30.0], requires_grad=True)
        losses, _ = thurstone_loss(gap, torch.zeros(4), torch.full((4,), 0.1))
        losses.sum().backward()
        assert losses.isfinite().all() and gap.grad.isfinite().all()
        assert losses[:2].tolist() == pytest.approx([1, 1]) and losses[2:].tolist() == pytest.approx([0, 0], abs=1e-6)

    def test_a_tie_wants_equal_scores(self):
        gap = torch.tensor([-0.5, 0.0, 0.5], requires_grad=True)
        half = torch.full((3,), 0.5)
        losses, metrics = thurstone_loss(gap, torch.zeros(3), half, label_smoothing=half)
        losses.sum().backward()
        assert losses[1].item() == pytest.approx(0, abs=1e-6) and losses[0].item() == pytest.approx(losses[2].item())
        assert gap.grad[0] < 0 < gap.grad[2] and gap.grad[1].item() == pytest.approx(0, abs=1e-6)
        assert metrics["accuracy"].tolist() == [0.0, 0.5, 1.0]


class TestTAPOLoss:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_ln_2_for_equal_policies(self, dtype):
        zero = torch.zeros(3, dtype=dtype)
        losses, metrics = tapo_loss(zero, zero, beta=1000.0)
        torch.testing.assert_close(losses, torch.full_like(zero, math.log(2)), rtol=0, atol=1e-7)
        assert metrics["rewards/accuracies"].tolist() == [0.5] * 3

    def test_is_eq_13(self):
        win, lose = torch.randn(2, 20, dtype=torch.float64) * 1e-3
        losses, metrics = tapo_loss(win, lose, beta=500.0)
        torch.testing.assert_close(losses, -torch.sigmoid(500 * win - 500 * lose).log())
        torch.testing.assert_close(metrics["rewards/margins"], 500 * (win - lose))
        assert metrics["rewards/accuracies"].tolist() == (win > lose).double().tolist()

    def test_other_losses(self):
        win, lose = torch.tensor([0.002]), torch.tensor([0.001])
        assert tapo_loss(win, lose, 100.0, "hinge")[0].item() == pytest.approx(0.9, rel=1e-4)
        assert tapo_loss(win, lose, 100.0, "ipo")[0].item() == pytest.approx((0.001 - 0.005) ** 2, rel=1e-3)
        with pytest.raises(ValueError, match="loss_type"):
            tapo_loss(win, lose, 100.0, "sigmod")

    def test_ratio_clip_stops_the_gradient_outside(self):
        win = torch.tensor([0.05, 0.2], requires_grad=True)
        losses, metrics = tapo_loss(win, torch.zeros(2), beta=1.0, ratio_clip=0.1)
        losses.sum().backward()
        assert win.grad[0] != 0 and win.grad[1] == 0
        torch.testing.assert_close(metrics["rewards/chosen"], win.detach())


class TestDiffusionDPOLoss:
    def error_changes(self, seed=0, scale=0.1):
        generator = torch.Generator().manual_seed(seed)
        target, ref_velocity, step = torch.randn(3, 20, 4, 3, 3, dtype=torch.float64, generator=generator)
        velocity = ref_velocity + scale * step
        return velocity, ref_velocity, target

    def test_error_change_is_the_difference_of_the_squared_errors(self):
        velocity, ref_velocity, target = self.error_changes()
        expected = [
            ((v - x).square() - (r - x).square()).mean()
            for v, r, x in zip(velocity, ref_velocity, target, strict=True)
        ]
        torch.testing.assert_close(velocity_error_change(velocity, ref_velocity, target), torch.stack(expected))

    def test_error_change_does_not_cancel(self):
        velocity, ref_velocity, target = (tensor.float() for tensor in self.error_changes(scale=1e-6))
        exact = velocity_error_change(velocity.double(), ref_velocity.double(), target.double())
        change = velocity_error_change(velocity, ref_velocity, target)
        naive = (velocity - target).square().mean((1, 2, 3)) - (ref_velocity - target).square().mean((1, 2, 3))
        assert (change - exact).abs().max() < 0.01 * (naive - exact).abs().max()
        assert (velocity_error_change(ref_velocity, ref_velocity, target) == 0).all()

    def test_is_the_closed_form(self):
        chosen, rejected = (velocity_error_change(*self.error_changes(seed)) for seed in (0, 1))
        losses, metrics = diffusion_dpo_loss(chosen, rejected, beta=70.0)
        torch.testing.assert_close(losses, -torch.sigmoid(-70 / 2 * (chosen - rejected)).log())
        torch.testing.assert_close(metrics["rewards/chosen"], -35 * chosen)
        torch.testing.assert_close(metrics["rewards/margins"], 35 * (rejected - chosen))
        assert metrics["rewards/accuracies"].tolist() == (chosen < rejected).double().tolist()

    def test_is_tapos_with_the_log_ratio_of_two_gaussians_around_the_velocities(self):
        """log N(v; v_theta, 1) - log N(v; v_ref, 1), as a mean over dimensions, is minus half the error change."""
        log_ratios = []
        for seed in (0, 1):
            velocity, ref_velocity, target = self.error_changes(seed)
            normals = [torch.distributions.Normal(mean, 1.0).log_prob(target) for mean in (velocity, ref_velocity)]
            log_ratios.append((normals[0] - normals[1]).mean((1, 2, 3)))
        changes = [velocity_error_change(*self.error_changes(seed)) for seed in (0, 1)]
        torch.testing.assert_close(diffusion_dpo_loss(*changes, beta=50.0)[0], tapo_loss(*log_ratios, beta=50.0)[0])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_ln_2_for_equal_policies(self, dtype):
        zero = torch.zeros(3, dtype=dtype)
        losses, metrics = diffusion_dpo_loss(zero, zero, beta=5000.0)
        torch.testing.assert_close(losses, torch.full_like(zero, math.log(2)), rtol=0, atol=1e-7)
        assert metrics["rewards/accuracies"].tolist() == [0.5] * 3

    def test_margin_and_smoothing_of_each_pair(self):
        chosen, rejected = torch.tensor([-0.02, -0.02, -0.02]), torch.tensor([0.02, 0.02, 0.02])  # logit 2
        smoothing, margin = torch.tensor([0.0, 0.5, 0.25]), torch.tensor([2.0, 0.0, 0.0])
        losses, metrics = diffusion_dpo_loss(chosen, rejected, 100.0, smoothing, margin)
        win, lose = -math.log(1 / (1 + math.exp(-2))), -math.log(1 / (1 + math.exp(2)))
        expected = [math.log(2), (win + lose) / 2, 0.75 * win + 0.25 * lose]
        assert losses.tolist() == pytest.approx(expected, rel=1e-5)
        assert metrics["rewards/margins"].tolist() == pytest.approx([2.0] * 3, rel=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        lambda gap, q, m: slrm_loss(gap, torch.zeros_like(gap), margin=m, label_smoothing=q)[0],
        lambda gap, q, m: thurstone_loss(gap, 0 * gap, torch.full_like(gap, 0.3), margin=m, label_smoothing=q)[0],
        lambda gap, q, m: diffusion_dpo_loss(-gap, 0 * gap, beta=2.0, margin=m, label_smoothing=q)[0],
    ],
    ids=["slrm", "thurstone", "diffusion_dpo"],
)
def test_a_tie_has_no_margin(loss):
    """Of a pair with the label 0.5 the loss is lowest where both sides score alike; other pairs keep their margin."""
    gaps = torch.arange(-40, 41) / 20
    margin, ties = torch.full_like(gaps, 0.5), torch.full_like(gaps, 0.5)
    assert gaps[loss(gaps, ties, margin).argmin()] == 0
    torch.testing.assert_close(loss(gaps, ties, margin), loss(gaps, ties, None))
    mixed = torch.where(torch.arange(81) % 2 == 0, 0.5, 0.1)
    expected = torch.where(mixed == 0.5, loss(gaps, mixed, None), loss(gaps - margin, mixed, None))
    torch.testing.assert_close(loss(gaps, mixed, margin), expected)


class TestGroupAdvantages:
    REWARDS = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 5.0]])

    def test_by_hand(self):
        found = group_advantages(self.REWARDS, eps=0.0)
        std = math.sqrt((4 + 1 + 9) / 2)
        torch.testing.assert_close(found[0], torch.tensor([-2 / std, -1 / std, 3 / std]))
        torch.testing.assert_close(found[1], torch.tensor([-1.0, -1.0, 2.0]) / math.sqrt(3))

    @pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
    def test_scales(self, scale_rewards):
        found = group_advantages(self.REWARDS, scale_rewards, eps=1e-4)
        for row, advantages in zip(self.REWARDS.tolist(), found.tolist(), strict=True):
            values = {"group": row, "batch": self.REWARDS.flatten().tolist(), "none": None}[scale_rewards]
            scale = 1.0 if values is None else statistics.stdev(values) + 1e-4
            assert advantages == pytest.approx([(r - statistics.mean(row)) / scale for r in row], abs=1e-6)

    @pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
    def test_a_group_that_is_rewarded_alike_learns_nothing(self, scale_rewards):
        """Also where the mean of equal numbers is not that number."""
        rewards = torch.cat([torch.full((1, 3), 0.1), torch.rand(1, 3)])
        found = group_advantages(rewards, scale_rewards)
        assert found[0].tolist() == [0.0, 0.0, 0.0] and (found[1] != 0).all()

    def test_values_that_are_not_finite_are_passed_on(self):
        rewards = torch.tensor([[1.0, math.nan, 2.0], [math.inf, math.inf, math.inf], [1.0, 2.0, 3.0]])
        found = group_advantages(rewards)
        assert not found[0].isfinite().any() and found[2].isfinite().all()

    def test_unknown_scale(self):
        with pytest.raises(ValueError, match="scale_rewards"):
            group_advantages(self.REWARDS, "prompt")


class TestFlowGRPOLoss:
    @pytest.mark.parametrize(
        ("ratio", "advantage", "loss", "slope", "clipped"),
        [
            (1.0, 2.0, -2.0, -2.0, None),
            (1.2, 2.0, -2.2, 0.0, "high"),
            (0.8, 2.0, -1.6, -1.6, None),
            (0.8, -2.0, 1.8, 0.0, "low"),
            (1.2, -2.0, 2.4, 2.4, None),
            (1.05, 0.0, 0.0, 0.0, None),
        ],
    )
    def test_by_hand(self, ratio, advantage, loss, slope, clipped):
        """`slope` is the derivative by the log-ratio, that is times the ratio where it is not clipped."""
        log_ratio = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
        losses, metrics = flow_grpo_loss(log_ratio, torch.tensor([advantage], dtype=torch.float64), epsilon=0.1)
        assert losses.item() == pytest.approx(loss)
        assert torch.autograd.grad(losses.sum(), log_ratio)[0].item() == pytest.approx(slope)
        assert metrics["ratio"].item() == pytest.approx(ratio)
        found = {name: metrics[f"clip_ratio/{name}_mean"].item() for name in ("low", "high", "region")}
        assert found == {"low": clipped == "low", "high": clipped == "high", "region": clipped is not None}


class TestFlowDPPOLoss:
    @pytest.mark.parametrize("divergence", [0.0, 0.5, 2.0])
    @pytest.mark.parametrize("advantage", [-1.5, 2.0])
    @pytest.mark.parametrize("ratio", [0.7, 1.0, 1.4])
    def test_by_hand(self, ratio, advantage, divergence):
        log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
        arguments = (torch.tensor([advantage], dtype=torch.float64), torch.tensor([divergence]), 1.0)
        losses, metrics = flow_dppo_loss(log_ratio, *arguments)
        (gradient,) = torch.autograd.grad(losses.sum(), log_ratio)
        masked = divergence > 1 and (ratio - 1) * advantage > 0
        assert losses.item() == pytest.approx(0 if masked else -ratio * advantage)
        assert gradient.item() == pytest.approx(0 if masked else -ratio * advantage)
        assert metrics["clip_ratio/region_mean"].item() == masked
        assert metrics["clip_ratio/high_mean"].item() == (masked and ratio > 1)

    def test_without_a_threshold_it_is_flow_grpo_without_clipping(self):
        log_ratios, advantages = torch.randn(2, 20, dtype=torch.float64)
        losses, _ = flow_dppo_loss(log_ratios, advantages, torch.rand(20), 1.0)
        for loss, log_ratio, advantage in zip(losses, log_ratios, advantages, strict=True):
            assert loss.item() == pytest.approx(-math.exp(log_ratio) * advantage.item())


class TestRarePairWeights:
    def test_by_hand(self):
        # Bins 2 (three scores), 5 (two) and 9 (one)
        chosen, rejected = torch.tensor([0.55, 0.95, 0.21]), torch.tensor([0.25, 0.29, 0.5])
        weights = rare_pair_weights(chosen, rejected, bin_width=0.1)
        expected = [math.sqrt(3 / 2), math.sqrt(3 / 1), math.sqrt(3 / 2)]
        assert weights.tolist() == pytest.approx(expected, rel=1e-12)
        squared = rare_pair_weights(chosen, rejected, alpha=2.0, bin_width=0.1)
        torch.testing.assert_close(squared, weights.square())
        assert rare_pair_weights(chosen, rejected, alpha=0.0, bin_width=0.1).tolist() == [1.0] * 3
        assert rare_pair_weights(rejected, chosen, bin_width=0.1).tolist() == weights.tolist()

    def test_scale_and_offset_of_scores_do_not_matter_with_the_bins(self):
        generator = torch.Generator().manual_seed(0)
        chosen, rejected = torch.randint(-20, 20, (2, 50), generator=generator) * 0.5 + 0.25
        weights = rare_pair_weights(chosen, rejected, bin_width=0.5)
        torch.testing.assert_close(rare_pair_weights(4 * chosen + 8, 4 * rejected + 8, bin_width=2.0), weights)
        assert weights.min() >= 1 and weights.max() > 1.5


class TestDiffusionNFTLoss:
    def arguments(self, seed=0, scale=0.3):
        generator = torch.Generator().manual_seed(seed)
        old, step, target = torch.randn(3, 5, 2, 3, 3, dtype=torch.float64, generator=generator)
        sigma, optimality = torch.rand(2, 5, dtype=torch.float64, generator=generator)
        return old + scale * step, old, target, 0.1 + 0.9 * sigma, optimality

    def by_hand(self, velocity, old, target, sigma, optimality, beta, weighting, frozen=None):
        """Number by number, from predicted clean latents. `frozen` is the velocity at which normalisers are computed."""
        losses = []
        frozen = velocity if frozen is None else frozen
        for v, v_old, v_target, t, r, v_frozen in zip(velocity, old, target, sigma, optimality, frozen, strict=True):
            terms = []
            for sign in (1, -1):
                implicit, fixed = ((1 - sign * beta) * v_old + sign * beta * own for own in (v, v_frozen))
                if weighting == "none":
                    terms.append(statistics.mean(((implicit - v_target) ** 2).flatten().tolist()))
                    continue
                x0 = torch.full_like(v, 0.7)
                x = (1 - t) * x0 + t * (v_target + x0)
                errors = ((x - t * implicit) - x0).flatten().tolist()
                scale = statistics.mean(abs(e) for e in ((x - t * fixed) - x0).flatten().tolist())
                terms.append(statistics.mean(e * e for e in errors) / scale)
            losses.append(r.item() * terms[0] + (1 - r.item()) * terms[1])
        return losses

    @pytest.mark.parametrize("weighting", ["adaptive", "none"])
    @pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
    def test_by_hand(self, beta, weighting):
        arguments = self.arguments()
        losses, metrics = diffusion_nft_loss(*arguments, beta, weighting)
        assert losses.tolist() == pytest.approx(self.by_hand(*arguments, beta, weighting), rel=1e-12)
        distance = (arguments[0] - arguments[1]).square().mean((1, 2, 3))
        torch.testing.assert_close(metrics["distance/old"], distance)

    @pytest.mark.parametrize("weighting", ["adaptive", "none"])
    def test_gradient_by_finite_differences(self, weighting):
        velocity, *others = self.arguments()
        velocity.requires_grad_()
        losses, _ = diffusion_nft_loss(velocity, *others, 0.6, weighting)
        (gradient,) = torch.autograd.grad(losses.sum(), velocity)
        frozen, step = velocity.detach(), 1e-6
        for index in [(0, 0, 0, 0), (1, 1, 2, 0), (3, 0, 1, 2), (4, 1, 2, 2)]:
            sides = []
            for sign in (1, -1):
                moved = frozen.clone()
                moved[index] += sign * step
                sides.append(sum(self.by_hand(moved, *others, 0.6, weighting, frozen)))
            assert gradient[index].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-5, abs=1e-8)

    @pytest.mark.parametrize("weighting", ["adaptive", "none"])
    def test_of_the_old_policy_it_is_the_same_whatever_the_reward(self, weighting):
        _, old, target, sigma, optimality = self.arguments()
        old.requires_grad_()
        first, metrics = diffusion_nft_loss(old, old.detach(), target, sigma, optimality, 0.3, weighting)
        second, _ = diffusion_nft_loss(old, old.detach(), target, sigma, 1 - optimality, 5.0, weighting)
        torch.testing.assert_close(first, second, rtol=1e-14, atol=0)
        assert torch.equal(metrics["error/positive"], metrics["error/negative"])
        # The gradient is that of flow matching, times the reward between -1 and 1, and times beta
        (gradient,) = torch.autograd.grad(first.sum(), old)
        error = old.detach() - target
        scale = torch.ones_like(sigma) if weighting == "none" else sigma / error.abs().mean((1, 2, 3))
        expected = 0.3 * (2 * optimality - 1) * scale
        torch.testing.assert_close(gradient, expected.view(-1, 1, 1, 1) * 2 * error / 18)

    def test_optimum_is_a_step_of_one_over_beta_towards_the_target(self):
        _, old, target, sigma, optimality = self.arguments()
        best = old + (2 * optimality - 1).view(-1, 1, 1, 1) * (target - old) / 0.4
        best.requires_grad_()
        losses, _ = diffusion_nft_loss(best, old, target, sigma, optimality, 0.4, "none")
        assert torch.autograd.grad(losses.sum(), best)[0].abs().max() < 1e-12

    def test_optimality(self):
        advantages = torch.tensor([-9.0, -5.0, -1.0, 0.0, 2.5, 5.0, 7.0])
        assert optimality_rewards(advantages, 5.0).tolist() == pytest.approx([0, 0, 0.4, 0.5, 0.75, 1, 1])

    def test_unknown_weighting(self):
        with pytest.raises(ValueError, match="loss_weighting"):
            diffusion_nft_loss(*self.arguments(), 1.0, "linear")


class TestWhatBetaMeans:
    """The noise of logits, against pairs that do not depend on the policy."""

    PAIRS = 4000

    def step_margins(self, num_dims, kl, beta):
        """Margins of steps that the reference drew with a standard deviation of 0.3, for a policy that is `kl` away."""
        generator = torch.Generator().manual_seed(num_dims)
        ref_mean, noise, shift = torch.randn(3, 2 * self.PAIRS, num_dims, generator=generator)
        std = torch.full((2 * self.PAIRS, 1), 0.3)
        mean = ref_mean + 0.3 * math.sqrt(2 * kl) * shift
        log_ratios = gaussian_log_ratio(ref_mean + 0.3 * noise, mean, ref_mean, std, "mean")
        return tapo_loss(*log_ratios.chunk(2), beta=beta)[1]

    @pytest.mark.parametrize("num_dims", [64, 256, 1024])
    @pytest.mark.parametrize("kl", [0.01, 0.1])
    def test_noise_of_steps(self, num_dims, kl):
        # Here the shift is drawn as well, and (delta^2 / 2) adds k sqrt(4 / D) beta of its own
        measured = self.step_margins(num_dims, kl, beta=100.0)["rewards/margins"].std().item()
        own = 2 * 100.0 * kl / math.sqrt(num_dims)
        assert measured == pytest.approx(math.hypot(logit_noise(100.0, num_dims, kl), own), rel=0.04)

    def test_noise_of_velocity_errors(self):
        """beta sqrt(2 q rho^2 / D): q is the mean square change of the velocity, rho^2 that of the reference's error."""
        beta, change, error = 100.0, 0.1, 0.8
        for num_dims in (64, 1024):
            generator = torch.Generator().manual_seed(num_dims)
            ref_velocity, delta, residual = torch.randn(3, 2 * self.PAIRS, num_dims, generator=generator)
            target = ref_velocity + error * residual
            changes = velocity_error_change(ref_velocity + change * delta, ref_velocity, target)
            margins = diffusion_dpo_loss(*changes.chunk(2), beta=beta)[1]["rewards/margins"]
            assert margins.std().item() == pytest.approx(beta * math.sqrt(2 / num_dims) * change * error, rel=0.04)

    def test_a_transferred_beta_keeps_the_noise_and_the_share_of_saturated_pairs(self):
        metrics = {
            num_dims: self.step_margins(num_dims, kl=0.01, beta=transferred_beta(600.0, num_dims, reference_dim=1024))
            for num_dims in (64, 256, 1024)
        }
        noise, saturated = (
            [of_size[name] for of_size in metrics.values()] for name in ("rewards/margins", "logits/saturated")
        )
        assert [margins.std().item() for margins in noise] == pytest.approx([3.75] * 3, rel=0.06)
        shares = [values.mean().item() for values in saturated]
        assert shares == pytest.approx([2 * (1 - statistics.NormalDist(0, 3.75).cdf(4))] * 3, abs=0.04)

    def test_without_a_reference_dimension_beta_stays(self):
        assert transferred_beta(1000.0, 64, None) == 1000.0
        assert transferred_beta(1000.0, 1024, 65536) == 125.0
