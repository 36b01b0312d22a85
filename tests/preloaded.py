# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What `processes.FORKED` imports before it forks: all that a training and a command need."""

import datasets  # noqa: F401
import diffusers  # noqa: F401
import pytest  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401
import trl  # noqa: F401

import tapo_trl


for name in tapo_trl.__all__:
    getattr(tapo_trl, name)
