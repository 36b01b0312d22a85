# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from typing import TYPE_CHECKING

from transformers import TrainerCallback
from transformers.utils import logging


if TYPE_CHECKING:
    from ..trainer.base import DiffusionTrainer

logger = logging.get_logger(__name__)


class PolicyCallback(TrainerCallback):
    """
    Base class of callbacks that need the trainer, or that generate samples of their own prompts.

    The trainer of a policy, [`TAPOTrainer`] or [`DiffusionDPOTrainer`], encodes the `prompts` of every such callback
    together with those of the dataset, before the text encoders are freed, and calls `attach` at the end of its
    `__init__`. In an event, generate with `self.trainer.generate(self.prompts, seed=...)`, **on every process**:
    generation is collective when the policy is sharded, and every process draws the same images.

    Args:
        prompts (`list[str]`, *optional*): The prompts that the callback will generate from.
    """

    def __init__(self, prompts: list[str] | None = None):
        self.prompts = [prompts] if isinstance(prompts, str) else list(prompts or [])
        self._trainer = None

    def _require_prompts(self) -> None:
        if not self.prompts:
            raise ValueError(f"`{type(self).__name__}` needs at least one prompt in `prompts`.")

    @property
    def trainer(self) -> "DiffusionTrainer":
        """The trainer that the callback is attached to."""
        if self._trainer is None:
            raise RuntimeError(
                f"`{type(self).__name__}` is not attached to a trainer. Pass it to `TAPOTrainer(callbacks=[...])` or "
                "`DiffusionDPOTrainer(callbacks=[...])`; `trainer.add_callback` comes too late, because the prompts are "
                "already encoded."
            )
        return self._trainer

    def attach(self, trainer: "DiffusionTrainer") -> None:
        """Called once by the trainer, at the end of its `__init__`."""
        self._trainer = trainer


def check_at_least_one(**values: int) -> None:
    """
    Raises:
        ValueError: if one of the options is less than 1.
    """
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, but it is {value}.")


TAPOCallback = PolicyCallback
