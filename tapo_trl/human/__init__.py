# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from typing import TYPE_CHECKING

from ..lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".agreement": ("krippendorff_alpha", "percent_agreement"),
        ".export": ("export_preferences",),
        ".ranking": ("bradley_terry", "win_shares"),
        ".study": ("Dimension", "Study", "View"),
        ".votes": ("VoteStore", "current_votes", "read_events"),
    },
)

if TYPE_CHECKING:
    from .agreement import krippendorff_alpha, percent_agreement
    from .export import export_preferences
    from .ranking import bradley_terry, win_shares
    from .study import Dimension, Study, View
    from .votes import VoteStore, current_votes, read_events
