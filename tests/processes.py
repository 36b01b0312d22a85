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

"""Processes that are forked from one in which everything is imported: importing takes longer than a tiny training."""

import multiprocessing
import os
from collections.abc import Callable


FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.preloaded"])


def start(function: Callable, *args):
    """Start `function(*args)` in a process, and a session, of its own."""
    process = FORKED.Process(target=_run, args=(function, *args))
    process.start()
    return process


def _run(function: Callable, *args) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # for its own children, such as data loaders
    function(*args)
