# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""How often a reward model prefers what people prefer, by noise level and with ties."""

from collections.abc import Sequence
from typing import Literal

import datasets
import evaluate
import torch
from datasets import Dataset

from ..data.preferences import TIE
from ..policies import FlowPolicy
from ..rewards import StepRewardModel
from .pair_scores import AccuracyRule, PairScores, score_pairs


ZeroMargin = Literal["half", "wrong"]
TIMESTEP_RANGES = {"clean": (0, 0), "1-500": (1, 500), "501-1000": (501, 1000)}

_DESCRIPTION = """
Share of preference pairs that a reward model orders as people did. Ties among the labels are left out of `accuracy`; a
reward model that gives both sides the same score gets one half, or nothing with `zero_margin="wrong"`.
`accuracy_with_ties` counts them: a pair is predicted to be a tie if its margin is at most `tie_threshold`.
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions (`list[float]`): margins, the score of `chosen` minus the score of `rejected`.
    references (`list[float]`): labels, 1 where `chosen` is preferred, 0.5 for a tie, 0 where `rejected` is preferred.
    sigmas (`list[float]`, *optional*): noise level of each pair, for the accuracy by noise level and by range of them.
    tie_threshold (`float` or `"videoalign"`, *optional*, defaults to 0):
        largest margin, in absolute value, of a predicted tie. `"videoalign"` counts as the code of VideoAlign does, whose
        numbers papers on videos report: see [`videoalign_accuracy_with_ties`].
    zero_margin (`str`, *optional*, defaults to `"half"`):
        what a margin of 0 is worth in `accuracy`: `"half"`, or nothing (`"wrong"`), as in the code of VideoAlign. It matters
        for scores that take few values.
Returns:
    accuracy (`float`): over the pairs that are no ties, or NaN if all of them are.
    accuracy_with_ties (`float`): over all pairs.
    num_pairs (`int`): number of pairs.
    by_sigma (`dict[float, float]`): `accuracy` per noise level, if `sigmas` is given.
    by_range (`dict[str, dict]`): `accuracy`, `accuracy_with_ties` and `num_pairs` of the timesteps t = 1000 sigma, rounded,
        of "clean" (t = 0), "1-500" and "501-1000", those that there are, if `sigmas` is given.
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
        tie_threshold: float | Literal["videoalign"] = 0.0,
        zero_margin: ZeroMargin = "half",
    ) -> dict[str, float | int | dict]:
        if zero_margin not in ("half", "wrong"):
            raise ValueError(f"`zero_margin` must be half or wrong, but it is {zero_margin!r}.")
        if isinstance(tie_threshold, str) and tie_threshold != "videoalign":
            raise ValueError(f"`tie_threshold` must be a number or videoalign, but it is {tie_threshold!r}.")
        margins = torch.tensor(predictions, dtype=torch.float64)
        labels = torch.tensor(references, dtype=torch.float64)
        result = _accuracies(margins, labels, tie_threshold, zero_margin)
        if sigmas is not None:
            levels = torch.tensor(sigmas, dtype=torch.float64)
            timesteps = (1000 * levels).round()
            in_range = {
                name: (low <= timesteps) & (timesteps <= high) for name, (low, high) in TIMESTEP_RANGES.items()
            }
            result["by_sigma"] = {
                level: _accuracy(margins[levels == level], labels[levels == level], zero_margin)
                for level in levels.unique().tolist()
            }
            result["by_range"] = {
                name: _accuracies(margins[rows], labels[rows], tie_threshold, zero_margin)
                for name, rows in in_range.items()
                if rows.any()
            }
        return result


def _accuracies(
    margins: torch.Tensor, labels: torch.Tensor, tie_threshold: float | Literal["videoalign"], zero_margin: ZeroMargin
) -> dict[str, float | int]:
    if tie_threshold == "videoalign":
        with_ties = videoalign_accuracy_with_ties(margins, labels)
    else:
        predicted = torch.where(margins.abs() <= tie_threshold, TIE, (margins > 0).double())
        with_ties = (predicted == labels).double().mean().item()
    return {
        "accuracy": _accuracy(margins, labels, zero_margin),
        "accuracy_with_ties": with_ties,
        "num_pairs": len(margins),
    }


def _accuracy(margins: torch.Tensor, labels: torch.Tensor, zero_margin: ZeroMargin = "half") -> float:
    accuracies = pair_accuracies(margins, labels)[labels != TIE]
    return (accuracies if zero_margin == "half" else accuracies.floor()).mean().item()


def pair_accuracies(margins: torch.Tensor, labels: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Per pair: 1 if the margin has the sign that the label asks for, 0 if it has the other, 1/2 if it is 0."""
    signs = torch.as_tensor(labels, device=margins.device, dtype=margins.dtype) * 2 - 1
    return ((margins * signs).sign() + 1) / 2


