# Copyright 2026 The tapo_trl authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""How often a reward model prefers what people prefer, by noise level and with ties."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import datasets
import evaluate
import torch
from datasets import Dataset
from diffusers import ModelMixin
from torch.utils.data import DataLoader

from ..data.preferences import (
    DEFAULT_FPS,
    TIE,
    PreferencePairCollator,
    prepare_preference_dataset,
)
from ..data.prompts import PromptCache
from ..policies import FlowPolicy, PromptEmbeddings
from ..rewards import LatentRewardModel
from ..seeding import seeded_generator


AccuracyRule = Literal["ground_truth", "reference", "none"]
ACCURACY_RULES: tuple[str, ...] = get_args(AccuracyRule)

_DESCRIPTION = """
Share of preference pairs that a reward model orders as people did. Ties among the labels are left out of `accuracy`; a
reward model that gives both sides the same score gets one half. `accuracy_with_ties` counts them: a pair is predicted
to be a tie if its margin is at most `tie_threshold`.
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions (`list[float]`): margins, the score of `chosen` minus the score of `rejected`.
    references (`list[float]`): labels, 1 where `chosen` is preferred, 0.5 for a tie, 0 where `rejected` is preferred.
    sigmas (`list[float]`, *optional*): noise level of each pair, for the accuracy by noise level.
    tie_threshold (`float`, *optional*, defaults to 0): largest margin, in absolute value, of a predicted tie.
Returns:
    accuracy (`float`): over the pairs that are no ties, or NaN if all of them are.
    accuracy_with_ties (`float`): over all pairs.
    num_pairs (`int`): number of pairs.
    by_sigma (`dict[float, float]`): `accuracy` per noise level, if `sigmas` is given.
Examples:
    >>> metric = PreferenceAccuracy()
    >>> result = metric.compute(predictions=[0.3, -0.1, 0.0], references=[1, 1, 0.5], sigmas=[0.1, 0.9, 0.9])
    >>> result["accuracy"], result["by_sigma"]
    (0.5, {0.1: 1.0, 0.9: 0.0})
"""


class PreferenceAccuracy(evaluate.Metric):
    """
    Accuracy on preference pairs as an [`evaluate`](https://huggingface.co/docs/evaluate) metric that needs no Hub:
    `PreferenceAccuracy().compute(predictions=margins, references=labels, sigmas=sigmas)`.
    """

    def __init__(self, **kwargs):
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(
        self,
        predictions: Sequence[float],
        references: Sequence[float],
        sigmas: Sequence[float] | None = None,
        tie_threshold: float = 0.0,
    ) -> dict[str, float | int | dict[float, float]]:
        margins = torch.tensor(predictions, dtype=torch.float64)
        labels = torch.tensor(references, dtype=torch.float64)
        predicted = torch.where(margins.abs() <= tie_threshold, TIE, (margins > 0).double())
        result = {
            "accuracy": _accuracy(margins, labels),
            "accuracy_with_ties": (predicted == labels).double().mean().item(),
            "num_pairs": len(margins),
        }
        if sigmas is not None:
            levels = torch.tensor(sigmas, dtype=torch.float64)
            result["by_sigma"] = {
                level: _accuracy(margins[levels == level], labels[levels == level])
                for level in levels.unique().tolist()
            }
        return result


def _accuracy(margins: torch.Tensor, labels: torch.Tensor) -> float:
    return pair_accuracies(margins, labels)[labels != TIE].mean().item()


