# Copyright 2026 The tapo_trl authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from .base import LatentRewardModel
from .candidates import Candidates
from .dina import DiNaModel
from .loading import REWARD_MODELS, load_reward_model
from .lrm import LRMModel
from .scoring import EstimateReward, LatentReward, PixelReward, RewardFunction, WeightedReward
from .slrm import SLRMModel, SLRMOutput
from .spm import SPMModel
from .step_reward import RewardOutput, StepRewardModel
from .velocity_targets import VELOCITY_TARGETS, VelocityTarget, velocity_target


__all__ = [
    "Candidates",
    "DiNaModel",
    "EstimateReward",
    "LRMModel",
    "LatentReward",
    "LatentRewardModel",
    "PixelReward",
    "REWARD_MODELS",
    "RewardFunction",
    "RewardOutput",
    "SLRMModel",
    "SLRMOutput",
    "SPMModel",
    "StepRewardModel",
    "VELOCITY_TARGETS",
    "VelocityTarget",
    "WeightedReward",
    "load_reward_model",
    "velocity_target",
]
