# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Flow-matching sampling as a stochastic differential equation with a Gaussian transition density.

The grid of sigmas is data. Three pure functions do the maths of one step `sigma -> sigma_next`: its mean and standard
deviation ([`flow_sde_mean`], [`cps_mean`]), candidates drawn from it ([`draw_candidates`]) and how much likelier one
policy makes a sample than another ([`gaussian_log_ratio`]). The scheduler only wires them to diffusers.
"""

from typing import Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config

from ..seeding import seeded_generator


def sde_step_indices(num_inference_steps: int, num_sde_steps: int, t_init: int = 1) -> list[int]:
    r"""
    Steps that are stochastic, W_T of Eq. 10: \\( \tau_i = t_{init} + \lfloor (i - 1) T / n \rfloor \\).

    Args:
        num_inference_steps (`int`):
            Number of sampling steps T.
        num_sde_steps (`int`):
            Number of stochastic steps n.
        t_init (`int`, *optional*, defaults to `1`):
            Index of the first stochastic step, counted from the noise. The default leaves out the first step, whose
            noise law is singular, and, if `n < T / 2`, the last one.

    Returns:
        `list[int]`: n increasing step indices in `[0, num_inference_steps - 1]`.

    Raises:
        ValueError: if the steps do not fit into the trajectory.
    """
    if not 1 <= num_sde_steps <= num_inference_steps:
        raise ValueError(
            f"`num_sde_steps` must be between 1 and `num_inference_steps` ({num_inference_steps}), got {num_sde_steps}."
        )
    indices = [t_init + i * num_inference_steps // num_sde_steps for i in range(num_sde_steps)]
    if indices[0] < 0 or indices[-1] > num_inference_steps - 1:
        raise ValueError(
            f"`t_init={t_init}` puts the stochastic steps at {indices}, outside of the {num_inference_steps} sampling "
            f"steps 0..{num_inference_steps - 1}. Lower `t_init` or `num_sde_steps`."
        )
    return indices


def window_step_indices(
    step_indices: list[int],
    size: int,
    iteration: int,
    interval: int = 25,
    stride: int = 1,
    strategy: Literal["progressive", "cyclic", "random"] = "progressive",
    seed: int = 0,
) -> list[int]:
    r"""
    Steps that are stochastic in one iteration of MixGRPO: a window of `size` steps that slides from the noise to the data. Its
    first step is number \\( \min(\mathrm{stride} \lfloor i / \mathrm{interval} \rfloor, N - \mathrm{size}) \\) of the N steps.

    Args:
        step_indices (`list[int]`): the N steps, increasing.
        size (`int`): number of steps in the window, at most N.
        iteration (`int`): i, the number of rollouts so far.
        interval (`int`, *optional*, defaults to `25`): iterations between two moves of the window.
        stride (`int`, *optional*, defaults to `1`): steps that it moves by.
        strategy (`str`, *optional*, defaults to `"progressive"`):
            What comes after the last window: it stays (`"progressive"`), or the first one (`"cyclic"`). `"random"` draws a window
            in every iteration.
        seed (`int`, *optional*, defaults to `0`): of `"random"`, which depends on it and on the iteration alone.

    Returns:
        `list[int]`: `size` of `step_indices` in a row.
    """
    last = len(step_indices) - size
    if strategy == "random":
        first = torch.randint(last + 1, (), generator=seeded_generator("window", seed, iteration)).item()
    elif strategy == "cyclic":
        starts = range(0, last + 1, stride)
        first = starts[iteration // interval % len(starts)]
    elif strategy == "progressive":
        first = min(iteration // interval * stride, last)
    else:
        raise ValueError(f"`strategy` must be 'progressive', 'cyclic' or 'random', got {strategy!r}.")
    return step_indices[first : first + size]


def flow_sde_mean(
    sample: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, dt: torch.Tensor, diffusion: torch.Tensor
) -> torch.Tensor:
    r"""
    Mean of an Euler-Maruyama step of the flow SDE, Eq. 11 (and 20-22):
    \\( x + [v + \frac{s^2}{2 \sigma} (x + (1 - \sigma) v)] \, dt \\).

    Args:
        sample (`torch.Tensor`): x at `sigma`.
        velocity (`torch.Tensor`): v at `sample`.
        sigma (`torch.Tensor`): noise level of `sample`, broadcastable to it.
        dt (`torch.Tensor`): `sigma_next - sigma`, negative.
        diffusion (`torch.Tensor`): s, the diffusion coefficient. With `s = 0` this is the Euler step of the ODE.

    Returns:
        `torch.Tensor`: mean of the step, shaped as `sample`.
    """
    drift = velocity + diffusion**2 / (2 * sigma) * (sample + (1 - sigma) * velocity)
    return sample + drift * dt


def cps_mean(
    sample: torch.Tensor,
    velocity: torch.Tensor,
    sigma: torch.Tensor,
    sigma_next: torch.Tensor,
    std: torch.Tensor,
) -> torch.Tensor:
    r"""
    Mean of a coefficients-preserving step: the estimates of the clean latent and of the noise are mixed at `sigma_next`
    and `std` of the noise is replaced by fresh noise:
    \\( (1 - \sigma') (x - \sigma v) + \sqrt{\sigma'^2 - std^2} \, (x + (1 - \sigma) v) \\).

    Arguments are those of [`flow_sde_mean`], with the standard deviation of the fresh noise `std <= sigma_next`.
    """
    clean, noise = sample - sigma * velocity, sample + (1 - sigma) * velocity
    return (1 - sigma_next) * clean + (sigma_next**2 - std**2).sqrt() * noise


def draw_candidates(mean: torch.Tensor, std: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """
    Candidates of a stochastic step, all from one prediction.

    Args:
        mean (`torch.Tensor` of shape `(batch_size, *latent_shape)`): mean of the step.
        std (`torch.Tensor`): standard deviation of the step, broadcastable to `mean`.
        noise (`torch.Tensor` of shape `(batch_size, num_candidates, *latent_shape)`): standard normal.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_candidates, *latent_shape)`.
    """
    return mean.unsqueeze(1) + std * noise


def _reduce(values: torch.Tensor, reduction: str) -> torch.Tensor:
    values = values.flatten(1)
    return values.mean(1) if reduction == "mean" else values.sum(1)


def gaussian_log_prob(
    sample: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, reduction: Literal["mean", "sum"] = "mean"
) -> torch.Tensor:
    """
    Log-density of `sample` under `N(mean, std^2)`, reduced over all but the batch dimension.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, in nats (per dimension with `reduction="mean"`).
    """
    log_prob = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(sample)
    return _reduce(log_prob, reduction)


def gaussian_log_ratio(
    sample: torch.Tensor,
    mean: torch.Tensor,
    ref_mean: torch.Tensor,
    std: torch.Tensor,
    reduction: Literal["mean", "sum"] = "mean",
) -> torch.Tensor:
    r"""
    \\( \log N(x'; \mu_\theta, std^2) - \log N(x'; \mu_{ref}, std^2) \\), the log-ratio of Eq. 13.

    With \\( \delta = (\mu_\theta - \mu_{ref}) / std \\) and \\( \epsilon = (x' - \mu_{ref}) / std \\) it is
    \\( \epsilon \delta - \delta^2 / 2 \\), which is exactly 0 when the two policies agree and does not cancel.

    Args:
        sample (`torch.Tensor` of shape `(batch_size, *latent_shape)`): x', the latent after the step.
        mean (`torch.Tensor`): mean of the step under the trained policy.
        ref_mean (`torch.Tensor`): mean of the step under the reference policy.
        std (`torch.Tensor`): standard deviation of the step, the same for both, broadcastable to `mean`.
        reduction (`str`, *optional*, defaults to `"mean"`): over the non-batch dimensions.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`.
    """
    delta = (mean - ref_mean) / std
    noise = (sample - ref_mean) / std
    return _reduce(noise * delta - delta**2 / 2, reduction)


def normalised_log_ratio(log_ratio: torch.Tensor, divergence: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    r"""
    Log-ratio of GRPO-Guard: \\( std \, (\log \rho + D) \\), with the divergence D of the policy from the one that sampled.

    With the mean over dimensions it is \\( \operatorname{mean}(\epsilon (\mu_\theta - \mu_{old})) \\), where
    \\( \epsilon \\) is the noise of the step: its mean over the noise is 0, where that of \\( \log \rho \\) is -D, and its spread
    does not depend on the standard deviation of the step.

    Args:
        log_ratio (`torch.Tensor` of shape `(batch_size,)`): log rho, see [`gaussian_log_ratio`].
        divergence (`torch.Tensor` of shape `(batch_size,)`): D, see [`gaussian_kl`], with the same reduction.
        std (`torch.Tensor`): standard deviation of the steps, one number per example.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`.
    """
    return std.flatten() * (log_ratio + divergence)


def gaussian_kl(
    mean: torch.Tensor, ref_mean: torch.Tensor, std: torch.Tensor, reduction: Literal["mean", "sum"] = "mean"
) -> torch.Tensor:
    """KL divergence between two Gaussian steps of the same `std`, of shape `(batch_size,)`."""
    return _reduce(((mean - ref_mean) / std) ** 2 / 2, reduction)


class FlowMatchSDEScheduler(FlowMatchEulerDiscreteScheduler):
    r"""
    Flow-matching Euler scheduler of diffusers with stateless steps, deterministic and stochastic.

    The grid (`set_timesteps`) and `step` are those of [`~diffusers.FlowMatchEulerDiscreteScheduler`], so a pipeline
    samples with it as before. `ode_step` and `sde_mean_std` take the step by its index, an `int` or a `torch.LongTensor`
    with one index per sample, and keep no state: branches of a trajectory can be grown in any order.

    Args:
        noise_level (`float`, *optional*, defaults to `0.7`):
            a, the strength of the noise. 0 makes every step deterministic.
        sde_type (`str`, *optional*, defaults to `"flow"`):
            Noise law of a stochastic step. `"flow"`: diffusion \\( s = a \sqrt{\sigma / (1 - \sigma)} \\), as in
            Flow-GRPO, which the paper follows. `"constant"`: \\( s = a \\), as in DanceGRPO. `"cps"`: fresh noise of
            standard deviation \\( \sigma' \sin(a \pi / 2) \\), as in Flow-CPS. The first two keep the marginals of the
            flow as the step size goes to 0; `"cps"` keeps the signal and noise coefficients, but not the marginals of
            data with a spread.
        logprob_reduction (`str`, *optional*, defaults to `"mean"`):
            Reduction of log-densities over the latent's dimensions, `"mean"` or `"sum"`.

    The other arguments are those of [`~diffusers.FlowMatchEulerDiscreteScheduler`].
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
        noise_level: float = 0.7,
        sde_type: Literal["flow", "constant", "cps"] = "flow",
        logprob_reduction: Literal["mean", "sum"] = "mean",
    ):
        if sde_type not in ("flow", "constant", "cps"):
            raise ValueError(f"`sde_type` must be 'flow', 'constant' or 'cps', got {sde_type!r}.")
        if logprob_reduction not in ("mean", "sum"):
            raise ValueError(f"`logprob_reduction` must be 'mean' or 'sum', got {logprob_reduction!r}.")
        if noise_level < 0 or (sde_type == "cps" and noise_level > 1):
            raise ValueError(f"`noise_level` must be at least 0, and at most 1 for 'cps', got {noise_level}.")
        if invert_sigmas:
            raise ValueError("`invert_sigmas` is not supported: sigmas must decrease from 1 (noise) to 0 (data).")
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
            stochastic_sampling=stochastic_sampling,
        )

    def _at(self, index: int | torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """Sigmas at `index`, shaped to broadcast with `sample`: `()` or `(batch_size, 1, ..., 1)`."""
        sigmas = self.sigmas.to(sample.device)[index]
        return sigmas if sigmas.ndim == 0 else sigmas.view(-1, *[1] * (sample.ndim - 1))

    def sigma(self, index: int | torch.Tensor) -> torch.Tensor:
        """Noise level before step `index` (and after step `index - 1`), float32."""
        return self.sigmas[index]

    def ode_step(self, sample: torch.Tensor, velocity: torch.Tensor, index: int | torch.Tensor) -> torch.Tensor:
        """
        Deterministic Euler step `index` of the flow, the second case of Eq. 11.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, *latent_shape)`): latents before the step, float32.
            velocity (`torch.Tensor`): velocity predicted at `sample`.
            index (`int` or `torch.LongTensor` of shape `(batch_size,)`): step, in `[0, num_inference_steps - 1]`.

        Returns:
            `torch.Tensor`: latents after the step.
        """
        dt = self._at(index + 1, sample) - self._at(index, sample)
        return sample + dt * velocity

    def sde_mean_std(
        self, sample: torch.Tensor, velocity: torch.Tensor, index: int | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Mean and standard deviation of stochastic step `index`, the first case of Eq. 11.

        Arguments are those of [`~FlowMatchSDEScheduler.ode_step`]. The maths is in float32, whatever the inputs.

        Returns:
            `tuple` of two `torch.Tensor`: the mean, shaped as `sample`, and the standard deviation, broadcastable to it.
        """
        sample, velocity = sample.float(), velocity.float()
        sigma, sigma_next = self._at(index, sample), self._at(index + 1, sample)
        noise_level = self.config.noise_level

        if self.config.sde_type == "cps":
            std = sigma_next * torch.sin(torch.tensor(noise_level * torch.pi / 2, device=sample.device))
            return cps_mean(sample, velocity, sigma, sigma_next, std), std

        if self.config.sde_type == "flow":
            # sigma = 1 at step 0 only, where the law is singular: the next sigma stands in, found by index.
            index = torch.as_tensor(index, device=self.sigmas.device)
            bounded_sigma = self._at(index.clamp(min=1), sample)
            diffusion = noise_level * (sigma / (1 - bounded_sigma)).sqrt()
        else:
            diffusion = noise_level * torch.ones_like(sigma)
        dt = sigma_next - sigma
        return flow_sde_mean(sample, velocity, sigma, dt, diffusion), diffusion * (-dt).sqrt()

    def log_prob(self, next_sample: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        """[`gaussian_log_prob`] with the scheduler's `logprob_reduction`."""
        return gaussian_log_prob(next_sample, mean, std, self.config.logprob_reduction)

    def log_ratio(
        self, next_sample: torch.Tensor, mean: torch.Tensor, ref_mean: torch.Tensor, std: torch.Tensor
    ) -> torch.Tensor:
        """[`gaussian_log_ratio`] with the scheduler's `logprob_reduction`."""
        return gaussian_log_ratio(next_sample, mean, ref_mean, std, self.config.logprob_reduction)
