# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from contextlib import ExitStack

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..profiling import StageTimer


class ProfileCallback(TrainerCallback):
    """
    Times the optimizer, and prints the table of a [`~profiling.StageTimer`] when the training ends.

    Args:
        timer ([`~profiling.StageTimer`]): the trainer's.
    """

    def __init__(self, timer: StageTimer):
        self.timer = timer
        self._optimizer = ExitStack()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._optimizer.enter_context(self.timer.stage("optimizer"))

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._optimizer.close()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if state.is_world_process_zero:
            tqdm.write(self.timer.table())
