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
