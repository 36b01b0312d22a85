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

"""Ending a run in order: signals from the terminal or the scheduler."""

import signal
import threading
from types import FrameType

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging


logger = logging.get_logger(__name__)


class GracefulStopCallback(TrainerCallback):
    """
    On SIGTERM (what schedulers send) or SIGINT (Ctrl-C) the run saves a checkpoint at the end of the step and stops. A
    second Ctrl-C interrupts at once.

    Every process asks all others at the end of each step whether one of them got a signal, so that all of them stop after
    the same one.

    Args:
        every_n_steps (`int`, *optional*, defaults to `1`):
            Stop only after steps that are a multiple of it, where a checkpoint can be resumed from exactly.
    """

    def __init__(self, every_n_steps: int = 1):
        self.every_n_steps = every_n_steps
        self.signal: int | None = None
        self._handlers = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.signal = None
        if threading.current_thread() is not threading.main_thread():
            return  # where Python has no signals
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        logger.warning(
            f"Got {signal.Signals(number).name}: saving a checkpoint at the end of the step, then stopping."
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step % self.every_n_steps == 0 and self._anyone_signalled(args):
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
