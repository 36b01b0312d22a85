# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
What ends a run early, with a checkpoint: signals from the terminal or the scheduler, launchers that are gone, and updates that are
skipped because a reward, a loss or a gradient is NaN or Inf.
"""

import ctypes
import functools
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

import torch
from accelerate.utils import DistributedType, gather_object
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging


if TYPE_CHECKING:
    from ..trainer.base import DiffusionTrainer


logger = logging.get_logger(__name__)

_STARTED_BY = (os.getpid(), os.getppid())
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


# Signals


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


def detach_data_workers(dataloader: DataLoader) -> DataLoader:
    """Have the processes of a data loader of accelerate start with [`start_data_worker`]."""
    start = functools.partial(start_data_worker, dataloader.worker_init_fn)
    dataloader.worker_init_fn = dataloader.base_dataloader.worker_init_fn = start
    return dataloader


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

    def restore_handlers(self) -> None:
        """Give signals back to those who had them before the training, which may have ended with an error."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())


# NaN and Inf


@dataclass
class Watched:
    """
    Values that should be finite.

    Args:
        values (`torch.Tensor`): rewards or losses.
        describe (`Callable[[tuple[int, ...]], str]`): what the value at an index is, with its prompt and step.
    """

    values: torch.Tensor
    describe: Callable[[tuple[int, ...]], str]

    def problem(self) -> str | None:
        """The first value that is not finite, in words, or `None`."""
        found = (~self.values.isfinite()).nonzero()
        if len(found) == 0:
            return None
        index = tuple(found[0].tolist())
        return f"{self.describe(index)} is {self.values[index].item()} ({len(found)} of {self.values.numel()} values)"


