# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from .base import FlowPolicy, PromptEmbeddings
from .loading import load_policy
from .sd3 import SD3Policy
from .wan import WanPolicy


__all__ = ["FlowPolicy", "PromptEmbeddings", "SD3Policy", "WanPolicy", "load_policy"]
