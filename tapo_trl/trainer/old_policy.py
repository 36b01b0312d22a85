# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The policy that samples while another one is trained: [`OldPolicy`]."""

from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files import atomic_write
from ..runs.shards import TrainedWeights, whole_shape


OLD_POLICY_FILE = "old_policy.safetensors"


def soft_update_decay(iteration: int, rate: float, maximum: float, start: int = 0) -> float:
    r"""
    Decay of the old policy's weights, \\( \eta_i = \min(\mathrm{rate} \cdot (i - \mathrm{start}), \mathrm{maximum}) \\), and 0
    before `start`.

    Args:
        iteration (`int`): i, the number of optimizer steps so far.
        rate (`float`): increase per step.
        maximum (`float`): upper bound.
        start (`int`, *optional*, defaults to `0`): steps before the increase.
    """
    return min(rate * max(iteration - start, 0), maximum)


class OldPolicy(TrainerCallback):
    r"""
    Moving average of the trained weights, with which samples are drawn:
    \\( \theta_{old} \leftarrow \eta_i \theta_{old} + (1 - \eta_i) \theta \\), in float32. It starts from the trained weights at
    the beginning of a training, and is saved in checkpoints.

    Args:
        trained ([`~runs.shards.TrainedWeights`]): the weights that are averaged, on each process those that it holds.
        rate, maximum, start: see [`soft_update_decay`].
        every (`int`, *optional*, defaults to `1`): optimizer steps between two updates of the old policy.

    Attributes:
        weights (`dict[str, torch.Tensor]`):
            theta_old by the name of the parameter, of which this process has its shard. Empty before the training.
    """

    def __init__(self, trained: TrainedWeights, rate: float, maximum: float, start: int = 0, every: int = 1):
        self.trained = trained
        self.rate, self.maximum, self.start, self.every = rate, maximum, start, every
        self.weights: dict[str, torch.Tensor] = {}
        self._loaded: dict[str, torch.Tensor] = {}

    def decay(self, step: int) -> float:
        """eta of the last update up to an optimizer step."""
        return soft_update_decay(step - step % self.every, self.rate, self.maximum, self.start)

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return self.trained.parameters

    def active(self) -> AbstractContextManager[None]:
        """Inside, the network has the weights of the old policy. Use it without gradients, before the forward that has them."""
        return self.trained.replaced_by(self.weights)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        parameters = self.parameters
        loaded, self._loaded = self._loaded, {}
        if loaded and {n: w.shape for n, w in loaded.items()} != {n: whole_shape(p) for n, p in parameters.items()}:
            raise ValueError(
                f"`{OLD_POLICY_FILE}` of the checkpoint does not fit the trainable parameters of this run: it was made with "
                "another LoRA configuration or another model."
            )
        start = self.trained.split(loaded) if loaded else self.trained.shards
        self.weights = {name: shard.to(torch.float32, copy=True) for name, shard in start.items()}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step % self.every:
            return
        decay = self.decay(state.global_step)
        for name, shard in self.trained.shards.items():
            self.weights[name].mul_(decay).add_(shard.float(), alpha=1 - decay)

    def save(self, folder: Path, should_write: bool = True) -> None:
        """Write theta_old into a checkpoint, on one of the processes, all of which must call this."""
        weights = self.trained.gather(self.weights)
        if should_write:
            with atomic_write(folder / OLD_POLICY_FILE) as aside:
                save_file({name: weight.contiguous() for name, weight in weights.items()}, aside)

    def load(self, folder: Path) -> None:
        """
        Read what [`~OldPolicy.save`] wrote. The next training starts with it.

        Raises:
            FileNotFoundError: if the checkpoint has none.
        """
        file = folder / OLD_POLICY_FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"DiffusionNFT cannot resume from {folder}: there is no `{OLD_POLICY_FILE}`, the weights of the policy that "
                "samples. Resume from a checkpoint of `DiffusionNFTTrainer`."
            )
        self._loaded = load_file(file)
