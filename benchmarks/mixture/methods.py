# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The methods that are compared on the mixture, and the values that are searched."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from tapo_trl import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    FlowGRPOConfig,
    FlowGRPOTrainer,
    OnlineDiffusionDPOConfig,
    OnlineDiffusionDPOTrainer,
    TAPOConfig,
    TAPOTrainer,
)
from tapo_trl.rollouts import FlowGRPOSampler, TrajectoryPairs


RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SDE = {"num_sde_steps": 4, "t_init": 0}

REWARDS: dict[str, dict[str, Any]] = {
    "slrm": {},
    "slrm-paper": {"velocity_target": "ground_truth"},
    "slrm-without-enhancement": {"velocity_target": "none", "score_preservation_coef": 0.0},
    "slrm-without-tokens": {"num_task_tokens": 0},
    "slrm-additive": {"enhancement": "additive"},
}
"""Options of reward models."""
SECOND_ROUND = "slrm-second"
"""A reward model of as many labels, half of them of samples of a policy that was aligned with the first."""


@dataclass(frozen=True)
class Method:
    """
    A way to align the policy.

    Args:
        trainer (`type`): its trainer.
        config (`type`): the configuration of that.
        options (`dict`): what makes it this method.
        values (`tuple[float, ...]`): the values of `searched` that are tried.
        rates (`tuple[float, ...]`): the learning rates that are tried with each.
        learns_from (`str`):
            `"slrm"`: the reward model, which scores noisy latents at their own noise level where a method asks about steps.
            `"estimates"`: the same model, which then scores their one-step estimates at noise level 0. `"truth"`: the true reward,
            of one-step estimates. Of final samples, the first two are the same.
        reward (`str`): the reward model, one of [`REWARDS`] or [`SECOND_ROUND`].
        searched (`str`): the option that is searched beside the learning rate.
    """

    trainer: type
    config: type
    options: dict[str, Any] = field(default_factory=dict)
    values: tuple[float, ...] = ()
    rates: tuple[float, ...] = RATES[2:5]
    learns_from: Literal["slrm", "estimates", "truth"] = "slrm"
    reward: str = "slrm"
    searched: str = "beta"

    @property
    def is_online(self) -> bool:
        return self.trainer is not DiffusionDPOTrainer


@dataclass(kw_only=True)
class EndPairsSampler(FlowGRPOSampler):
    """Pairs of all steps of the best and the worst of a group of trajectories, by the rewards of their ends."""

    def run(self, inputs) -> TrajectoryPairs:
        groups = super().run(inputs)
        num_steps, num_prompts = len(groups.step_indices), len(inputs.prompts)
        sides = torch.stack([groups.rewards.argmax(1), groups.rewards.argmin(1)])
        rows = sides * num_prompts + torch.arange(
            num_prompts, device=sides.device
        )  # row k B + b is trajectory k of prompt b
        pair_rewards = groups.rewards.gather(1, sides.T).T
        return TrajectoryPairs(
            prompt_embeds=inputs.prompt_embeds,
            weights=(pair_rewards[0] != pair_rewards[1]).float().expand(num_steps, -1),
            rewards=groups.rewards.view(1, 1, num_prompts, -1),
            reward_parts={name: part.view(1, 1, num_prompts, -1) for name, part in groups.reward_parts.items()},
            step_indices=groups.step_indices,
            latents=groups.latents[:, rows],
            next_latents=groups.next_latents[:, rows],
            pair_rewards=pair_rewards.expand(num_steps, -1, -1),
            final_latents=groups.final_latents,
        )


class EndPairsTrainer(TAPOTrainer):
    """The loss of TAPO on pairs that are chosen by their ends, as those of online DPO are."""

    def build_sampler(self, **kwargs) -> EndPairsSampler:
        sampler = super().build_sampler(**kwargs)
        return EndPairsSampler(
            scheduler=sampler.scheduler, step_indices=sampler.step_indices, num_generations=8, **kwargs
        )


STEPWISE = (10.0, 40.0, 160.0)  # the paper's 1000 is 44 here, by the square root of the dimensions
PAIRS = (2.0, 10.0, 50.0)


def _tapo(trainer: type = TAPOTrainer, **options) -> Method:
    return Method(
        trainer,
        TAPOConfig,
        SDE | {"num_candidates": 4, "pairing": "tapo", "step_weighting": "velocity"} | options,
        STEPWISE,
    )


def _spo(**options) -> Method:
    return _tapo(pairing="spo", pair_threshold=[0.0], **options)


def _of_truth(method: Method) -> Method:
    return replace(method, learns_from="truth")


