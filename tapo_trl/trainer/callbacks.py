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

import importlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from accelerate.utils import broadcast
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging

from ..profiling import StageTimer
from ..rewards.scoring import call_reward_function, check_reward_function
from .image_grid import save_overview
from .policy_trainer import save_policy
from .reward_curve import HELD_OUT_REWARD, reward_curve
from .tracking import send_to_tensorboard, send_to_tracker


if TYPE_CHECKING:
    from .diffusion_dpo_trainer import DiffusionDPOTrainer
    from .tapo_trainer import TAPOTrainer


logger = logging.get_logger(__name__)

EMA_FILE = "ema.safetensors"


class PolicyCallback(TrainerCallback):
    """
    Base class of the callbacks that need more than the events of [`~transformers.TrainerCallback`]: the trainer itself,
    and prompts of their own.

    The trainer of a policy, [`TAPOTrainer`] or [`DiffusionDPOTrainer`], encodes the `prompts` of every such callback
    together with those of the data set, before the text encoders leave the memory, and calls `attach` at the end of its
    `__init__`. In an event, generate with `self.trainer.generate(self.prompts, seed=...)`, **on every process**:
    generation is collective when the policy is sharded, and every process draws the same images.

    Args:
        prompts (`list[str]`, *optional*): The prompts that the callback will generate from.
    """

    def __init__(self, prompts: list[str] | None = None):
        self.prompts = [prompts] if isinstance(prompts, str) else list(prompts or [])
        self._trainer = None

    @property
    def trainer(self) -> "TAPOTrainer | DiffusionDPOTrainer":
        """The trainer that the callback is attached to."""
        if self._trainer is None:
            raise RuntimeError(
                f"`{type(self).__name__}` is not attached to a trainer. Pass it to `TAPOTrainer(callbacks=[...])` or "
                "`DiffusionDPOTrainer(callbacks=[...])`; `trainer.add_callback` comes too late, because the prompts are "
                "already encoded."
            )
        return self._trainer

    def attach(self, trainer: "TAPOTrainer | DiffusionDPOTrainer") -> None:
        """Called once by the trainer, at the end of its `__init__`."""
        self._trainer = trainer


TAPOCallback = PolicyCallback


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

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.trainer.model.parameters() if parameter.requires_grad]

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Context manager inside which the policy has the averaged weights. The trained weights come back at its end."""
        if self.ema is None:
            raise RuntimeError("`EMACallback` has no average yet: it starts with `trainer.train()`.")
        parameters = self._parameters()
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        parameters = self._parameters()
        if any(parameter.numel() == 0 or isinstance(parameter, DTensor) for parameter in parameters):
            raise ValueError(
                "`EMACallback` needs whole parameters on every process, but these are partitioned (ZeRO-3 or FSDP). Train "
                "with DDP or ZeRO-2, or without the average."
            )
        self.ema = EMAModel(parameters, decay=self.decay, update_after_step=self.update_after_step)
        self.ema.to(dtype=torch.float32)
        if state.global_step > 0:
            folder = self.resume_from or os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            self._load(Path(folder) / EMA_FILE)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer=None, **kwargs
    ):
        if not optimizer.step_was_skipped:
            self.ema.step(self._parameters())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if state.is_world_process_zero:
            self._save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / EMA_FILE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / "ema"
        folder.mkdir(parents=True, exist_ok=True)
        with self.average_parameters():
            save_policy(folder, self.trainer.policy, self.trainer.model)

    def _save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{index:06d}": tensor.contiguous() for index, tensor in enumerate(self.ema.shadow_params)}
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"optimization_step": json.dumps(self.ema.optimization_step)})
        os.replace(partial, path)

    def _load(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"`EMACallback` cannot resume: there is no `{EMA_FILE}` in {path.parent}. If the checkpoint lies elsewhere, "
                "pass its folder as `resume_from`; if it was made without an average, resume without this callback."
            )
        with safe_open(path, framework="pt") as file:
            saved = [file.get_tensor(name) for name in sorted(file.keys())]
            optimization_step = json.loads(file.metadata()["optimization_step"])
        shapes = [tensor.shape for tensor in self.ema.shadow_params]
        if [tensor.shape for tensor in saved] != shapes:
            raise ValueError(
                f"The average in {path} does not fit the trainable parameters of this run: it was made with another "
                "LoRA configuration or another model."
            )
        for shadow, tensor in zip(self.ema.shadow_params, saved, strict=True):
            shadow.copy_(tensor)
        self.ema.optimization_step = optimization_step


class SampleGridCallback(PolicyCallback):
    """
    Draws the same prompts with the same seeds again and again, so that the run can be watched.

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
        if not self.prompts:
            raise ValueError("`SampleGridCallback` needs at least one prompt in `prompts`.")
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be at least 1, but it is {every_n_steps}.")
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


