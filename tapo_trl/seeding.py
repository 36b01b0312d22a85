# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Random numbers that depend on what they are for, not on the process, the batch or the time at which they are drawn."""

import hashlib
from operator import index

import torch


def seeded_generator(*key: int | str) -> torch.Generator:
    """
    A CPU generator that depends on `key` alone, such as `("slrm", seed, global_step, row)`. A run then sees the same
    noise on any number of processes, and after a resume.
    """
    key = tuple(part if isinstance(part, str) else index(part) for part in key)  # integers of NumPy and PyTorch, too
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