def videoalign_accuracy_with_ties(margins: torch.Tensor, labels: torch.Tensor) -> float:
    """
    The accuracy with ties that the code of VideoAlign reports: the pairs are ordered by the absolute value of their margins, in
    their own order where it is equal, and the first k of them are predicted to be ties, for the best k of at least 1.

    For scores that differ everywhere, this is the accuracy at [`calibrated_tie_threshold`], unless predicting no ties is best.
    For scores that take few values, such as LiFT-Critic's and VisionReward's, it depends on the order of the pairs, and can be
    higher than at any threshold, since it may call some pairs of the same margin ties and others not.

    Args:
        margins (`torch.Tensor` of shape `(num_pairs,)`): margins.
        labels (`torch.Tensor` of shape `(num_pairs,)`): 1, 0.5 for a tie, or 0.
    """
    order = margins.double().abs().argsort(stable=True)
    is_tie = (labels == TIE)[order].double()
    is_right = (labels != TIE)[order] & (pair_accuracies(margins, labels)[order] == 1)
    right_after = is_right.double().flip(0).cumsum(0).flip(0) - is_right.double()
    return ((is_tie.cumsum(0) + right_after).max() / len(margins)).item()


def calibrated_tie_threshold(margins: torch.Tensor, labels: torch.Tensor) -> float:
    """
    The `tie_threshold` with the highest accuracy with ties, as in [Ties Matter](https://arxiv.org/abs/2305.14324). Of
    several, the smallest. It is chosen on the pairs themselves, so that the accuracy is a little too good on few pairs.

    Args:
        margins (`torch.Tensor` of shape `(num_pairs,)`): margins.
        labels (`torch.Tensor` of shape `(num_pairs,)`): 1, 0.5 for a tie, or 0.

    Returns:
        `float`: 0 or the absolute value of a margin.
    """
    sizes, order = margins.double().abs().sort()
    is_tie = (labels == TIE)[order]
    is_right = ~is_tie & (pair_accuracies(margins, labels)[order] == 1)
    thresholds = torch.cat([sizes.new_zeros(1), sizes])
    num_tied = torch.searchsorted(sizes, thresholds, right=True)
    ties_found = torch.cat([is_tie.new_zeros(1), is_tie]).cumsum(0)[num_tied]
    wins_lost = torch.cat([is_right.new_zeros(1), is_right]).cumsum(0)[num_tied]
    return thresholds[(ties_found - wins_lost).argmax()].item()


def evaluate_preference_accuracy(
    slrm: StepRewardModel,
    policy: FlowPolicy,
    dataset: Dataset,
    sigmas: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    rules: Sequence[AccuracyRule] | None = None,
    **options,
) -> dict[str, dict[float, float]]:
    """
    Accuracy of a latent reward model on held-out preference pairs, by noise level and by rule. Ties are left out.

    Args:
        slrm ([`StepRewardModel`]): reward model.
        policy ([`FlowPolicy`]): its base model, see [`score_pairs`].
        dataset ([`~datasets.Dataset`]): columns `prompt`, `chosen`, `rejected`, see [`prepare_preference_dataset`].
        sigmas (`Sequence[float]`, *optional*): noise levels.
        rules (`Sequence[str]`, *optional*): velocity targets of the score, see [`score_pairs`].
        options: further arguments of [`score_pairs`]: size, `batch_size`, `seed`, `cache_dir` and so on.

    Returns:
        `dict[str, dict[float, float]]`: `{rule: {sigma: accuracy}}`.
    """
    return accuracy_by_level(score_pairs(slrm, policy, dataset, sigmas, rules, **options))


def accuracy_with_ties_by_level(
    scores: PairScores, tie_threshold: float | Literal["best", "videoalign"] = "best"
) -> dict[str, dict[float, float]]:
    """
    Accuracy of scores of all pairs, ties among them, at each noise level on its own.

    Args:
        scores ([`PairScores`]): from [`score_pairs`] or [`score_pairs_of_pixels`].
        tie_threshold (`float` or `str`, *optional*, defaults to `"best"`):
            largest difference of the scores of a predicted tie; `"best"` is the one with the highest accuracy at this noise level
            ([`calibrated_tie_threshold`]), and `"videoalign"` counts as [`videoalign_accuracy_with_ties`].

    Returns:
        `dict[str, dict[float, float]]`: `{rule or reading: {sigma: accuracy}}`.
    """

    def accuracy(margins: torch.Tensor) -> float:
        best = tie_threshold == "best"
        threshold = calibrated_tie_threshold(margins, scores.labels) if best else tie_threshold
        return _accuracies(margins.double(), scores.labels, threshold, "half")["accuracy_with_ties"]

    return {
        rule: {sigma: accuracy(row) for sigma, row in zip(scores.sigmas, margins, strict=True)}
        for rule, margins in scores.margins.items()
    }


def accuracy_by_level(scores: PairScores, zero_margin: ZeroMargin = "half") -> dict[str, dict[float, float]]:
    """
    Accuracy of scores of pairs. Ties are left out.

    Args:
        scores ([`PairScores`]): from [`score_pairs`] or [`score_pairs_of_pixels`].
        zero_margin (`str`, *optional*, defaults to `"half"`): what equal scores are worth, see [`PreferenceAccuracy`].

    Returns:
        `dict[str, dict[float, float]]`: `{rule or reading: {sigma: accuracy}}`.
    """
    return {
        rule: {
            sigma: _accuracy(row, scores.labels, zero_margin)
            for sigma, row in zip(scores.sigmas, margins, strict=True)
        }
        for rule, margins in scores.margins.items()
    }
