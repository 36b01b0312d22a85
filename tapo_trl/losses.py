# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Losses as pure functions of tensors. Each returns one loss per example and the quantities worth logging."""

import math
from typing import Literal

import torch
import torch.nn.functional as F


SATURATED = 4.0
"""Logit beyond which the sigmoid has less than 2 % or more than 98 % of its gradient left."""


def transferred_beta(beta: float, num_dims: int, reference_dim: int | None) -> float:
    r"""
    The beta that gives the logits of a pair the same noise at `num_dims` dimensions as `beta` gives at `reference_dim`:
    \\( \beta \sqrt{D / D_{ref}} \\).

    Log-ratios and velocity errors are means over the D dimensions of a latent. At the same change of each dimension, their noise
    falls with \\( \sqrt{D} \\), see [`logit_noise`].

    Args:
        beta (`float`): a beta that suits latents of `reference_dim` dimensions.
        num_dims (`int`): dimensions D of a latent.
        reference_dim (`int`, *optional*): 65,536 for SD3.5 at 512 x 512, which the paper's 1000 is for. `None`: `beta` as it is.
    """
    return beta if reference_dim is None else beta * math.sqrt(num_dims / reference_dim)


def logit_noise(beta: float, num_dims: int, kl: float) -> float:
    r"""
    Standard deviation of the logits of [`tapo_loss`] for pairs that do not depend on the policy: \\( 2 \beta \sqrt{k / D} \\).

    A side's log-ratio is \\( \operatorname{mean}(\epsilon \delta + \delta^2 / 2) \\) up to signs, with \\( \epsilon \sim \mathcal N(0, I)
    \\) and the KL divergence \\( k = \operatorname{mean}(\delta^2) / 2 \\) per dimension: its variance is 2 k / D.

    Args:
        beta (`float`): strength of the regularisation.
        num_dims (`int`): dimensions D of a latent.
        kl (`float`): KL divergence of a step from the reference, k, per dimension.
    """
    return 2 * beta * math.sqrt(kl / num_dims)


