# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..files import atomic_write
from ..policies.saving import save_policy
from ..runs.shards import TrainedWeights, whole_shape
from .base import PolicyCallback


logger = logging.get_logger(__name__)


EMA_FILE = "ema.safetensors"


class EMACallback(PolicyCallback):
    r"""
    Keeps an exponential moving average of the trainable parameters (LoRA matrices, or the transformer).

    After optimizer step \\( k \\): \\( \bar\theta_k = d_k \bar\theta_{k-1} + (1 - d_k) \theta_k \\), in float32, with
    the decay \\( d_k = \min(\mathrm{decay}, k / (9 + k)) \\) and \\( d_1 = 0 \\) of
    [`~diffusers.training_utils.EMAModel`], which lets short runs forget the initial weights.

    The average is saved in every checkpoint (`ema.safetensors`) and restored from it bit for bit. At the end of training
    the averaged weights are written to `output_dir/ema`, in the format of the trained weights.

    Args:
        decay (`float`, *optional*, defaults to `0.999`): Upper bound of the decay, in [0, 1).
        update_after_step (`int`, *optional*, defaults to `0`): Optimizer steps before averaging starts.
        resume_from (`str`, *optional*): Folder of the checkpoint that the run resumes from. Only needed when it is not
            `output_dir/checkpoint-<step>`.

    Example:

    ```python
    ema = EMACallback(decay=0.99)
    trainer = TAPOTrainer(model, reward_model, args, callbacks=[ema])
    trainer.train()
    with ema.average_parameters():
        images = trainer.generate(prompts)
    ```
    """

    def __init__(self, decay: float = 0.999, update_after_step: int = 0, resume_from: str | None = None):
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"`decay` must be in [0, 1), but it is {decay}.")
        if update_after_step < 0:
            raise ValueError(f"`update_after_step` must not be negative, but it is {update_after_step}.")
        self.decay = decay
        self.update_after_step = update_after_step
        self.resume_from = resume_from
        self.ema: EMAModel | None = None

    @property
    def _trained(self) -> TrainedWeights:
        return TrainedWeights(self.trainer)

    def _by_name(self) -> dict[str, torch.Tensor]:
        """The shards of the average by the names of the parameters."""
        return dict(zip(self._trained.parameters, self.ema.shadow_params, strict=True))

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Context manager inside which the policy has the averaged weights. The trained weights come back at its end."""
        if self.ema is None:
            raise RuntimeError("`EMACallback` has no average yet: it starts with `trainer.train()`.")
        with self._trained.replaced_by(self._by_name()):
            yield

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.ema = EMAModel(self._trained.shards.values(), decay=self.decay, update_after_step=self.update_after_step)
        self.ema.to(dtype=torch.float32)
        if state.global_step > 0:
            folder = self.resume_from or os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            self._load(Path(folder) / EMA_FILE)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer=None, **kwargs
    ):
        if not optimizer.step_was_skipped:
            self._step()

    @torch.no_grad()
    def _step(self) -> None:
        """`EMAModel.step`, which would gather parameters under ZeRO-3."""
        self.ema.optimization_step += 1
        decay = self.ema.get_decay(self.ema.optimization_step)
        for average, shard in zip(self.ema.shadow_params, self._trained.shards.values(), strict=True):
            average.sub_((1 - decay) * (average - shard))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        average = list(self._trained.gather(self._by_name()).values())
        if state.is_world_process_zero:
            self._save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / EMA_FILE, average)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        trainer, state_dict = self.trainer, None
        with self.average_parameters():
            if self._trained.are_sharded:
                state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # by all processes
            if state.is_world_process_zero:
                folder = Path(args.output_dir) / "ema"
                folder.mkdir(parents=True, exist_ok=True)
                save_policy(folder, trainer.policy, trainer.accelerator.unwrap_model(trainer.model), state_dict)

    def _save(self, path: Path, average: list[torch.Tensor]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{index:06d}": tensor.contiguous() for index, tensor in enumerate(average)}
        with atomic_write(path) as aside:
            save_file(tensors, aside, metadata={"optimization_step": json.dumps(self.ema.optimization_step)})

    def _load(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"`EMACallback` cannot resume: there is no `{EMA_FILE}` in {path.parent}. If the checkpoint lies elsewhere, "
                "pass its folder as `resume_from`; if it was made without an average, resume without this callback."
            )
        with safe_open(path, framework="pt") as file:
            saved = [file.get_tensor(name) for name in sorted(file.keys())]
            optimization_step = json.loads(file.metadata()["optimization_step"])
        parameters = self._trained.parameters
        shapes = [whole_shape(parameter) for parameter in parameters.values()]
        if [tensor.shape for tensor in saved] != shapes:
            raise ValueError(
                f"The average in {path} does not fit the trainable parameters of this run: it was made with another "
                "LoRA configuration or another model."
            )
        shards = self._trained.split(dict(zip(parameters, saved, strict=True)))
        for shadow, shard in zip(self.ema.shadow_params, shards.values(), strict=True):
            shadow.copy_(shard)
        self.ema.optimization_step = optimization_step
