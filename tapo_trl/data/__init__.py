# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from .pairs import PAIR_PRESETS, to_preference_pairs
from .prompts import PromptCache, default_prompts


__all__ = ["PAIR_PRESETS", "PromptCache", "default_prompts", "to_preference_pairs"]
