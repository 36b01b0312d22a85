# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from .base import PolicyCallback, TAPOCallback
from .ema import EMACallback
from .profile import ProfileCallback
from .reward_guard import RewardHackingGuardCallback
from .samples import SampleGridCallback
