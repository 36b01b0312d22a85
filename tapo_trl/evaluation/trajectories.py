# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""TAPO's two trajectories step by step, as pictures: what the reward prefers at each noise level (Figure 12)."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from PIL import Image

from ..media.pictures import images_to_pil, labelled_grid
from ..policies import FlowPolicy
from ..rewards import WeightedReward
from ..rewards.scoring import CandidateReward, Candidates
from ..rollouts import TAPOSampler
from ..schedulers import sde_step_indices


SIDES = ("win", "lose")


@dataclass
class BranchStep:
    """
    Both branches at a stochastic step.

    Args:
        step (`int`): index of the step.
        sigma (`float`): noise level of its candidates.
        rewards (`torch.Tensor` of shape `(2, B)`): of the best candidate of the winning and the worst of the losing branch.
        samples (`torch.Tensor` of shape `(2, B, 3, H, W)` or `(2, B, 3, F, H, W)`):
            their decoded one-step estimates, in [0, 1], on the CPU.
    """

    step: int
    sigma: float
    rewards: torch.Tensor
    samples: torch.Tensor


class _Recorder(WeightedReward):
    """A reward that keeps the one-step estimates of the candidates that TAPO selects, Eq. 12."""

    def __init__(self, reward: CandidateReward, policy: FlowPolicy, num_candidates: int):
        super().__init__([reward])
        self.policy, self.num_candidates = policy, num_candidates
        self.found: list[tuple[float, torch.Tensor, torch.Tensor]] = []

    def __call__(self, candidates: Candidates) -> torch.Tensor:
        scores = super().__call__(candidates)
        of_parents = scores.view(2, -1, self.num_candidates)
        chosen = torch.stack([of_parents[0].argmax(-1), of_parents[1].argmin(-1)])
        rows = torch.arange(chosen.numel(), device=chosen.device) * self.num_candidates + chosen.flatten()
        pixels = torch.cat([self.policy.decode(row[None]) for row in candidates.denoised[rows]])
        samples = pixels.float().cpu().unflatten(0, chosen.shape)
        self.found.append((candidates.sigma.item(), scores[rows].view(chosen.shape).cpu(), samples))
        return scores


@torch.no_grad()
def sample_trajectories(
    policy: FlowPolicy,
    reward: CandidateReward,
    prompts: Sequence[str],
    latent_shape: tuple[int, ...],
    num_inference_steps: int = 20,
    num_sde_steps: int = 8,
    num_candidates: int = 4,
    guidance_scale: float = 1.0,
    max_sequence_length: int | None = None,
    seed: int = 0,
) -> list[BranchStep]:
    """
    Run TAPO's Algorithm 1 on prompts, and keep what both branches look like.

    Args:
        policy ([`FlowPolicy`]): the policy, which is its own reference.
        reward ([`~rewards.scoring.CandidateReward`]): scores candidates.
        prompts (`Sequence[str]`): B prompts. Prompt `i` has the noise of `seed + i`.
        latent_shape (`tuple[int, ...]`): shape of one latent.
        num_inference_steps, num_sde_steps, num_candidates (`int`, *optional*): T, n and P.
        guidance_scale (`float`, *optional*, defaults to `1.0`): guidance scale.
        max_sequence_length (`int`, *optional*): tokens of a prompt.
        seed (`int`, *optional*, defaults to `0`): seed of the first prompt.

    Returns:
        `list[BranchStep]`: one per stochastic step.
    """
    device, steps = policy.transformer.device, sde_step_indices(num_inference_steps, num_sde_steps)
    recorder = _Recorder(reward, policy, num_candidates)
    sampler = TAPOSampler(
        policy=policy,
        scheduler=policy.build_scheduler(num_inference_steps, latent_shape, device),
        step_indices=steps,
        num_candidates=num_candidates,
        reward=recorder,
        latent_shape=latent_shape,
        guidance_scale=guidance_scale,
        reference=nullcontext,
    )
    embeds, negative = (
        policy.encode_prompts(texts, max_sequence_length).to(device) for texts in (list(prompts), [""])
    )
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(prompts))]
    sampler.sample(policy.transformer, list(prompts), embeds, negative, generators)
    return [BranchStep(step, *found) for step, found in zip(steps, recorder.found, strict=True)]


def draw_trajectories(steps: Sequence[BranchStep], prompts: Sequence[str]) -> Image.Image:
    """
    A grid of the steps in their order: a row per prompt and branch, and the reward under each picture. A frame marks the branch with
    the higher reward. Of videos the middle frame is shown.

    Args:
        steps (`Sequence[BranchStep]`): from [`sample_trajectories`].
        prompts (`Sequence[str]`): its prompts.
    """
    cells, captions, labels, marked = [], [], [], []
    for number, prompt in enumerate(prompts):
        for row, side in enumerate(SIDES):
            samples = torch.stack([step.samples[row, number] for step in steps])
            cells.append(images_to_pil(samples if samples.ndim == 4 else samples[:, :, samples.shape[2] // 2]))
            captions.append([f"{step.rewards[row, number].item():.3f}" for step in steps])
            marked.append([bool(step.rewards[row, number] > step.rewards[1 - row, number]) for step in steps])
            labels.append(f"{prompt}: {side}")
    columns = [f"step {step.step}, sigma {step.sigma:.2f}" for step in steps]
    return labelled_grid(cells, labels, columns, captions, marked)
