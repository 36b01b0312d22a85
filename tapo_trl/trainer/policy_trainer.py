# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What a trainer of a policy does beside its algorithm: hold a reference, log, draw samples, save, resume."""

import copy
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model
from diffusers import ModelMixin
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import TrainingArguments, set_seed
from transformers.utils import logging
from trl.trainer.utils import disable_dropout_in_model

from ..data.prompts import PromptCache
from ..media.tracking import make_config_trackable
from ..networks.speed import compile_blocks
from ..policies import FlowPolicy
from ..policies.loading import pop_dtype
from ..policies.sampling import generate_samples
from .base import autocast_dtype


logger = logging.get_logger(__name__)

TRANSFORMER_FOLDER = "transformer"
FULL_LEARNING_RATE = 1e-5  # which fits full fine-tuning


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


def policy_init_kwargs(args: TrainingArguments, peft_config: PeftConfig | None) -> dict[str, Any]:
    """Loading arguments. A base that LoRA keeps frozen is loaded in the precision it is used in."""
    kwargs = dict(args.model_init_kwargs or {})
    dtype = pop_dtype(kwargs)
    if dtype is None and peft_config is not None:
        dtype = autocast_dtype(args)
    return kwargs | {"torch_dtype": dtype}


def make_trainable(
    policy: FlowPolicy, args: TrainingArguments, peft_config: PeftConfig | None
) -> tuple[ModelMixin | PeftModel, ModelMixin | None]:
    """
    Make a policy's network ready for training.

    Args:
        policy ([`FlowPolicy`]): the policy. Its transformer is changed in place.
        args ([`TAPOConfig`] or [`DiffusionDPOConfig`]): the configuration.
        peft_config ([`~peft.PeftConfig`], *optional*): LoRA configuration. Without it all weights are trained, in float32.

    Returns:
        `tuple`: the network to train, and the frozen copy that is its reference, or `None` if the reference is the
        network without its adapter.
    """
    transformer, ref_model = policy.transformer.requires_grad_(peft_config is None), None
    make_config_trackable(transformer)
    if peft_config is not None:
        if peft_config.target_modules is None:
            peft_config.target_modules = policy.lora_target_modules
        set_seed(args.seed)  # LoRA starts at random
        transformer = get_peft_model(transformer, peft_config)
    else:
        default = next(own.default for own in fields(args) if own.name == "learning_rate")
        if args.learning_rate == default > FULL_LEARNING_RATE:
            logger.warning(
                f"Full fine-tuning with the default `learning_rate={default}`, which is for LoRA: set `learning_rate` to "
                f"{FULL_LEARNING_RATE} or less, or pass a `peft_config`."
            )
        if transformer.dtype != torch.float32:
            logger.warning(
                f"Full fine-tuning: the weights of the transformer are cast from {transformer.dtype} to float32, since most "
                "updates are smaller than what half precision can tell apart."
            )
            transformer.float()
        ref_model = copy.deepcopy(transformer).requires_grad_(False).eval()
    if args.disable_dropout:
        disable_dropout_in_model(transformer)
    compile_blocks(args, [policy.transformer, ref_model])
    # Done: `Trainer` would compile the policy, and not its reference
    args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
    if args.activation_checkpointing:
        policy.transformer.enable_gradient_checkpointing()
        args.activation_checkpointing = False  # done: diffusers models lack the method that Trainer would call
    return transformer, ref_model


class PolicyTrainerMixin:
    """
    Put before a Trainer whose model is a policy's network, wrapped in PEFT or trained in full.

    With LoRA, a folder holds PEFT's own files, from which a run resumes, beside those for diffusers.
    """

    policy: FlowPolicy
    ref_model: torch.nn.Module | None
    latent_shape: tuple[int, ...]
    prompt_cache: PromptCache
    _metrics: dict[str, defaultdict[str, list[torch.Tensor]]]
    _card_options: tuple[str, ...]

    # Reference

    def _place_frozen_models(self) -> None:
        """Bring the VAE and a frozen copy to the accelerator."""
        self.policy.vae.to(self.accelerator.device).requires_grad_(False)
        if self.args.vae_tiling:
            self.policy.vae.enable_tiling()
        if self.args.vae_slicing:
            self.policy.vae.enable_slicing()
        if self.ref_model is not None:
            self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)

    @contextmanager
    def reference(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """The reference network: `model` with its adapter disabled, or the frozen copy."""
        if self.ref_model is not None:
            yield self.ref_model
        else:
            with self.accelerator.unwrap_model(model).disable_adapter():
                yield model

    def _check_start(self, margins: torch.Tensor) -> None:
        """
        Policy and reference are the same at the start, so the rewards of both sides of a pair are, too, and every sigmoid loss
        is ln 2: anything else is a bug upstream.
        """
        if not self.args.self_check or not self._is_untrained:
            return
        losses = F.softplus(-margins.detach())
        if (losses - math.log(2)).abs().max() > 1e-6:
            raise RuntimeError(
                f"The sigmoid loss at the start is {losses.tolist()}, not ln 2 = {math.log(2):.6f}: the policy and the "
                "reference differ before the first update. Does the adapter start from trained weights, or is some "
                "layer (dropout, batch norm) random? Set `self_check=False` if the difference is meant."
            )

    # Logs

    def _record(self, metrics: dict[str, torch.Tensor]) -> None:
        """Keep `metrics` for the next call of `log`, which logs their means."""
        for name, values in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(values)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            logs.update(self._pop_metrics("train"))
        super().log(logs, start_time)

    def _pop_metrics(self, mode: str, only: str | None = None) -> dict[str, float]:
        names = [name for name in sorted(self._metrics[mode]) if only in (None, name)]
        if not names:
            return {}
        values = [torch.cat([v.flatten().float() for v in self._metrics[mode][name]]) for name in names]
        totals = torch.stack([torch.stack([v.sum(), torch.full_like(v.sum(), len(v))]) for v in values])
        sums, counts = self.accelerator.reduce(totals, reduction="sum").T.tolist()
        for name in names:
            del self._metrics[mode][name]
        return {name: total / count for name, total, count in zip(names, sums, counts, strict=True) if count}

    @property
    def _base_model_name(self) -> str:
        return self.policy.name_or_path

    def _method_table(self) -> dict[str, Any]:
        options = {name: getattr(self.args, name) for name in self._card_options}
        return {name: value for name, value in options.items() if value is not None}

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
        prompts = [prompts] if isinstance(prompts, str) else prompts
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
        if is_peft_model(model):  # without what else `Trainer` saves: its arguments, as a pickle
            model.save_pretrained(str(output_dir), state_dict=state_dict)
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
