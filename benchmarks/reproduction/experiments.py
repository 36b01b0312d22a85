# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The experiments by name."""

from collections.abc import Callable

from .lab import Lab
from .policy_experiments import figure10, figure11, longer, pairings, recipe, table1, table3
from .report import Report
from .reward_experiments import ablation, figure4, figure12, figure14, figure15, table2, table4


Experiment = Callable[[Lab], Report]

EXPERIMENTS: dict[str, Experiment] = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "table4": table4,
    "fig4": figure4,
    "fig10": figure10,
    "fig11": figure11,
    "fig12": figure12,
    "fig14": figure14,
    "fig15": figure15,
    "ablation": ablation,
    "pairings": pairings,
    "recipe": recipe,
    "longer": longer,
}
