# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

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
