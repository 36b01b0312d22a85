# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What `num_iterations > 1`, several updates from the same rollouts, takes to be resumed exactly."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from trl.trainer.utils import RepeatSampler

from ..policies import PromptEmbeddings
from . import Rollout, SamplePairs, TrajectoryGroups, TrajectoryPairs


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


def save_rollouts(folder: str | Path, process: int, rollouts: list[tuple[list[int], Rollout]]) -> None:
    """
    Write the rollouts of a process into a checkpoint that lies between two updates from them.

    Args:
        folder (`str` or `Path`): the checkpoint.
        process (`int`): index of the process.
        rollouts (`list[tuple[list[int], Rollout]]`): rows of the dataset, and what grew from them.
    """
    torch.save(rollouts, _file(folder, process))


def load_rollouts(folder: str | Path, process: int, device: torch.device) -> list[tuple[list[int], Rollout]]:
    """
    Read what [`save_rollouts`] wrote. Tensors that were on the CPU stay there.

    Args:
        folder (`str` or `Path`): the checkpoint.
        process (`int`): index of the process.
        device (`torch.device`): where the others go.

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

    written_by_0_1 = [
        (TrajectoryPairs, "tapo_trl.rollouts.trajectory.TrajectoryPairs"),
        (PromptEmbeddings, "tapo_trl.policies.base.PromptEmbeddings"),
    ]
    classes = [TrajectoryPairs, SamplePairs, TrajectoryGroups, PromptEmbeddings, *written_by_0_1]
    with torch.serialization.safe_globals(classes):
        return torch.load(file, map_location=place, weights_only=True)


def _file(folder: str | Path, process: int) -> Path:
    return Path(folder) / f"rollouts_{process}.pt"
