# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Share of the gradient that comes from each stochastic step."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from accelerate.utils import DistributedType
from transformers import TrainerControl, TrainerState, TrainingArguments

from .base import PolicyCallback, check_at_least_one


if TYPE_CHECKING:
    from ..trainer.base import DiffusionTrainer

PREFIX = "gradient_share/"


class GradientShareCallback(PolicyCallback):
    r"""
    Measures how much each stochastic step adds to the gradient of TAPO or Flow-GRPO.

    Every `every_n_steps` optimizer steps, right before the update, the loss of the rollout's transitions at step \\( i \\)
    alone is differentiated once more, and \\( \|g_i\| / \sum_j \|g_j\| \\) is logged as `gradient_share/step_XX`, beside
    `step_XX/loss`. The loss is the one that is trained on, with its weights and its KL term, and the norm is that of the
    mean over all processes, without clipping.

    The training is not changed: gradients, random numbers and other metrics stay the same, bit for bit. A measurement
    takes as long as the losses and backward passes of one optimizer step, without its rollout, and needs memory for
    two more gradients. NaN and infinite measurements are not logged. With `fp16` the loss is scaled as it is in
    training.

    For trainers with stochastic steps, [`TAPOTrainer`] and [`FlowGRPOTrainer`], in one process or under DDP.

    Args:
        every_n_steps (`int`, *optional*, defaults to `50`): Number of optimizer steps between two measurements. The first
            one is made in the first step.
    """

    def __init__(self, every_n_steps: int = 50):
        super().__init__()
        check_at_least_one(every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps

    def attach(self, trainer: "DiffusionTrainer") -> None:
        if not trainer.has_stochastic_steps:
            raise ValueError(
                f"`GradientShareCallback` needs stochastic steps, which `{type(trainer).__name__}` has none of: use it "
                "with `TAPOTrainer` or `FlowGRPOTrainer`."
            )
        if trainer.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise ValueError(
                "`GradientShareCallback` needs whole parameters and gradients on every process, which DeepSpeed and FSDP "
                "take apart. Measure with DDP or in one process, or train without it."
            )
        super().attach(trainer)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        if state.global_step % self.every_n_steps:
            return
        norms = self._norms()
        if norms.isfinite().all() and norms.sum() > 0:
            shares = norms / norms.sum()
            for index, share in zip(self.trainer.step_indices, shares, strict=True):
                self.trainer._record({f"{PREFIX}step_{index:02d}": share})

    def _norms(self) -> torch.Tensor:
        """Norm of the gradient of each stochastic step, of shape `(n,)`."""
        device = self.trainer.accelerator.device
        on_cpu = device.type == "cpu"  # whose random numbers are kept in any case
        with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
            return torch.stack([self._norm(step) for step in range(len(self.trainer.step_indices))])

    def _norm(self, step: int) -> torch.Tensor:
        trainer = self.trainer
        parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        scaler = trainer.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for loss in self._losses(step):
            gradients = torch.autograd.grad(loss * scale, parameters, allow_unused=True)
            for part, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    part += gradient / scale
        total = trainer.accelerator.reduce(total, reduction="mean")
        return torch.stack([part.norm() for part in total]).norm()

    def _losses(self, step: int) -> Iterator[torch.Tensor]:
        """The loss of one step, in parts that are made one after the other and add up to it."""
        trainer, args = self.trainer, self.trainer.args
        chunk_size = args.transition_batch_size or args.per_device_train_batch_size
        rollouts = [rollout for _, rollout in trainer.buffer.rollouts]
        for rollout in rollouts:
            for chunk in rollout.of_step(step).transitions(chunk_size):
                with trainer.compute_loss_context_manager():
                    chunk = chunk.to(trainer.accelerator.device)
                    _, losses, _ = trainer.transition_losses(trainer.model, chunk)
                yield losses.mean() * chunk.share / len(rollouts)


def gradient_share_curves(log_history: list[dict]) -> dict[str, dict[int, float]]:
    """
    What [`GradientShareCallback`] logged.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.

    Returns:
        `dict[str, dict[int, float]]`: `{"step_XX": {optimizer step: share}}`, empty if it logged nothing.
    """
    curves: dict[str, dict[int, float]] = {}
    for entry in log_history:
        for name in sorted(entry):
            if name.startswith(PREFIX):
                curves.setdefault(name.removeprefix(PREFIX), {})[entry["step"]] = entry[name]
    return curves
