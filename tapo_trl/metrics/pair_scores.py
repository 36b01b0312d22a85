# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Scores that a reward model gives to both sides of preference pairs, at several noise levels."""

from collections.abc import Callable, Mapping, Sequence
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
from ..rewards.scoring import RewardFunction, call_reward_function
from ..rewards.targets import TrainingVelocityTarget, training_targets
from ..seeding import seeded_generator


AccuracyRule = TrainingVelocityTarget
ACCURACY_RULES: tuple[str, ...] = get_args(AccuracyRule)
PixelReading = Literal["estimate", "noisy"]


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

    def score(noisy, sigma, clean, noise, texts, embeds):
        output = slrm(**slrm.forward_inputs(policy, noisy, sigma, texts, embeds))
        targets = training_targets(rules, policy, policy.transformer, noisy, noise - clean, sigma, embeds)
        return {rule: slrm.score_output(output, sigma, target) for rule, target in targets.items()}

    was_training = slrm.training
    slrm.eval()
    result = _score_by_level(score, dataset, prompts, sigmas, device, batch_size, seed, show_progress)
    slrm.train(was_training)
    return result


@torch.no_grad()
def score_pairs_of_pixels(
    reward: RewardFunction,
    policy: FlowPolicy,
    dataset: Dataset,
    sigmas: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    readings: Sequence[PixelReading] = get_args(PixelReading),
    *,
    max_sequence_length: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    cache_dir: str | None = None,
    show_progress: bool = False,
    **sizes,
) -> PairScores:
    """
    Scores that a reward of images or videos gives to preference pairs whose latents are noisy, for comparison with reward models
    that read latents (Table 2 of the TAPO paper, which does not say what its pixel rewards read: both readings are given).

    Args:
        reward (`Callable`): see [`RewardFunction`].
        policy ([`FlowPolicy`]): encodes, predicts the velocity of one-step estimates, and decodes.
        dataset ([`~datasets.Dataset`]): columns `prompt`, `chosen`, `rejected`, see [`prepare_preference_dataset`].
        sigmas (`Sequence[float]`, *optional*): noise levels; one that is named twice counts once.
        readings (`Sequence[str]`, *optional*): what is decoded: `"estimate"`, the one-step estimate of the clean latent, and
            `"noisy"`, the noisy latent itself.
        max_sequence_length (`int`, *optional*): number of tokens of a prompt. Defaults to the model family's.
        sizes: `height`, `width`, `num_frames`, `fps` and the other arguments of [`prepare_preference_dataset`]. The policy's
            size by default.

    The others are those of [`score_pairs`].

    Returns:
        [`PairScores`]: by reading, in place of the rule.
    """
    size = policy.defaults
    defaults = {"height": size.height, "width": size.width, "num_frames": size.num_frames, "fps": DEFAULT_FPS}
    sizes = defaults | {name: value for name, value in sizes.items() if value is not None}
    dataset = prepare_preference_dataset(dataset, policy, cache_dir=cache_dir, **sizes)
    prompts = PromptCache(policy, cache_dir, max_sequence_length or policy.max_sequence_length)

    def score(noisy, sigma, clean, noise, texts, embeds):
        latents = {"noisy": noisy, "estimate": noisy}
        if "estimate" in readings and sigma[0] > 0:
            velocity = policy.velocity(policy.transformer, noisy, sigma, embeds)
            latents["estimate"] = noisy - sigma.view(-1, *[1] * (noisy.ndim - 1)) * velocity
        return {
            name: call_reward_function(reward, policy.decode(latents[name]), texts, noun="side") for name in readings
        }

    device = policy.transformer.device
    return _score_by_level(score, dataset, prompts, sigmas, device, batch_size, seed, show_progress)


def _score_by_level(
    score: Callable[..., dict[str, torch.Tensor]],
    dataset: Dataset,
    prompts: PromptCache,
    sigmas: Sequence[float],
    device: torch.device,
    batch_size: int,
    seed: int,
    show_progress: bool,
) -> PairScores:
    """Call `score(noisy, sigma, clean, noise, texts, embeds)` with both sides of the pairs at every noise level."""
    prompts.encode(dataset["prompt"])
    sigmas = tuple(dict.fromkeys(float(sigma) for sigma in sigmas))
    labels, scores = [], {}
    batches = DataLoader(dataset, batch_size, collate_fn=PreferencePairCollator())
    for batch in tqdm(batches, desc="scoring pairs", disable=not show_progress):
        clean = torch.cat([batch["chosen_latents"], batch["rejected_latents"]]).to(device)
        noise = evaluation_noise(batch["row"].tolist(), clean.shape[1:], seed).to(device)
        noise = torch.cat([noise, noise])
        embeds = prompts.load(batch["prompt"]).repeat(2).to(device)
        labels.append(batch["label"])
        of_batch: dict[str, list[torch.Tensor]] = {}
        for level in sigmas:
            noisy, sigma = (1 - level) * clean + level * noise, torch.full((len(clean),), level, device=device)
            for name, values in score(noisy, sigma, clean, noise, batch["prompt"] * 2, embeds).items():
                of_batch.setdefault(name, []).append(values.cpu())
        for name, levels in of_batch.items():
            scores.setdefault(name, []).append(torch.stack(levels).unflatten(1, (2, -1)))
    chosen, rejected = {}, {}
    for name, parts in scores.items():
        chosen[name], rejected[name] = torch.cat(parts, dim=2).unbind(1)
    return PairScores(sigmas, torch.cat(labels), chosen, rejected)


def evaluation_noise(rows: Sequence[int], shape: Sequence[int], seed: int) -> torch.Tensor:
    """x1 of each row, the same in every evaluation with this `seed`; on the CPU, of shape `(len(rows), *shape)`."""
    return torch.stack(
        [torch.randn(tuple(shape), generator=seeded_generator("evaluation", seed, row)) for row in rows]
    )
