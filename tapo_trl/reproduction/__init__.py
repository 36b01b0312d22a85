# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The paper's tables and figures, measured again in a world of one's own."""

from typing import TYPE_CHECKING

from ..lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".experiments": ("EXPERIMENTS", "Experiment"),
        ".lab": ("Lab",),
        ".runs": ("Run", "RunQueue"),
        ".world": ("World", "load_world"),
    },
)

if TYPE_CHECKING:
    from .experiments import EXPERIMENTS, Experiment
    from .lab import Lab
    from .runs import Run, RunQueue
    from .world import World, load_world
