# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Ending a run in order: signals from the terminal or the scheduler, and launchers that are gone."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from types import FrameType

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging


logger = logging.get_logger(__name__)

_STARTED_BY = (os.getpid(), os.getppid())
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def end_with_launcher(environment: Mapping[str, str] = os.environ) -> bool:
    """
    Have this process get a SIGTERM when the launcher that started it dies: `accelerate launch` and `torchrun` leave their
    processes behind when they are killed, and `accelerate launch` of a single one even on SIGTERM. Linux only.

    Args:
        environment (`Mapping[str, str]`, *optional*): what the launcher left; the process's own by default.

    Returns:
        `bool`: whether the launcher is gone already.
    """
    is_launched = "ACCELERATE_MIXED_PRECISION" in environment or "TORCHELASTIC_RUN_ID" in environment
    if not is_launched or sys.platform != "linux":
        return False
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    process, parent = _STARTED_BY
    return process == os.getpid() and parent != os.getppid()


def start_data_worker(initialize: Callable[[int], None] | None, worker: int) -> None:
    """
    Start of a data loader's process. It leaves the group of the training process, which Ctrl-C and `torchrun` signal as a
    whole: a data loader that lost a process fails before the checkpoint is saved.

    Args:
        initialize (`Callable[[int], None]`, *optional*): what to do next.
        worker (`int`): its number.
    """
    os.setpgid(0, 0)
    if initialize is not None:
        initialize(worker)


class GracefulStopCallback(TrainerCallback):
    """
    On SIGTERM (what schedulers send) or SIGINT (Ctrl-C) the run saves a checkpoint at the end of the step and stops. A
    second Ctrl-C interrupts at once.

    Every process asks all others at the end of each step whether one of them got a signal, so that all of them stop after
    the same one.
    """

    def __init__(self):
        self.signal: int | None = None
        self._handlers = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.signal = None
        if threading.current_thread() is not threading.main_thread():
            return  # where Python has no signals
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._on_signal)
        if end_with_launcher():
            self._on_signal(signal.SIGTERM, None)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal != signal.SIGINT:
            self.signal = number
        logger.warning(
            f"Got {signal.Signals(number).name}: saving a checkpoint at the end of the step, then stopping."
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self._anyone_signalled(args):
            control.should_save = control.should_training_stop = True

    def _anyone_signalled(self, args: TrainingArguments) -> bool:
        if args.world_size == 1:
            return self.signal is not None
        signalled = torch.tensor(float(self.signal is not None), device=args.device)
        torch.distributed.all_reduce(signalled, op=torch.distributed.ReduceOp.MAX)
        return signalled.item() > 0

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