def detect_reward_hacking(log_history: list[dict], patience: int, min_drop: float) -> bool:
    """
    Decides from the logs of a run whether the policy has begun to exploit its training reward.

    Looks at the checks of [`RewardHackingGuardCallback`] (entries with `guard/held_out_reward`). A check is *bad* when the
    held-out reward lies at least `min_drop` below the best earlier check, while the training reward (the mean of the
    `reward` entries since the previous check) is higher than it was around that best check.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.
        patience (`int`): Number of consecutive bad checks, ending with the last one, that make the verdict.
        min_drop (`float`): Smallest fall of the held-out reward that counts, in its own units.

    Returns:
        `bool`: Whether the last `patience` checks were all bad.
    """
    checks = reward_curve(log_history)
    bad_in_a_row, best = 0, 0
    for index, check in enumerate(checks[1:], start=1):
        at_best = checks[best]
        fell = check.held_out <= at_best.held_out - min_drop
        known = check.training is not None and at_best.training is not None
        rose = known and check.training > at_best.training
        bad_in_a_row = bad_in_a_row + 1 if fell and rose else 0
        if check.held_out > at_best.held_out:
            best = index
    return bad_in_a_row >= patience


class RewardHackingGuardCallback(PolicyCallback):
    """
    Watches a held-out reward that the policy is not trained on, and acts when it falls while the training reward rises.

    Before the first step and every `every_n_steps` optimizer steps the policy draws `prompts` with fixed seeds and
    `reward_fn` scores the images; the mean is logged as `guard/held_out_reward`. See [`detect_reward_hacking`] for the
    verdict. Everything it needs is in the log history, so a resumed run goes on where it stopped.

    Args:
        reward_fn (`Callable[[torch.Tensor, list[str]], torch.Tensor | list[float]]`): Scores images `[B, 3, H, W]`
            (float32 in [0, 1], on the CPU) for their prompts; higher is better.
        prompts (`list[str]`): Prompts to score, best taken from outside the training set.
        every_n_steps (`int`): Number of optimizer steps between two checks. Each check also writes a log entry, whatever
            `args.logging_steps` is, so that it stands beside the training reward of the same steps.
        patience (`int`, *optional*, defaults to `2`): Number of consecutive bad checks before the guard acts.
        min_drop (`float`, *optional*, defaults to `0.0`): Smallest fall below the best value that counts, in the units of
            `reward_fn`. Choose it above the noise of the mean over `prompts`.
        action (`"warn"` or `"stop"`, *optional*, defaults to `"warn"`): What to do.
        seed (`int`, *optional*, defaults to `0`): Seed of the first image; image `i` uses `seed + i`.
    """

    def __init__(
        self,
        reward_fn: Callable[[torch.Tensor, list[str]], torch.Tensor | list[float]],
        prompts: list[str],
        every_n_steps: int,
        patience: int = 2,
        min_drop: float = 0.0,
        action: Literal["warn", "stop"] = "warn",
        seed: int = 0,
    ):
        super().__init__(prompts)
        if not self.prompts:
            raise ValueError("`RewardHackingGuardCallback` needs at least one prompt in `prompts`.")
        for name, value in (("every_n_steps", every_n_steps), ("patience", patience)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, but it is {value}.")
        if min_drop < 0:
            raise ValueError(f"`min_drop` must not be negative, but it is {min_drop}.")
        if action not in ("warn", "stop"):
            raise ValueError(f'`action` must be "warn" or "stop", but it is {action!r}.')
        check_reward_function(reward_fn)
        self.reward_fn = reward_fn
        self.every_n_steps = every_n_steps
        self.patience = patience
        self.min_drop = min_drop
        self.action = action
        self.seed = seed

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step == 0:
            self.trainer.log({HELD_OUT_REWARD: self._held_out_reward().item()})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step % self.every_n_steps == 0:
            self.trainer._metrics["train"][HELD_OUT_REWARD].append(self._held_out_reward())
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if HELD_OUT_REWARD not in logs:
            return
        if not detect_reward_hacking(state.log_history, self.patience, self.min_drop):
            return
        if state.is_world_process_zero:
            logger.warning(
                f"Step {state.global_step}: the held-out reward has fallen to {logs[HELD_OUT_REWARD]:.4g} while the "
                f"training reward rose, for {self.patience} checks in a row: the policy is probably exploiting its reward. "
                + ("Training stops." if self.action == "stop" else 'Pass `action="stop"` to stop training here.')
            )
        if self.action == "stop":
            control.should_training_stop = True

    def _held_out_reward(self) -> torch.Tensor:
        images = self.trainer.generate(self.prompts, seed=self.seed)
        scores = call_reward_function(self.reward_fn, images, self.prompts, noun="image")
        # Every process must come to the same verdict, also when `reward_fn` is not deterministic.
        mean = broadcast(scores.mean().to(self.trainer.accelerator.device))
        if not mean.isfinite():
            raise ValueError(f"`reward_fn` returned a mean of {mean} for the held-out prompts; scores must be finite.")
        return mean