class NonFiniteGuard(TrainerCallback):
    """
    Skips an update in which a reward, a loss or a gradient is not finite: weights, states of the optimizer and learning
    rate stay as they are, on every process. After `args.max_skipped_updates` of them in a row, the next one saves a
    checkpoint with the last good weights and ends the training with an error.

    A reward or a loss that is not finite makes the loss NaN ([`mark`]) and so the gradient, which all processes share:
    they agree without a message of their own. Only the norm of the gradient is looked at, once per update.

    DeepSpeed updates inside the backward pass, and is told to skip by the same rule there. With `fp16`, gradients that
    overflow while all losses are finite belong to the search for a loss scale, and do not count.

    Args:
        trainer ([`DiffusionTrainer`]): the trainer.
        stop_every_n_steps (`int`, *optional*, defaults to `1`):
            Stop only after steps that are a multiple of it, when rollouts that are used several times are used up: the
            resumed run makes new ones.
    """

    def __init__(self, trainer: "DiffusionTrainer", stop_every_n_steps: int = 1):
        self.trainer = trainer
        self.stop_every_n_steps = stop_every_n_steps
        self.grad_norm: torch.Tensor | float | None = None
        self.skipped_in_a_row = 0
        self.last_problem = ""
        self._skipped_since_log = 0
        self._watched: list[Watched] = []
        self._prompts: list[str] = []
        self._all_finite: torch.Tensor | None = None

    # During an update

    def watch(
        self, values: torch.Tensor, describe: Callable[[tuple[int, ...]], str], prompts: Sequence[str] = ()
    ) -> None:
        """
        Keep values that should be finite until the update, without waiting for the device.

        Args:
            values (`torch.Tensor`): rewards or losses.
            describe (`Callable`): see [`Watched`].
            prompts (`Sequence[str]`, *optional*): prompts that the update is made of.
        """
        values = values.detach()
        finite = values.isfinite().all()
        self._all_finite = finite if self._all_finite is None else self._all_finite & finite
        self._watched.append(Watched(values, describe))
        self._prompts += [prompt for prompt in prompts if prompt not in self._prompts]

    def mark(self, loss: torch.Tensor) -> torch.Tensor:
        """The same loss, or NaN if something that this update watched is not finite."""
        if self._all_finite is None:
            return loss
        return loss * torch.where(self._all_finite, 1.0, math.nan).to(loss)

    def pop_skipped(self) -> int:
        """Updates skipped since the last call."""
        skipped, self._skipped_since_log = self._skipped_since_log, 0
        return skipped

    # Events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer=None, **kwargs
    ):
        self.skipped_in_a_row = self._skipped_since_log = 0
        self._forget()
        if self._deepspeed_stage in (1, 2):
            optimizer.optimizer.check_grad_overflow = True  # off by default in float32 and bfloat16

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer=None, **kwargs
    ):
        uses_deepspeed = self._deepspeed_stage is not None
        norm = self.grad_norm.full_tensor() if isinstance(self.grad_norm, DTensor) else self.grad_norm
        norm = None if norm is None else float(norm)
        is_finite = norm is None or (math.isfinite(norm) and norm >= 0)  # DeepSpeed writes -1 for NaN
        if uses_deepspeed:
            is_skipped = optimizer.step_was_skipped
            if not is_finite and not is_skipped:
                raise RuntimeError(
                    f"DeepSpeed made update {state.global_step + 1} with a gradient of norm {norm}. Resume from the last "
                    "checkpoint, under ZeRO stage 1, 2 or 3, which skip such updates."
                )
            is_finite = not is_skipped
        elif optimizer.scaler is None:
            optimizer._is_overflow = not is_finite  # as after an overflow in float16, `Trainer` holds its schedule
            if not is_finite:
                optimizer.zero_grad(set_to_none=True)  # parameters without a gradient are left alone
        if is_finite:
            self.skipped_in_a_row = 0
        else:
            self._count(args, state, norm, optimizer)
        self._forget()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if not self._is_over(args):
            return
        if state.global_step % self.stop_every_n_steps == 0 or state.global_step >= state.max_steps:
            control.should_log = control.should_save = control.should_training_stop = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if "learning_rate" in logs:
            # With `logging_nan_inf_filter=False` `Trainer` resets a sum that is NaN by subtracting it from itself.
            self.trainer._tr_loss.nan_to_num_(nan=0.0)

    def raise_if_over(self) -> None:
        """
        At the end of the training.

        Raises:
            FloatingPointError: if it ended because too many updates in a row were skipped.
        """
        args, state = self.trainer.args, self.trainer.state
        if self._is_over(args):
            raise FloatingPointError(
                f"The training stopped at step {state.global_step}: {self.skipped_in_a_row} updates in a row were skipped, "
                f"more than `max_skipped_updates={args.max_skipped_updates}`. In the last one, {self.last_problem}. The "
                f"weights of the last good update are in {args.output_dir}/checkpoint-{state.global_step}. Repair the "
                "reward or the data, or lower `learning_rate` if the loss diverged, then go on with "
                "`resume_from_checkpoint=True`."
            )

    def _is_over(self, args: TrainingArguments) -> bool:
        return self.skipped_in_a_row > args.max_skipped_updates

    def _count(self, args: TrainingArguments, state: TrainerState, norm: float | None, optimizer) -> None:
        problems = [watched.problem() for watched in self._watched]
        first = next((problem for problem in problems if problem is not None), None)
        everyone = gather_object([(first, self._prompts)])
        problems = [problem for problem, _ in everyone if problem is not None]
        if not problems and args.fp16 and (optimizer.scaler is None or optimizer.scaler.get_scale() > 1):
            return
        if not problems:
            prompts = ", ".join(repr(prompt) for _, prompts in everyone for prompt in prompts)
            problems = [f"the gradient has the norm {norm}, with finite rewards and losses, on the prompts {prompts}"]
        self.skipped_in_a_row += 1
        self._skipped_since_log += 1
        self.last_problem = "; ".join(problems)
        if state.is_world_process_zero:
            logger.warning(
                f"Step {state.global_step + 1}: the update is skipped, {self.skipped_in_a_row} in a row "
                f"(`max_skipped_updates={args.max_skipped_updates}`): {self.last_problem}."
            )

    def _forget(self) -> None:
        self.grad_norm, self._all_finite, self._watched, self._prompts = None, None, [], []

    @property
    def _deepspeed_stage(self) -> int | None:
        accelerator = self.trainer.accelerator
        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            return None
        return accelerator.state.deepspeed_plugin.zero_stage
