# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from .agreement import krippendorff_alpha, percent_agreement
from .export import export_preferences
from .ranking import bradley_terry, win_shares
from .study import Dimension, Study, View
from .votes import VoteStore, current_votes, read_events


__all__ = [
    "Dimension",
    "Study",
    "View",
    "VoteStore",
    "bradley_terry",
    "current_votes",
    "export_preferences",
    "krippendorff_alpha",
    "percent_agreement",
    "read_events",
    "win_shares",
]