def pair_accuracies(margins: torch.Tensor, labels: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Per pair: 1 if the margin has the sign that the label asks for, 0 if it has the other, 1/2 if it is 0."""
    signs = torch.as_tensor(labels, device=margins.device, dtype=margins.dtype) * 2 - 1
    return ((margins * signs).sign() + 1) / 2


def rule_targets(
    rules: Sequence[AccuracyRule],
    policy: FlowPolicy,
    reference: ModelMixin,
    noisy: torch.Tensor,
    velocity: torch.Tensor,
    sigma: torch.Tensor,
    prompt_embeds: PromptEmbeddings,
) -> dict[AccuracyRule, torch.Tensor | None]:
    """
    Velocity target of each rule: `"ground_truth"`, the paper's, is x1 - x0, which holds the clean latent and cannot be
    had in a rollout; `"reference"` is the velocity of the frozen base model at x_sigma; `"none"` is no target.
    """
    targets: dict[AccuracyRule, torch.Tensor | None] = {}
    for rule in rules:
        if rule == "ground_truth":
            targets[rule] = velocity
        elif rule == "reference":
            with torch.no_grad():
                targets[rule] = policy.velocity(reference, noisy, sigma, prompt_embeds)
        elif rule == "none":
            targets[rule] = None
        else:
            raise ValueError(f"Unknown rule {rule!r}: choose among {list(ACCURACY_RULES)}.")
    return targets


@torch.no_grad()
def evaluate_preference_accuracy(
    slrm: LatentRewardModel,
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
    batch_size: int = 8,
    seed: int = 0,
    cache_dir: str | None = None,
) -> dict[str, dict[float, float]]:
    """
    Accuracy of a latent reward model on held-out preference pairs, by noise level and by rule. Both sides of a pair get the same
    noise, which depends on `seed` and the row alone.

    Args:
        slrm ([`LatentRewardModel`]): reward model.
        policy ([`FlowPolicy`]): its base model, which encodes pixels and prompts and is the reference; on the same
            device as `slrm`. Prompts that are in the cache need no text encoders.
        dataset ([`~datasets.Dataset`]): columns `prompt`, `chosen`, `rejected`, see [`prepare_preference_dataset`].
        sigmas (`Sequence[float]`, *optional*): noise levels.
        rules (`Sequence[str]`, *optional*):
            velocity targets of the score: `"ground_truth"` (the paper's rule, which leaks the clean latent), and
            `"reference"` and `"none"`, which a rollout can use. Do not compare the first with the others as equals. Defaults
            to the first two for an SLRM. Other reward models compare no velocities and have `"none"` alone.
        resolution (`int`, *optional*): height and width in pixels, unless those are given.
        height (`int`, *optional*): height in pixels. Defaults to that of the SLRM's training.
        width (`int`, *optional*): width in pixels. Defaults to that of the SLRM's training.
        num_frames (`int`, *optional*): number of frames of videos. Defaults to that of the SLRM's training.
        fps (`float`, *optional*, defaults to `16`): frames per second of videos.
        dimension_weights (`dict[str, float]`, *optional*): see [`prepare_preference_dataset`].
        skip_bad_files (`bool`, *optional*, defaults to `False`): see [`prepare_preference_dataset`].
        batch_size (`int`, *optional*, defaults to `8`): pairs per forward.
        seed (`int`, *optional*, defaults to `0`): seed of the noise.
        cache_dir (`str`, *optional*): root of the caches of latents and prompt embeddings.

    Returns:
        `dict[str, dict[float, float]]`: `{rule: {sigma: accuracy}}`.
    """
    slrm.check_compatible(policy)
    if rules is None:
        rules = ("ground_truth", "reference") if slrm.compares_velocities else ("none",)
    if not slrm.compares_velocities and set(rules) != {"none"}:
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
        cache_dir=cache_dir,
    )
    prompts = PromptCache(policy, cache_dir, config.max_sequence_length)
    prompts.encode(dataset["prompt"])

    was_training = slrm.training
    slrm.eval()
    labels, margins = [], {rule: {sigma: [] for sigma in sigmas} for rule in rules}
    for batch in DataLoader(dataset, batch_size, collate_fn=PreferencePairCollator()):
        clean = torch.cat([batch["chosen_latents"], batch["rejected_latents"]]).to(device)
        noise = evaluation_noise(batch["row"].tolist(), clean.shape[1:], seed).to(device)
        noise = torch.cat([noise, noise])
        embeds = prompts.load(batch["prompt"]).repeat(2).to(device)
        labels.append(batch["label"])
        for level in sigmas:
            sigma = torch.full((len(clean),), float(level), device=device)
            noisy = (1 - level) * clean + level * noise
            output = slrm(noisy, sigma, embeds.prompt_embeds, embeds.pooled_prompt_embeds)
            targets = rule_targets(rules, policy, policy.transformer, noisy, noise - clean, sigma, embeds)
            for rule, target in targets.items():
                chosen, rejected = slrm.score_output(output, sigma, target).chunk(2)
                margins[rule][level].append((chosen - rejected).cpu())
    slrm.train(was_training)
    labels = torch.cat(labels)
    return {
        rule: {sigma: _accuracy(torch.cat(parts), labels) for sigma, parts in by_sigma.items()}
        for rule, by_sigma in margins.items()
    }


def evaluation_noise(rows: Sequence[int], shape: Sequence[int], seed: int) -> torch.Tensor:
    """x1 of each row, the same in every evaluation with this `seed`; on the CPU, of shape `(len(rows), *shape)`."""
    return torch.stack(
        [torch.randn(tuple(shape), generator=seeded_generator("evaluation", seed, row)) for row in rows]
    )
