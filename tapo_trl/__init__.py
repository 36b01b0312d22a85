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

from .policies import FlowPolicy, load_policy
from .rewards import SLRMModel
from .schedulers import FlowMatchSDEScheduler
from .trainer.callbacks import EMACallback, RewardHackingGuardCallback, SampleGridCallback, TAPOCallback
from .trainer.slrm_config import SLRMConfig
from .trainer.slrm_trainer import SLRMTrainer
from .trainer.tapo_config import TAPOConfig
from .trainer.tapo_trainer import TAPOTrainer
from .version import __version__


__all__ = [
    "EMACallback",
    "FlowMatchSDEScheduler",
    "FlowPolicy",
    "RewardHackingGuardCallback",
    "SLRMConfig",
    "SLRMModel",
    "SLRMTrainer",
    "SampleGridCallback",
    "TAPOCallback",
    "TAPOConfig",
    "TAPOTrainer",
    "__version__",
    "load_policy",
]
