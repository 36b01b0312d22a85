# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import importlib
import os
from pathlib import Path

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging

from ..media.pictures import save_overview
from ..media.tracking import send_to_tensorboard, send_to_tracker
from .base import PolicyCallback, check_at_least_one
from .ema import EMACallback


logger = logging.get_logger(__name__)


class SampleGridCallback(PolicyCallback):
    """
    Draws samples of the same prompts with the same seeds during training.

    A grid is written to `output_dir/samples/step_XXXXXX.png` before the first step, every `every_n_steps` optimizer steps
    and at the end of training, and sent to those of `"wandb"`, `"tensorboard"` and `"trackio"` that are in
    `args.report_to`. For a video policy the picture is a strip of frames, one row per prompt, and `step_XXXXXX.mp4` beside
    it shows all prompts side by side, at `args.fps`. Two grids differ only by the weights: sample `i` always starts from
    the noise of `seed + i`.

    Args:
        prompts (`list[str]`): Prompts, one cell (or row of frames) each.
        every_n_steps (`int`): Number of optimizer steps between two grids.
        seed (`int`, *optional*, defaults to `0`): Seed of the first cell.
        columns (`int`, *optional*): Number of columns of the grid, or of the videos side by side; the default is about the
            square root of the number of prompts.
        num_inference_steps (`int`, *optional*): Sampling steps; the default is that of training.
        guidance_scale (`float`, *optional*): Guidance scale; the default is that of training.
        ema ([`EMACallback`], *optional*): Draw with its averaged weights. Place it before this callback in `callbacks`.
    """

    def __init__(
        self,
        prompts: list[str],
        every_n_steps: int,
        seed: int = 0,
        columns: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        ema: EMACallback | None = None,
    ):
        super().__init__(prompts)
        self._require_prompts()
        check_at_least_one(every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self.seed = seed
        self.columns = columns
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.ema = ema
        self._last_step: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step == 0:
            self._draw(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step % self.every_n_steps == 0:
            self._draw(args, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self._last_step != state.global_step:
            self._draw(args, state)

    def _generate(self) -> torch.Tensor:
        return self.trainer.generate(
            self.prompts,
            seed=self.seed,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
        )

    def _draw(self, args: TrainingArguments, state: TrainerState) -> None:
        self._last_step = state.global_step
        if self.ema is None:
            samples = self._generate()
        else:
            with self.ema.average_parameters():
                samples = self._generate()
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / f"step_{state.global_step:06d}"
        fps = args.fps if samples.ndim == 5 else None
        picture, video = save_overview(samples, stem, self.columns, fps)
        (folder / "prompts.txt").write_text("\n".join(self.prompts) + "\n", encoding="utf-8")
        if "tensorboard" in args.report_to:
            scalars = next(cb for cb in self.trainer.callback_handler.callbacks if isinstance(cb, TensorBoardCallback))
            # A folder of its own: TensorBoard stops reading an event file once the same folder holds a newer one.
            folder = os.path.join(scalars.logging_dir, "samples")
            send_to_tensorboard(folder, state.global_step, picture, video, fps)
        for name in ("wandb", "trackio"):
            if name in args.report_to:
                file = None if video is None else stem.with_suffix(".mp4")
                send_to_tracker(importlib.import_module(name), state.global_step, picture, file)
