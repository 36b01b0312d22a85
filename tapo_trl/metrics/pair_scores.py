# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Scores that a reward model gives to both sides of preference pairs, at several noise levels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.preferences import DEFAULT_FPS, PreferencePairCollator, prepare_preference_dataset
from ..data.prompts import PromptCache
from ..policies import FlowPolicy
from ..rewards import StepRewardModel
from ..rewards.targets import TrainingVelocityTarget, training_targets
from ..seeding import seeded_generator


AccuracyRule = TrainingVelocityTarget
ACCURACY_RULES: tuple[str, ...] = get_args(AccuracyRule)


@dataclass
class PairScores:
    """
    Scores of N preference pairs at S noise levels.

    Args:
        sigmas (`tuple[float, ...]`): the S noise levels.
        labels (`torch.Tensor` of shape `(N,)`): 1 where `chosen` is preferred, 0.5 for a tie.
        chosen (`dict[str, torch.Tensor]`): by rule, scores of `chosen`, of shape `(S, N)`, float32, on the CPU.
        rejected (`dict[str, torch.Tensor]`): the same of `rejected`.
    """

    sigmas: tuple[float, ...]
    labels: torch.Tensor
    chosen: dict[AccuracyRule, torch.Tensor]
    rejected: dict[AccuracyRule, torch.Tensor]

    @property
    def margins(self) -> dict[AccuracyRule, torch.Tensor]:
        """By rule, the score of `chosen` minus that of `rejected`, of shape `(S, N)`."""
        return {rule: self.chosen[rule] - self.rejected[rule] for rule in self.chosen}


rule_targets = training_targets


@torch.no_grad()
def score_pairs(
    slrm: StepRewardModel,
    policy: FlowPolicy,
    dataset: Dataset,
    sigmas: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    rules: Sequence[AccuracyRule] | None = None,
    *,
    resolution: int | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    fps: float = DEFAULT_FPS,
    dimension_weights: Mapping[str, float] | None = None,
    skip_bad_files: bool = False,
    short_videos: Literal["refuse", "uniform"] = "refuse",
    batch_size: int = 8,
    seed: int = 0,
    cache_dir: str | None = None,
    show_progress: bool = False,
) -> PairScores:
    """
    Scores that a reward model gives to preference pairs, by noise level and by rule. Both sides of a pair get the
    same noise at every level. It depends on `seed` and the row alone.

    Args:
        slrm ([`StepRewardModel`]): reward model.
        policy ([`FlowPolicy`]): its base model, which encodes pixels and prompts, is the reference, and makes the one-step
            estimates that an SPM reads; on the same device as `slrm`. Prompts that are in the cache need no text encoders.
        dataset ([`~datasets.Dataset`]): columns `prompt`, `chosen`, `rejected`, see [`prepare_preference_dataset`].
        sigmas (`Sequence[float]`, *optional*): noise levels; one that is named twice counts once.
        rules (`Sequence[str]`, *optional*):
            velocity targets of the score: `"ground_truth"` (the ground-truth target of the paper, which reveals the clean
            latent), and `"reference"` and `"none"`, which exist at inference time, too. Do not compare the first with the others as equals. Defaults
            to the first two for an SLRM. Other reward models compare no velocities and have `"none"` alone.
        resolution (`int`, *optional*): height and width in pixels, unless those are given.
        height (`int`, *optional*): height in pixels. Defaults to that of the SLRM's training.
        width (`int`, *optional*): width in pixels. Defaults to that of the SLRM's training.
        num_frames (`int`, *optional*): number of frames of videos. Defaults to that of the SLRM's training.
        fps (`float`, *optional*, defaults to `16`): frames per second of videos.
        dimension_weights (`dict[str, float]`, *optional*): see [`prepare_preference_dataset`].
        skip_bad_files (`bool`, *optional*, defaults to `False`): see [`prepare_preference_dataset`].
        short_videos (`str`, *optional*, defaults to `"refuse"`): see [`prepare_preference_dataset`].
        batch_size (`int`, *optional*, defaults to `8`): pairs per forward.
        seed (`int`, *optional*, defaults to `0`): seed of the noise.
        cache_dir (`str`, *optional*): root of the caches of latents and prompt embeddings.
        show_progress (`bool`, *optional*, defaults to `False`): whether to show a progress bar.

    Returns:
        [`PairScores`]
    """
    slrm.check_compatible(policy)
    if rules is None:
        rules = ("ground_truth", "reference") if slrm.uses_velocity_target else ("none",)
    if not slrm.uses_velocity_target and set(rules) != {"none"}:
        raise ValueError(
            f"`rules={list(rules)}` names velocity targets, but a {slrm.label} compares no velocities: leave it unset."
        )
    config, device = slrm.config, next(slrm.parameters()).device
    dataset = prepare_preference_dataset(
        dataset,
        policy,
        height or resolution or config.height or config.resolution,
        width or resolution or config.width or config.resolution,
        num_frames or config.num_frames,
        fps,
        dimension_weights=dimension_weights,
        skip_bad_files=skip_bad_files,
        short_videos=short_videos,
        cache_dir=cache_dir,
    )
    prompts = PromptCache(policy, cache_dir, config.max_sequence_length)
    prompts.encode(dataset["prompt"])

    sigmas = tuple(dict.fromkeys(float(sigma) for sigma in sigmas))
    was_training = slrm.training
    slrm.eval()
    labels, scores = [], {rule: [] for rule in rules}
    batches = DataLoader(dataset, batch_size, collate_fn=PreferencePairCollator())
    for batch in tqdm(batches, desc="scoring pairs", disable=not show_progress):
        clean = torch.cat([batch["chosen_latents"], batch["rejected_latents"]]).to(device)
        noise = evaluation_noise(batch["row"].tolist(), clean.shape[1:], seed).to(device)
        noise = torch.cat([noise, noise])
        embeds = prompts.load(batch["prompt"]).repeat(2).to(device)
        labels.append(batch["label"])
        of_batch = {rule: [] for rule in rules}
        for level in sigmas:
            sigma = torch.full((len(clean),), level, device=device)
            noisy = (1 - level) * clean + level * noise
            output = slrm(**slrm.forward_inputs(policy, noisy, sigma, batch["prompt"] * 2, embeds))
            targets = training_targets(rules, policy, policy.transformer, noisy, noise - clean, sigma, embeds)
            for rule, target in targets.items():
                of_batch[rule].append(slrm.score_output(output, sigma, target).cpu())
        for rule, levels in of_batch.items():
            scores[rule].append(torch.stack(levels).unflatten(1, (2, -1)))
    slrm.train(was_training)
    chosen, rejected = {}, {}
    for rule, parts in scores.items():
        chosen[rule], rejected[rule] = torch.cat(parts, dim=2).unbind(1)
    return PairScores(sigmas, torch.cat(labels), chosen, rejected)


def evaluation_noise(rows: Sequence[int], shape: Sequence[int], seed: int) -> torch.Tensor:
    """x1 of each row, the same in every evaluation with this `seed`; on the CPU, of shape `(len(rows), *shape)`."""
    return torch.stack(
        [torch.randn(tuple(shape), generator=seeded_generator("evaluation", seed, row)) for row in rows]
    )