def slrm_loss(
    chosen_log_scores: torch.Tensor,
    rejected_log_scores: torch.Tensor,
    eta: float = 1.0,
    margin: torch.Tensor | None = None,
    label_smoothing: float | torch.Tensor = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    r"""
    Bradley-Terry loss of SLRM on the enhanced scores, Eq. 9 in the log domain:
    \\( -\log \sigma(\eta (\log \hat{S}_w - \log \hat{S}_l) - m) \\).

    Args:
        chosen_log_scores (`torch.Tensor` of shape `(batch_size,)`): log S_hat of the preferred latents, float32.
        rejected_log_scores (`torch.Tensor` of shape `(batch_size,)`): log S_hat of the others, float32.
        eta (`float`, *optional*, defaults to `1.0`): exponent of the scores.
        margin (`torch.Tensor` of shape `(batch_size,)`, *optional*): m, by how much the preferred must win; 0 for a tie.
        label_smoothing (`float` or `torch.Tensor` of shape `(batch_size,)`, *optional*, defaults to `0.0`):
            probability that a label is flipped; 0.5 for a tie.

    Returns:
        `tuple`: losses of shape `(batch_size,)` and metrics `accuracy` (a tie counts one half) and `margin`.
    """
    margins = eta * (chosen_log_scores - rejected_log_scores)
    losses = _bradley_terry(_less_margin(margins, margin, label_smoothing), label_smoothing)
    metrics = {"accuracy": _win_rate(margins), "margin": margins.detach()}
    return losses, metrics


def thurstone_loss(
    chosen_scores: torch.Tensor,
    rejected_scores: torch.Tensor,
    sigma: torch.Tensor,
    margin: torch.Tensor | None = None,
    label_smoothing: float | torch.Tensor = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    r"""
    Noise-calibrated Thurstone loss of DiNa-LRM. Each score is taken for the mean of a Gaussian, the wider the noisier the
    latents, so that the preferred one wins with probability p, whose fidelity to the label is the loss:
    \\( 1 - \sqrt{p} \) with \\( p = \Phi((s_w - s_l - m) / \sqrt{2 v}) \) and \\( v = 2 \sigma^2 + 0.05 \).

    With a label of which a share q is flipped it is \\( 1 - \sqrt{(1 - q) p} - \sqrt{q (1 - p)} \).

    Args:
        chosen_scores (`torch.Tensor` of shape `(batch_size,)`): scores of the preferred latents, float32.
        rejected_scores (`torch.Tensor` of shape `(batch_size,)`): scores of the others, float32.
        sigma (`torch.Tensor` of shape `(batch_size,)`): noise levels of the pairs in [0, 1].
        margin (`torch.Tensor` of shape `(batch_size,)`, *optional*): m, by how much the preferred must win; 0 for a tie.
        label_smoothing (`float` or `torch.Tensor` of shape `(batch_size,)`, *optional*, defaults to `0.0`):
            q, the probability that a label is flipped; 0.5 for a tie.

    Returns:
        `tuple`: losses of shape `(batch_size,)` and metrics `accuracy` (a tie counts one half) and `margin`.
    """
    margins = chosen_scores - rejected_scores
    variance = 2 * sigma.square() + 0.05
    z = _less_margin(margins, margin, label_smoothing) / (2 * variance).sqrt()
    # sqrt(Phi(z)) by its logarithm, of which the gradient does not vanish or overflow far from 0
    root_win, root_loss = ((torch.special.log_ndtr(side) / 2).exp() for side in (z, -z))
    smoothing = torch.as_tensor(label_smoothing, dtype=z.dtype, device=z.device)
    losses = 1 - (1 - smoothing).sqrt() * root_win - smoothing.sqrt() * root_loss
    return losses, {"accuracy": _win_rate(margins), "margin": margins.detach()}


def tapo_loss(
    chosen_log_ratios: torch.Tensor,
    rejected_log_ratios: torch.Tensor,
    beta: float,
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
    label_smoothing: float = 0.0,
    ratio_clip: float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    r"""
    Step-wise DPO loss of TAPO, Eq. 13:
    \\( -\log \sigma(\beta \log \frac{p_\theta(x'^w)}{p_{ref}(x'^w)} - \beta \log \frac{p_\theta(x'^l)}{p_{ref}(x'^l)}) \\).

    Args:
        chosen_log_ratios (`torch.Tensor` of shape `(batch_size,)`):
            log-ratio of the policy to the reference for the step of the winning branch, float32.
        rejected_log_ratios (`torch.Tensor` of shape `(batch_size,)`):
            the same for the losing branch.
        beta (`float`): strength of the regularisation towards the reference.
        loss_type (`str`, *optional*, defaults to `"sigmoid"`): `"sigmoid"` (Eq. 13), `"hinge"` or `"ipo"`.
        label_smoothing (`float`, *optional*, defaults to `0.0`): probability that a label is flipped (`"sigmoid"`).
        ratio_clip (`float`, *optional*): keeps each ratio p_theta / p_ref in `[1 - ratio_clip, 1 + ratio_clip]`.

    Returns:
        `tuple`: losses of shape `(batch_size,)` and metrics `rewards/chosen`, `rewards/rejected`,
        `rewards/accuracies` (a tie counts one half), `rewards/margins` and `logits/saturated`, each of shape `(batch_size,)`.
    """
    chosen_rewards, rejected_rewards = beta * chosen_log_ratios, beta * rejected_log_ratios
    if ratio_clip is not None:
        low, high = torch.tensor([1 - ratio_clip, 1 + ratio_clip]).log().tolist()
        chosen_log_ratios = chosen_log_ratios.clamp(low, high)
        rejected_log_ratios = rejected_log_ratios.clamp(low, high)
    log_ratio_margins = chosen_log_ratios - rejected_log_ratios

    if loss_type == "sigmoid":
        losses = _bradley_terry(beta * log_ratio_margins, label_smoothing)
    elif loss_type == "hinge":
        losses = F.relu(1 - beta * log_ratio_margins)
    elif loss_type == "ipo":
        losses = (log_ratio_margins - 1 / (2 * beta)) ** 2
    else:
        raise ValueError(f"`loss_type` must be 'sigmoid', 'hinge' or 'ipo', got {loss_type!r}.")

    return losses, _implicit_rewards(chosen_rewards, rejected_rewards)


def velocity_error_change(velocity: torch.Tensor, ref_velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    r"""
    By how much the policy misses the target velocity more than the reference does, as a mean over all but the batch
    dimension: \\( \lVert v_\theta - v \rVert^2 - \lVert v_{ref} - v \rVert^2 \\).

    With \\( \delta = v_\theta - v_{ref} \\) it is \\( \delta (\delta + 2 (v_{ref} - v)) \\), which is exactly 0 when the
    two agree and does not cancel.

    Args:
        velocity (`torch.Tensor` of shape `(batch_size, *latent_shape)`): v_theta, float32.
        ref_velocity (`torch.Tensor`): v_ref, of the same shape.
        target (`torch.Tensor`): v, of the same shape.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`.
    """
    delta = velocity - ref_velocity
    return (delta * (delta + 2 * (ref_velocity - target))).flatten(1).mean(1)


def flow_matching_loss(velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    r"""
    Flow matching: \\( \lVert v_\theta - (x_1 - x_0) \rVert^2 \\), as a mean over all but the batch dimension.

    Args:
        velocity (`torch.Tensor` of shape `(batch_size, *latent_shape)`): v_theta, float32.
        target (`torch.Tensor`): x_1 - x_0, of the same shape.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`.
    """
    return (velocity - target).square().flatten(1).mean(1)


def diffusion_dpo_loss(
    chosen_error_changes: torch.Tensor,
    rejected_error_changes: torch.Tensor,
    beta: float,
    label_smoothing: float | torch.Tensor = 0.0,
    margin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    r"""
    Diffusion-DPO on velocities:
    \\( -\log \sigma(-\frac{\beta}{2} [(\lVert v_\theta^w - v^w \rVert^2 - \lVert v_{ref}^w - v^w \rVert^2) -
    (\lVert v_\theta^l - v^l \rVert^2 - \lVert v_{ref}^l - v^l \rVert^2)] - m) \\).

    Args:
        chosen_error_changes (`torch.Tensor` of shape `(batch_size,)`):
            [`velocity_error_change`] of the preferred latents, float32.
        rejected_error_changes (`torch.Tensor` of shape `(batch_size,)`):
            the same of the others.
        beta (`float`): strength of the regularisation towards the reference.
        label_smoothing (`float` or `torch.Tensor` of shape `(batch_size,)`, *optional*, defaults to `0.0`):
            probability that a label is flipped; 0.5 for a tie.
        margin (`torch.Tensor` of shape `(batch_size,)`, *optional*): m, by how much the preferred must win; 0 for a tie.

    Returns:
        `tuple`: losses of shape `(batch_size,)` and metrics `rewards/chosen`, `rewards/rejected`,
        `rewards/accuracies` (a tie counts one half), `rewards/margins` and `logits/saturated`, each of shape `(batch_size,)`.
    """
    chosen_rewards, rejected_rewards = -beta / 2 * chosen_error_changes, -beta / 2 * rejected_error_changes
    logits = chosen_rewards - rejected_rewards
    losses = _bradley_terry(_less_margin(logits, margin, label_smoothing), label_smoothing)
    return losses, _implicit_rewards(chosen_rewards, rejected_rewards)


def rare_pair_weights(
    chosen_scores: torch.Tensor, rejected_scores: torch.Tensor, alpha: float = 1.0, bin_width: float = 0.01
) -> torch.Tensor:
    r"""
    Weights of VideoDPO, which are larger for pairs with rare scores:
    \\( w = \left( \frac{\max_s p(s)}{\sqrt{p(s_w) \, p(s_l)}} \right)^{\alpha} \\), where p is the share of all scores that are in
    the same bin of a histogram.

    Args:
        chosen_scores (`torch.Tensor` of shape `(num_pairs,)`): s_w, scores of the preferred sides.
        rejected_scores (`torch.Tensor` of shape `(num_pairs,)`): s_l, scores of the others.
        alpha (`float`, *optional*, defaults to `1.0`): how much rare pairs count; 0 for weights of 1.
        bin_width (`float`, *optional*, defaults to `0.01`): width of a bin of the histogram.

    Returns:
        `torch.Tensor` of shape `(num_pairs,)`: at least 1, float64.
    """
    bins = (torch.stack([chosen_scores, rejected_scores]).double() / bin_width).floor().long()
    _, inverse, counts = bins.unique(return_inverse=True, return_counts=True)
    share = counts.double() / counts.max()
    return share[inverse].prod(0).sqrt() ** -alpha


def group_advantages(
    rewards: torch.Tensor, scale_rewards: Literal["group", "batch", "none"] = "group", eps: float = 1e-4
) -> torch.Tensor:
    r"""
    Advantages of GRPO: how much better each sample of a prompt is than the others,
    \\( A_k = \frac{r_k - \operatorname{mean}(r)}{\operatorname{std} + \mathrm{eps}} \\).

    Args:
        rewards (`torch.Tensor` of shape `(num_prompts, num_generations)`): rewards, at least two per prompt.
        scale_rewards (`str`, *optional*, defaults to `"group"`): whose standard deviation divides: that of the prompt's own
            samples, that of all of `rewards` (`"batch"`), or none (`"none"`).
        eps (`float`, *optional*, defaults to `1e-4`): added to the standard deviation.

    Returns:
        `torch.Tensor` of shape `(num_prompts, num_generations)`. Exactly 0 for a prompt whose samples are all rewarded alike.
    """
    differ = rewards.amax(1, keepdim=True) != rewards.amin(1, keepdim=True)
    deviations = torch.where(differ, rewards - rewards.mean(1, keepdim=True), 0.0)
    if scale_rewards == "group":
        return deviations / (rewards.std(1, keepdim=True) + eps)
    if scale_rewards == "batch":
        return deviations / (rewards.std() + eps)
    if scale_rewards == "none":
        return deviations
    raise ValueError(f"`scale_rewards` must be 'group', 'batch' or 'none', got {scale_rewards!r}.")


def flow_grpo_loss(
    log_ratios: torch.Tensor, advantages: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    r"""
    Clipped policy gradient of Flow-GRPO for steps of the sampling SDE, with the ratio
    \\( \rho = \frac{p_\theta(x' | x)}{p_{old}(x' | x)} \\) to the policy that sampled them:
    \\( -\min \left( \rho A, \operatorname{clip}(\rho, 1 - \epsilon, 1 + \epsilon) A \right) \\).

    Args:
        log_ratios (`torch.Tensor` of shape `(batch_size,)`):
            log-ratio of the policy to the one that sampled, float32, see [`~schedulers.gaussian_log_ratio`].
        advantages (`torch.Tensor` of shape `(batch_size,)`): A, see [`group_advantages`].
        epsilon (`float`): how far the ratio may move to lower the loss.

    Returns:
        `tuple`: losses of shape `(batch_size,)` and metrics `ratio`, `clip_ratio/low_mean` and `clip_ratio/high_mean` (1 where
        the ratio is clipped from below or above, that is where the gradient is 0) and `clip_ratio/region_mean` (either), each
        of shape `(batch_size,)`.
    """
    ratios = log_ratios.exp()
    losses = -torch.minimum(ratios * advantages, ratios.clamp(1 - epsilon, 1 + epsilon) * advantages)
    low = (ratios < 1 - epsilon) & (advantages < 0)
    high = (ratios > 1 + epsilon) & (advantages > 0)
    return losses, _ratio_metrics(ratios, low, high)


def flow_dppo_loss(
    log_ratios: torch.Tensor, advantages: torch.Tensor, divergences: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    r"""
    Policy gradient of Flow-DPPO, which has a mask in place of [`flow_grpo_loss`]'s clipping: \\( - m \, \rho A \\), where m is 0
    for steps whose divergence D from the policy that sampled is above the threshold and whose gradient would raise it further
    (\\( (\rho - 1) A > 0 \\)), and 1 for all others.

    Args:
        log_ratios (`torch.Tensor` of shape `(batch_size,)`): log-ratio of the policy to the one that sampled, float32.
        advantages (`torch.Tensor` of shape `(batch_size,)`): A, see [`group_advantages`].
        divergences (`torch.Tensor` of shape `(batch_size,)`): D, see [`~schedulers.gaussian_kl`]. No gradient flows through it.
        threshold (`float`): divergence above which the policy may not move away further.

    Returns:
        `tuple`: losses of shape `(batch_size,)` and the metrics of [`flow_grpo_loss`], for the mask.
    """
    ratios, is_far = log_ratios.exp(), divergences > threshold
    low, high = (is_far & (ratios < 1) & (advantages < 0)), (is_far & (ratios > 1) & (advantages > 0))
    losses = torch.where(low | high, 0.0, -ratios * advantages)
    return losses, _ratio_metrics(ratios, low, high)


def optimality_rewards(advantages: torch.Tensor, clip: float) -> torch.Tensor:
    r"""
    Probability of DiffusionNFT that a sample is a good one, from its advantage:
    \\( r = \frac{1}{2} + \frac{1}{2} \operatorname{clip}(A / c, -1, 1) \\).

    Args:
        advantages (`torch.Tensor`): A, see [`group_advantages`].
        clip (`float`): c, the advantage from which a sample is good, or bad, for sure.

    Returns:
        `torch.Tensor`: r in [0, 1], shaped as `advantages`.
    """
    return 0.5 + 0.5 * (advantages / clip).clamp(-1, 1)


def diffusion_nft_loss(
    velocity: torch.Tensor,
    old_velocity: torch.Tensor,
    target: torch.Tensor,
    sigma: torch.Tensor,
    optimality: torch.Tensor,
    beta: float,
    loss_weighting: Literal["adaptive", "none"] = "adaptive",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    r"""
    Loss of DiffusionNFT on noised samples of the old policy,
    \\( r \, \ell(v^+) + (1 - r) \, \ell(v^-) \\), with the velocities of the implicit positive policy
    \\( v^+ = v_{old} + \beta (v_\theta - v_{old}) \\) and the implicit negative policy
    \\( v^- = v_{old} - \beta (v_\theta - v_{old}) \\).

    With `loss_weighting="none"`, \\( \ell(u) = \operatorname{mean}(u - v)^2 \\), Eq. 5 of the paper. With `"adaptive"` it is the
    squared error of the predicted clean latent, which is \\( \sigma \\) times that of the velocity, divided by its own mean absolute
    value: \\( \ell(u) = \operatorname{mean}(e^2) / \operatorname{sg}(\operatorname{mean} \lvert e \rvert) \\) with
    \\( e = \sigma (u - v) \\).

    Args:
        velocity (`torch.Tensor` of shape `(batch_size, *latent_shape)`): v_theta, float32.
        old_velocity (`torch.Tensor`): v_old, of the same shape, without gradient.
        target (`torch.Tensor`): v = x_1 - x_0, of the same shape.
        sigma (`torch.Tensor` of shape `(batch_size,)`): noise levels.
        optimality (`torch.Tensor` of shape `(batch_size,)`): r in [0, 1], see [`optimality_rewards`].
        beta (`float`): share of the policy in the implicit policies.
        loss_weighting (`str`, *optional*, defaults to `"adaptive"`): `"adaptive"` or `"none"`.

    Returns:
        `tuple`: losses of shape `(batch_size,)` and metrics `error/positive` and `error/negative` (the two terms, without r) and
        `distance/old` (mean squared difference of v_theta and v_old), each of shape `(batch_size,)`. Where v_theta equals v_old, the
        loss is that of v_old, whatever r is.
    """
    delta, error = velocity - old_velocity, old_velocity - target
    if loss_weighting == "adaptive":
        scale = sigma.view(-1, *[1] * (error.ndim - 1))
        positive, negative = (_self_normalised(scale * (error + sign * beta * delta)) for sign in (1, -1))
    elif loss_weighting == "none":
        positive, negative = ((error + sign * beta * delta).square().flatten(1).mean(1) for sign in (1, -1))
    else:
        raise ValueError(f"`loss_weighting` must be 'adaptive' or 'none', got {loss_weighting!r}.")
    metrics = {
        "error/positive": positive.detach(),
        "error/negative": negative.detach(),
        "distance/old": delta.detach().square().flatten(1).mean(1),
    }
    return optimality * positive + (1 - optimality) * negative, metrics


def _self_normalised(errors: torch.Tensor) -> torch.Tensor:
    """Mean squared error divided by the mean absolute error, which has no gradient."""
    errors = errors.flatten(1)
    return errors.square().mean(1) / errors.detach().abs().mean(1).clamp(min=1e-5)


def _less_margin(
    margins: torch.Tensor, margin: torch.Tensor | None, label_smoothing: float | torch.Tensor
) -> torch.Tensor:
    """By how much the preferred side wins more than it must. In a tie neither has to win."""
    if margin is None:
        return margins
    is_tie = torch.as_tensor(label_smoothing, device=margins.device) == 0.5
    return torch.where(is_tie, margins, margins - margin)


def _bradley_terry(logits: torch.Tensor, label_smoothing: float | torch.Tensor) -> torch.Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def _implicit_rewards(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> dict[str, torch.Tensor]:
    """Metrics of TRL's DPO, per pair."""
    margins = chosen_rewards - rejected_rewards
    return {
        "rewards/chosen": chosen_rewards.detach(),
        "rewards/rejected": rejected_rewards.detach(),
        "rewards/accuracies": _win_rate(margins),
        "rewards/margins": margins.detach(),
        "logits/saturated": (margins.detach().abs() > SATURATED).float(),
    }


def _win_rate(margins: torch.Tensor) -> torch.Tensor:
    """1 where the chosen wins, 0 where it loses, 1/2 for a tie."""
    return (margins.detach().sign() + 1) / 2


def _ratio_metrics(ratios: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "ratio": ratios.detach(),
        "clip_ratio/low_mean": low.float(),
        "clip_ratio/high_mean": high.float(),
        "clip_ratio/region_mean": (low | high).float(),
    }
