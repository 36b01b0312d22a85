# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from .base import Rollout, RolloutInputs, RolloutSampler, Transitions
from .groups import FlowGRPOSampler, GroupTransitions, TrajectoryGroups
from .noised import NFTSampler, NoisedSamples, RewardedSamples
from .pairing import PAIRINGS, Pairing, get_pairing
from .pairs import TAPOSampler, TrajectoryPairs, TransitionPairs
from .samples import NoisedPairs, OnlineDPOSampler, SamplePairs
from .states import LateStates, LateStateSampler, StateTransitions


__all__ = [
    "PAIRINGS",
    "FlowGRPOSampler",
    "GroupTransitions",
    "LateStateSampler",
    "LateStates",
    "NFTSampler",
    "NoisedPairs",
    "NoisedSamples",
    "OnlineDPOSampler",
    "Pairing",
    "RewardedSamples",
    "Rollout",
    "RolloutInputs",
    "RolloutSampler",
    "SamplePairs",
    "StateTransitions",
    "TAPOSampler",
    "TrajectoryGroups",
    "TrajectoryPairs",
    "TransitionPairs",
    "Transitions",
    "get_pairing",
]
