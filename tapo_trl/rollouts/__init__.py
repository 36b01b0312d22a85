# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from .base import Rollout, RolloutSampler, Transitions
from .groups import FlowGRPOSampler, GroupTransitions, TrajectoryGroups
from .pairing import PAIRINGS, Pairing, get_pairing
from .pairs import TAPOSampler, TrajectoryPairs, TransitionPairs
from .samples import NoisedPairs, OnlineDPOSampler, SamplePairs


__all__ = [
    "PAIRINGS",
    "FlowGRPOSampler",
    "GroupTransitions",
    "NoisedPairs",
    "OnlineDPOSampler",
    "Pairing",
    "Rollout",
    "RolloutSampler",
    "SamplePairs",
    "TAPOSampler",
    "TrajectoryGroups",
    "TrajectoryPairs",
    "TransitionPairs",
    "Transitions",
    "get_pairing",
]
