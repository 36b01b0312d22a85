# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from .base import PolicyCallback, TAPOCallback
from .ema import EMACallback
from .gradient_share import GradientShareCallback
from .profile import ProfileCallback
from .reward_guard import RewardHackingGuardCallback
from .samples import SampleGridCallback
