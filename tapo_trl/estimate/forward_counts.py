# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Latents that go through each network for one prompt or pair, which a dry run reports."""

from collections.abc import Sequence

from ..rewards.targets import MIN_SIGMA
from ..rollouts import PAIRINGS
from ..schedulers import sde_step_indices
from ..trainer.diffusion_dpo_config import DiffusionDPOConfig
from ..trainer.flow_grpo_config import FlowGRPOConfig
from ..trainer.online_dpo_config import OnlineDiffusionDPOConfig
from ..trainer.tapo_config import TAPOConfig
from .dry_run import Row


def tapo_forwards(
    args: TAPOConfig,
    sigmas: Sequence[float],
    velocity_target: str | None,
    latents_per_score: int,
    has_function: bool = False,
) -> list[Row]:
    """
    Latents that go through each network for one prompt. Guidance takes two of them for each velocity; that of the reference
    at the candidates has none.

    Args:
        args ([`TAPOConfig`]): The training.
        sigmas (`Sequence[float]`): The grid of noise levels.
        velocity_target (`str`, *optional*): What the SLRM's velocity is compared to.
        latents_per_score (`int`): Latents that the latent reward model looks at for one score, 0 if there is none.
        has_function (`bool`, *optional*, defaults to `False`):
            Whether there is a reward of decoded samples, a function or an SPM.

    Returns:
        `list[Row]`: Networks and numbers of latents.
    """
    steps = sde_step_indices(args.num_inference_steps, args.num_sde_steps, args.t_init)
    compared = [index for index in steps if sigmas[index + 1] >= MIN_SIGMA]  # where the score has a distance
    by_policy = steps if has_function else compared if velocity_target == "policy" else []
    guidance = 2 if args.guidance_scale > 1 else 1
    words = "guidance x " if guidance == 2 else ""
    branches = PAIRINGS[args.pairing].num_branches
    candidates = branches * args.num_candidates
    trajectories = "1 or 2 trajectories" if branches == 2 else "1 trajectory"

    # One trajectory until the first stochastic step. Where the policy has seen the candidates, the next step needs no
    # forward of its own.
    own = [index for index in range(args.num_inference_steps) if index - 1 not in by_policy]
    latents = sum(1 if index <= steps[0] else branches for index in own)
    rows = [Row("policy, rollout", guidance * latents, f"{words}{len(own)} steps, {trajectories}")]
    asked = {"policy": by_policy, "reference": compared if velocity_target == "reference" else []}
    for name, indices in asked.items():
        if indices:
            times, guided = (guidance, words) if name == "policy" else (1, "")
            value = times * candidates * len(indices)
            rows.append(Row(f"{name}, at the candidates", value, f"{guided}{len(indices)} steps x {branches} x P"))
    if latents_per_score:
        enhancement = f"{latents_per_score} x " if latents_per_score > 1 else ""
        scored, scored_words = candidates * args.num_sde_steps, f"n x {branches} x P"
        if args.consistent_pairs:
            scored, scored_words = scored + branches, f"({scored_words} + {branches} samples)"
        rows.append(Row("reward model", latents_per_score * scored, f"{enhancement}{scored_words}"))
    train_guidance, train_words = (guidance, words) if args.train_cfg else (1, "")
    parents = branches * args.num_sde_steps * train_guidance
    rows.append(Row("policy, training (forward and backward)", parents, f"{train_words}n x {branches}"))
    rows.append(Row("reference, training", parents, f"{train_words}n x {branches}"))
    return rows


def sample_forwards(args: OnlineDiffusionDPOConfig | FlowGRPOConfig, latents_per_score: int) -> list[Row]:
    """
    Latents that go through each network for the rollout of one prompt whose final samples are rewarded.

    Args:
        args ([`OnlineDiffusionDPOConfig`] or [`FlowGRPOConfig`]): The training.
        latents_per_score (`int`): Latents that the latent reward model looks at for one score, 0 if there is none.
    """
    guidance, words = (2, "guidance x ") if args.guidance_scale > 1 else (1, "")
    samples = args.num_generations
    rows = [Row("policy, rollout", guidance * samples * args.num_inference_steps, f"{words}K x T steps")]
    if latents_per_score:
        enhancement = f"{latents_per_score} x " if latents_per_score > 1 else ""
        rows.append(Row("reward model", latents_per_score * samples, f"{enhancement}K"))
    return rows


def online_dpo_forwards(args: OnlineDiffusionDPOConfig, latents_per_score: int) -> list[Row]:
    """Latents that go through each network for one prompt, see [`sample_forwards`]."""
    latents, words = 2 * args.num_noise_levels, "noise levels x both sides of a pair"
    return [
        *sample_forwards(args, latents_per_score),
        Row("policy, training (forward and backward)", latents, words),
        Row("reference, training", latents, words),
    ]


def grpo_forwards(args: FlowGRPOConfig, latents_per_score: int) -> list[Row]:
    """Latents that go through each network for one prompt, see [`sample_forwards`]."""
    guidance, words = (2, "guidance x ") if args.guidance_scale > 1 else (1, "")
    latents = guidance * args.num_generations * len(args.step_indices)
    rows = [
        *sample_forwards(args, latents_per_score),
        Row("policy, training (forward and backward)", latents, f"{words}K x n"),
    ]
    return rows if args.beta == 0 else [*rows, Row("reference, training", latents, f"{words}K x n")]


def dpo_forwards(args: DiffusionDPOConfig) -> list[Row]:
    """Latents that go through each network for one pair."""
    rows = [
        Row("policy, training (forward and backward)", 2, "both sides of a pair"),
        Row("reference, training", 2, "both sides of a pair"),
    ]
    if args.variant == "inversion_dpo":
        when = "in the first epoch" if args.cache_inversions else "at most, less for later steps"
        rows.append(Row("reference, inversion", 2 * args.num_inference_steps, f"both sides x T, {when}"))
    return rows
