# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""How often the ranking of a pair flips between noise levels (Fig. 12)."""

from collections.abc import Sequence

import torch


def ranking_disagreement(margins: torch.Tensor) -> torch.Tensor:
    """
    Share of pairs that two noise levels rank differently, for every two levels. A pair with equal scores has no ranking:
    between a tie and a ranking lies half a flip, between two ties none. Chance alone gives one half.

    Args:
        margins (`torch.Tensor` of shape `(S, N)`): margins of N pairs at S noise levels.

    Returns:
        `torch.Tensor` of shape `(S, S)`, float64.
    """
    signs = margins.sign().double()
    return torch.stack([(signs - row).abs().mean(dim=1) / 2 for row in signs])


def ranking_consistency(margins: torch.Tensor, sigmas: Sequence[float]) -> dict[str, float | dict[float, float]]:
    """
    How stable the ranking of pairs is along a trajectory. No labels are needed: pairs that people call a tie count, too.

    Args:
        margins (`torch.Tensor` of shape `(S, N)`): margins of N pairs, made with the same noise at every level.
        sigmas (`Sequence[float]`): the S noise levels, in ascending order, at least two.

    Returns:
        `dict`: `flips_from_next_cleaner` and `flips_from_cleanest`, the share of pairs whose ranking at a noise level is
            another than at the level before it and than at the first one, `{sigma: share}` without the first level;
            `flips_per_pair`, the mean number of flips from the first level to the last, passing all of them; and
            `never_flips`, the share of pairs that all levels rank alike.

    Raises:
        ValueError: if there is nothing to compare, or the levels are in another order.
    """
    sigmas = list(sigmas)
    if len(sigmas) < 2 or sigmas != sorted(set(sigmas)):
        raise ValueError(f"`sigmas` must be at least two noise levels in ascending order, got {sigmas}.")
    disagreement = ranking_disagreement(margins)
    neighbours, cleanest = disagreement.diagonal(1), disagreement[0, 1:]
    signs = margins.sign()
    return {
        "flips_from_next_cleaner": dict(zip(sigmas[1:], neighbours.tolist(), strict=True)),
        "flips_from_cleanest": dict(zip(sigmas[1:], cleanest.tolist(), strict=True)),
        "flips_per_pair": neighbours.sum().item(),
        "never_flips": (signs == signs[0]).all(dim=0).double().mean().item(),
    }
