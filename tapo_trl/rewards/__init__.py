# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from .base import LatentRewardModel
from .dina import DiNaModel
from .loading import REWARD_MODELS, load_reward_model
from .lrm import LRMModel
from .pretrained import PretrainedReward, get_reward, list_rewards
from .range_weight import RangeWeight
from .remote import RemoteReward, RemoteRewardError
from .scoring import Candidates, EstimateReward, LatentReward, PixelReward, RewardFunction, WeightedReward
from .slrm import SLRMModel, SLRMOutput
from .spm import SPMModel
from .step_reward import RewardOutput, StepRewardModel
from .targets import VELOCITY_TARGETS, VelocityTarget, velocity_target


__all__ = [
    "Candidates",
    "DiNaModel",
    "EstimateReward",
    "LRMModel",
    "LatentReward",
    "LatentRewardModel",
    "PixelReward",
    "PretrainedReward",
    "REWARD_MODELS",
    "RangeWeight",
    "RemoteReward",
    "RemoteRewardError",
    "RewardFunction",
    "RewardOutput",
    "SLRMModel",
    "SLRMOutput",
    "SPMModel",
    "StepRewardModel",
    "VELOCITY_TARGETS",
    "VelocityTarget",
    "WeightedReward",
    "get_reward",
    "list_rewards",
    "load_reward_model",
    "velocity_target",
]
