# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""How the scores of chosen and rejected samples lie, and how far apart (Fig. 14)."""

import torch


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def area_under_curve(chosen: torch.Tensor, rejected: torch.Tensor) -> float:
    """
    Probability that one of the chosen scores is higher than one of the rejected scores, each drawn at random; equal scores
    count one half. 1/2 if the distributions lie on each other, 1 if they do not overlap.

    Args:
        chosen (`torch.Tensor` of shape `(N,)`): scores.
        rejected (`torch.Tensor` of shape `(M,)`): scores.
    """
    chosen, rejected = chosen.double().contiguous(), rejected.double().sort().values
    lower = torch.searchsorted(rejected, chosen) + torch.searchsorted(rejected, chosen, right=True)
    return lower.double().mean().item() / (2 * len(rejected))


def summary(scores: torch.Tensor) -> dict[str, float | dict[float, float]]:
    """`mean`, `std` (of these scores, not of a population) and `quantiles`, `{level: quantile}`, of scores `(N,)`."""
    scores = scores.double()
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    return {
        "mean": scores.mean().item(),
        "std": scores.std(correction=0).item(),
        "quantiles": dict(zip(QUANTILES, scores.quantile(levels).tolist(), strict=True)),
    }


def score_distributions(chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, float | dict]:
    """
    Distributions of the scores of N pairs at one noise level.

    Args:
        chosen (`torch.Tensor` of shape `(N,)`): scores of the preferred side.
        rejected (`torch.Tensor` of shape `(N,)`): scores of the other side.

    Returns:
        `dict`: `chosen`, `rejected` and `margin`, a [`summary`] each, and `auc`, the [`area_under_curve`]. The area compares
            samples of different prompts, too; the accuracy compares those of one.
    """
    return {
        "chosen": summary(chosen),
        "rejected": summary(rejected),
        "margin": summary(chosen - rejected),
        "auc": area_under_curve(chosen, rejected),
    }
