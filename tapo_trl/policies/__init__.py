# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from .base import Defaults, FlowPolicy
from .embeddings import PromptEmbeddings
from .loading import FAMILIES, Family, load_policy
from .sd3 import SD3Policy
from .wan import WanPolicy


__all__ = [
    "FAMILIES",
    "Defaults",
    "Family",
    "FlowPolicy",
    "PromptEmbeddings",
    "SD3Policy",
    "WanPolicy",
    "load_policy",
]