def _of_estimates(method: Method) -> Method:
    return replace(method, learns_from="estimates")


_FINAL = {"num_generations": 8, "num_noise_levels": 4}
_ONLINE_DPO = Method(OnlineDiffusionDPOTrainer, OnlineDiffusionDPOConfig, _FINAL, PAIRS)
_DIFFUSION_DPO = Method(DiffusionDPOTrainer, DiffusionDPOConfig, {}, PAIRS)
_GRPO_OPTIONS = {"num_sde_steps": 4, "num_generations": 8}
_GRPO = Method(FlowGRPOTrainer, FlowGRPOConfig, _GRPO_OPTIONS | {"epsilon": 0.05}, (0.0, 0.01, 0.1))
_GRPO_REUSED = Method(  # epsilon does nothing with one update per rollout
    FlowGRPOTrainer,
    FlowGRPOConfig,
    _GRPO_OPTIONS | {"beta": 0.0, "num_iterations": 4},
    (0.003, 0.02, 0.1),
    RATES[3:6],
    searched="epsilon",
)
_NFT = Method(DiffusionNFTTrainer, DiffusionNFTConfig, _FINAL, (0.3, 1.0, 3.0))

METHODS = {
    "TAPO": _tapo(),
    "TAPO, loss as in the paper": _tapo(step_weighting="none"),
    "TAPO, centered log-ratios": _tapo(center_log_ratios=True),
    "SPO's pairs": _spo(),
    "TAPO's branches, pairs within each": _tapo(pairing="tapo_within"),
    "TAPO, n = 2, P = 8": _tapo(num_sde_steps=2, num_candidates=8),
    "online DPO": _ONLINE_DPO,
    "TAPO, one-step estimates": _of_estimates(_tapo()),
    "SPO's pairs, one-step estimates": _of_estimates(_spo()),
    "SPO's pairs, n = 2, one-step estimates": _of_estimates(_spo(num_sde_steps=2)),
    "TAPO, n = 2, P = 8, one-step estimates": _of_estimates(_tapo(num_sde_steps=2, num_candidates=8)),
    "TAPO, n = 2, P = 4, one-step estimates": _of_estimates(_tapo(num_sde_steps=2)),
    "TAPO, n = 4, P = 8, one-step estimates": _of_estimates(_tapo(num_candidates=8)),
    "TAPO, n = 8, P = 4, one-step estimates": _of_estimates(_tapo(num_sde_steps=8)),
    "TAPO, SLRM as in the paper": replace(_tapo(velocity_target="parent"), reward="slrm-paper"),
    "TAPO, SLRM without score enhancement": replace(_tapo(), reward="slrm-without-enhancement"),
    "TAPO, SLRM without task tokens": replace(_tapo(), reward="slrm-without-tokens"),
    "TAPO, SLRM with additive enhancement": replace(_tapo(), reward="slrm-additive"),
    "TAPO, second round of labels": replace(_tapo(), reward=SECOND_ROUND),
    "TAPO, KL term searched": replace(_tapo(beta=40.0), values=(1.0, 4.0, 16.0), rates=RATES[3:6], searched="kl_coef"),
    "TAPO, true reward": _of_truth(_tapo()),
    "TAPO, centered log-ratios, true reward": _of_truth(_tapo(center_log_ratios=True)),
    "TAPO's branches, pairs within each, true reward": _of_truth(_tapo(pairing="tapo_within")),
    "TAPO, loss as in the paper, true reward": _of_truth(_tapo(step_weighting="none")),
    "TAPO, n = 2, P = 8, true reward": _of_truth(_tapo(num_sde_steps=2, num_candidates=8)),
    "TAPO, steps 2, 4, 7, 9, true reward": _of_truth(_tapo(t_init=2)),
    "TAPO, consistent pairs, true reward": _of_truth(_tapo(consistent_pairs=True)),
    "TAPO's loss, online DPO's pairs, true reward": _of_truth(_tapo(EndPairsTrainer)),
    "SPO's pairs, true reward": _of_truth(_spo()),
    "online DPO, true reward": _of_truth(_ONLINE_DPO),
    "Diffusion-DPO, true reward": _of_truth(_DIFFUSION_DPO),
    "Flow-GRPO, true reward": _of_truth(_GRPO),
    "Flow-GRPO, 4 updates per rollout, true reward": _of_truth(_GRPO_REUSED),
    "DiffusionNFT, true reward": _of_truth(_NFT),
    "Diffusion-DPO": _DIFFUSION_DPO,
    "Flow-GRPO": _GRPO,
    "Flow-GRPO, 4 updates per rollout": _GRPO_REUSED,
    "DiffusionNFT": _NFT,
}
