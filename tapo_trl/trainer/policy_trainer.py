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

"""What a trainer of a policy does beside its algorithm: draw samples, save, resume."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model

from ..data.prompts import PromptCache
from ..policies import FlowPolicy
from .generation import generate_samples


TRANSFORMER_FOLDER = "transformer"
LORA_FILE = "pytorch_lora_weights.safetensors"


def save_policy(
    folder: str | Path,
    policy: FlowPolicy,
    model: torch.nn.Module,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """
    Write what was trained in the format that diffusers loads.

    Args:
        folder (`str` or `Path`): where to.
        policy ([`FlowPolicy`]): the model's family.
        model (`torch.nn.Module`): the bare network. With LoRA, `pytorch_lora_weights.safetensors` is written, for
            `load_lora_weights`; otherwise the folder `transformer`, for `from_pretrained(..., subfolder="transformer")`.
        state_dict (`dict[str, torch.Tensor]`, *optional*): its weights, where each process has a part of them only.
    """
    if is_peft_model(model):
        policy.save_lora_weights(folder, model, state_dict)
        return
    if state_dict is not None:
        with torch.device("meta"):
            model = type(model).from_config(model.config)
        model.load_state_dict(state_dict, assign=True)
    model.save_pretrained(Path(folder) / TRANSFORMER_FOLDER)


class PolicyTrainerMixin:
    """
    Put before a Trainer whose model is a policy's network, wrapped in PEFT or trained in full.

    With LoRA, a folder holds PEFT's own files, from which a run resumes, beside those for diffusers.
    """

    policy: FlowPolicy
    latent_shape: tuple[int, ...]
    prompt_cache: PromptCache

    # Samples

    def generate(
        self,
        prompts: list[str],
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int | None = None,
    ) -> torch.Tensor:
        """
        Images or videos of the current policy, by deterministic sampling.

        Args:
            prompts (`list[str]`): prompts that were encoded at the start (of the datasets or of a callback).
            seed (`int`, *optional*, defaults to `0`): prompt i starts from the noise of `seed + i`.
            num_inference_steps (`int`, *optional*): defaults to the configuration's.
            guidance_scale (`float`, *optional*): defaults to the configuration's.
            batch_size (`int`, *optional*): prompts at once. Defaults to `per_device_eval_batch_size`.

        Returns:
            `torch.Tensor` of shape `(len(prompts), 3, height, width)`, or `(len(prompts), 3, num_frames, height, width)`
            for a video policy: in [0, 1], float32, on the CPU.
        """
        args, device = self.args, self.accelerator.device
        with self._eval_mode(), self.accelerator.autocast():
            return generate_samples(
                self.policy,
                self.model,
                prompts,
                lambda batch: self.prompt_cache.load(batch).to(device),
                args.negative_prompt,
                latent_shape=self.latent_shape,
                num_inference_steps=num_inference_steps or args.num_inference_steps,
                guidance_scale=args.guidance_scale if guidance_scale is None else guidance_scale,
                seed=seed,
                batch_size=batch_size or args.per_device_eval_batch_size,
            )

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        """Evaluation mode of the network, without changing what `self.model.training` says to the logs."""
        modules = [module for module in self.model.children() if module.training]
        for module in modules:
            module.eval()
        try:
            yield
        finally:
            for module in modules:
                module.train()

    # Saving and loading

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = Path(output_dir if output_dir is not None else self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        if is_peft_model(model):
            super()._save(str(output_dir), state_dict)
        else:
            output_dir.mkdir(parents=True, exist_ok=True)
            torch.save(self.args, output_dir / "training_args.bin")
        save_policy(output_dir, self.policy, model, state_dict)
        self.create_model_card()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint) / TRANSFORMER_FOLDER
        if not folder.is_dir() or self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        model.load_state_dict(type(model).from_pretrained(folder).state_dict())

    def _load_best_model(self) -> None:
        is_sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if (Path(self.state.best_model_checkpoint) / TRANSFORMER_FOLDER).is_dir() and not is_sharded:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.create_model_card()
        super()._save_checkpoint(model, trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # `Trainer` copies the files it knows into the folder that is pushed; the diffusers LoRA is not among them.
        lora = Path(checkpoint_folder) / LORA_FILE
        if self.is_world_process_zero() and lora.is_file():
            shutil.copy(lora, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)
