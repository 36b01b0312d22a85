# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Several updates from the same rollouts (`num_iterations > 1`), which a resumed run goes on with exactly."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from trl.trainer.utils import RepeatSampler

from ..policies import PromptEmbeddings
from .base import Rollout


class EpochRepeatSampler(RepeatSampler):
    """
    Draws the order of each epoch from the seed and the epoch: a resumed run does not start with that of the first one.

    Args:
        epoch (`Callable[[], int]`): says which epoch it is.
        kwargs: see [`~trl.trainer.utils.RepeatSampler`], with a `seed`.
    """

    def __init__(self, epoch: Callable[[], int], **kwargs):
        super().__init__(**kwargs)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch())
        return super().__iter__()


class RolloutBuffer:
    """
    The rollouts of an optimizer step, one per batch, which `num_iterations` steps in a row are trained on.

    Args:
        num_iterations (`int`): optimizer steps per rollout.

    Attributes:
        rollouts (`list[tuple[list[int], Rollout]]`): rows of the dataset, and what grew from them.
    """

    def __init__(self, num_iterations: int):
        self.num_iterations = num_iterations
        self.rollouts: list[tuple[list[int], Rollout]] = []
        self._step, self._next = -1, 0

    def begin(self, step: int, load: Callable[[], list[tuple[list[int], Rollout]]]) -> bool:
        """
        Go on to an optimizer step, if it is a new one: drop what is used up, or `load` what an interrupted run left.

        Returns:
            `bool`: whether it is a new one.
        """
        if step == self._step:
            return False
        self._step, self._next = step, 0
        if step % self.num_iterations == 0:
            self.rollouts = []
        elif not self.rollouts:
            self.rollouts = load()
        return True

    @property
    def is_used_up(self) -> bool:
        """Whether the next batch needs a new rollout."""
        return self._next == len(self.rollouts)

    def take(self, rows: list[int]) -> Rollout:
        """The rollout of the next batch, which has these rows of the dataset."""
        stored_rows, rollout = self.rollouts[self._next]
        self._next += 1
        if stored_rows != rows:
            raise RuntimeError(f"The rollout of rows {stored_rows} is up for reuse, but the batch has rows {rows}.")
        return rollout

    def forget_reference(self) -> None:
        """Drop velocities of the reference, which has changed."""
        for _, rollout in self.rollouts:
            rollout.ref_velocities = None


def save_rollouts(folder: str | Path, process: int, rollouts: list[tuple[list[int], Rollout]]) -> None:
    """
    Write the rollouts of a process into a checkpoint that lies between two updates from them.

    Args:
        folder (`str` or `Path`): the checkpoint.
        process (`int`): index of the process.
        rollouts (`list[tuple[list[int], Rollout]]`): rows of the dataset, and what grew from them.
    """
    torch.save(rollouts, _file(folder, process))


def load_rollouts(
    folder: str | Path, process: int, device: torch.device, rollout_class: type[Rollout]
) -> list[tuple[list[int], Rollout]]:
    """
    Read what [`save_rollouts`] wrote. Tensors that were on the CPU stay there.

    Args:
        folder (`str` or `Path`): the checkpoint.
        process (`int`): index of the process.
        device (`torch.device`): where the others go.
        rollout_class (`type`): the class of the rollouts. No other is loaded.

    Raises:
        ValueError: if the checkpoint has none.
    """
    file = _file(folder, process)
    if not file.is_file():
        raise ValueError(
            f"The run cannot go on from {folder} exactly: it lies between two updates from the same rollouts, but "
            f"`{file.name}` is missing. Was `num_iterations` or the number of processes another one? Go on from a "
            "checkpoint whose step is a multiple of `num_iterations`."
        )

    def place(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        target = location if location == "cpu" else str(device)
        return torch.serialization.default_restore_location(storage, target)

    former = [(rollout_class, name) for name in rollout_class.former_names]
    former.append((PromptEmbeddings, "tapo_trl.policies.base.PromptEmbeddings"))
    with torch.serialization.safe_globals([rollout_class, PromptEmbeddings, *former]):
        return torch.load(file, map_location=place, weights_only=True)


def _file(folder: str | Path, process: int) -> Path:
    return Path(folder) / f"rollouts_{process}.pt"
