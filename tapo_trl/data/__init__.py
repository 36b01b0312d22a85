# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from typing import TYPE_CHECKING

from ..lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {".pairs": ("PAIR_PRESETS", "to_preference_pairs"), ".prompts": ("PromptCache", "default_prompts")},
)

if TYPE_CHECKING:
    from .pairs import PAIR_PRESETS, to_preference_pairs
    from .prompts import PromptCache, default_prompts
