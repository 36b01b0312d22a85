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

import contextlib
import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from diffusers.training_utils import compute_density_for_timestep_sampling
from peft import LoraConfig
from transformers import EvalPrediction, TrainerCallback, set_seed
from trl import RewardTrainer
from trl.models import get_act_offloading_ctx_manager
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import disable_dropout_in_model

from ..data.preferences import (
    LATENT_COLUMNS,
    ROW_COLUMN,
    TIE,
    PreferencePairCollator,
    check_preference_dataset,
    is_prepared,
    prepare_preference_dataset,
)
from ..data.prompts import PromptCache
from ..losses import slrm_loss
from ..metrics.preference_accuracy import evaluation_noise, pair_accuracies, rule_log_scores, rule_targets
from ..policies import FlowPolicy, load_policy
from ..rewards.slrm import SLRMModel, enhanced_log_score, log_score, score_distance
from ..seeding import seeded_generator
from .base import DiffusionTrainerMixin, check_no_data_parallel, check_writable
from .launch_checks import check_launch, uses_fsdp
from .slrm_config import SLRMConfig
from .tracking import make_config_trackable


class SLRMTrainer(DiffusionTrainerMixin, RewardTrainer):
    r"""
    Trainer for the Score-based Latent Reward Model (SLRM), which rates noisy latents.

    Both sides of a preference pair are noised to one level, x_t = (1 - t) x_0 + t x_1, and rated in one forward; the
    loss is Bradley-Terry on the enhanced scores (Eq. 9).

    Example:

    ```python
    from datasets import load_dataset
    from tapo_trl import SLRMConfig, SLRMTrainer

    trainer = SLRMTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        args=SLRMConfig("sd35-slrm", resolution=512),
        train_dataset=load_dataset("my-name/pairs", split="train"),  # columns: prompt, chosen, rejected
    )
    trainer.train()
    ```

    Args:
        model (`str`, [`~diffusers.DiffusionPipeline`], [`FlowPolicy`] or [`SLRMModel`]):
            - `str`: Hub id or folder of a diffusers pipeline, or of an SLRM, whose training goes on.
            - [`~diffusers.DiffusionPipeline`] or [`FlowPolicy`]: its transformer is copied; it is not trained itself.
            - [`SLRMModel`]: its base model is loaded by the name in its configuration.
        args ([`SLRMConfig`], *optional*):
            Configuration. Defaults to the paper's, with a folder named after the model.
        train_dataset ([`~datasets.Dataset`]):
            Preference pairs with columns `prompt`, `chosen`, `rejected`, and optionally `margin`, `label` and
            `label_<dimension>`, see [`~data.preferences.prepare_preference_dataset`].
        eval_dataset ([`~datasets.Dataset`] or `dict` of those, *optional*):
            Held-out pairs.
        compute_metrics (`Callable`, *optional*):
            Further metrics. `predictions` are the scores of shape `(number of pairs, 2)`, chosen first, averaged over
            `args.eval_sigmas`.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning rate scheduler.
        peft_config ([`~peft.LoraConfig`], *optional*):
            LoRA of the backbone, beside which the score stream is trained in full. `target_modules` defaults to the
            policy's. Without it the whole model is trained.
    """

    _tag_names = ["trl", "slrm"]
    _name = "SLRM"
    _card_metrics = ("accuracy", "eval_")

    def __init__(
        self,
        model: str | DiffusionPipeline | FlowPolicy | SLRMModel,
        args: SLRMConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: LoraConfig | None = None,
    ):
        if args is None:
            args = SLRMConfig(f"{Path(model).name if isinstance(model, str) else 'policy'}-SLRM")

        # Everything that can be wrong and is cheap to find out
        check_writable(args.output_dir)
        check_no_data_parallel(args, "SLRMTrainer")
        _check_sharding(args)
        if train_dataset is None:
            raise ValueError("`train_dataset` is missing: give preference pairs.")
        check_preference_dataset(train_dataset, "train_dataset", args.dimension_weights)
        check_launch(args, len(train_dataset))
        for name, split in _named_splits(eval_dataset).items():
            check_preference_dataset(split, name, args.dimension_weights)

        # Model
        set_seed(args.seed)  # the score stream starts at random
        self.policy, model = _load_model(model, args, peft_config)
        args.height, args.width = args.height or args.resolution, args.width or args.resolution
        if args.max_sequence_length is None:
            args.max_sequence_length = self.policy.max_sequence_length
        self.latent_shape = self.policy.latent_shape(args.height, args.width, args.num_frames)
        recorded = ("rho", "score_link", "velocity_target", "max_sequence_length")
        for name in (*recorded, "resolution", "height", "width", "num_frames"):
            model.register_to_config(**{name: getattr(args, name)})
        make_config_trackable(model)
        if peft_config is not None:
            if peft_config.target_modules is None:
                peft_config.target_modules = self.policy.lora_target_modules
            model.add_lora(peft_config)
        elif not model.config.lora:
            model.float().requires_grad_(True)
        if args.disable_dropout:
            disable_dropout_in_model(model)

        # Data: prompts and pixels are encoded once, then the encoders leave the accelerator
        autocast_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self.prompt_cache = PromptCache(self.policy, args.cache_dir, args.max_sequence_length, autocast_dtype)
        self.policy.move_text_encoders(args.device)
        self.policy.vae.to(args.device)
        if args.vae_tiling:
            self.policy.vae.enable_tiling()
        if args.vae_slicing:
            self.policy.vae.enable_slicing()
        train_dataset = self._prepare_dataset(train_dataset, None, args, "train_dataset")
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: self._prepare_dataset(split, None, args, f"eval_dataset[{name!r}]")
                for name, split in eval_dataset.items()
            }
        elif eval_dataset is not None:
            eval_dataset = self._prepare_dataset(eval_dataset, None, args, "eval_dataset")
        self.policy.move_text_encoders("cpu")
        if args.cache_latents:
            self.policy.vae.to("cpu")

        _BaseTrainer.__init__(
            self,
            model=model,
            args=args,
            data_collator=PreferencePairCollator(),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )

        # What `RewardTrainer.__init__` sets up for its methods
        self.can_return_loss = True
        self.label_names = []
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        if args.activation_offloading:
            self.maybe_activation_offload_context = get_act_offloading_ctx_manager(self.model, warn_if_no_head=False)
        else:
            self.maybe_activation_offload_context = contextlib.nullcontext()

        self.reference = self.policy.transformer
        if "reference" in (args.velocity_target, *args.eval_rules):
            self.reference.to(self.accelerator.device).eval()
        self._add_run_callbacks()

    # Data

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: None, args: SLRMConfig, dataset_name: str
    ) -> Dataset:
        if is_prepared(dataset):
            return dataset
        with args.main_process_first(desc=f"encoding {dataset_name}"):
            self.prompt_cache.encode(dataset["prompt"])
            return prepare_preference_dataset(
                dataset,
                self.policy,
                args.height,
                args.width,
                args.num_frames,
                args.fps,
                dimension_weights=args.dimension_weights,
                skip_bad_files=args.skip_bad_files,
                cache_latents=args.cache_latents,
                cache_dir=args.cache_dir,
                name=dataset_name,
            )

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt", ROW_COLUMN, "label", "margin", "chosen", "rejected", *LATENT_COLUMNS]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if "chosen_latents" not in inputs:
            for column, side in zip(LATENT_COLUMNS, ("chosen", "rejected"), strict=True):
                inputs[column] = self.policy.encode(inputs.pop(side))
        inputs["prompt_embeds"] = self.prompt_cache.load(inputs.pop("prompt")).to(self.accelerator.device)
        return inputs

    # Loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if self.model.training:
            sigma, noise = self._draw_noise(inputs["row"].tolist())
            losses, scores = self._pair_loss(model, inputs, sigma, noise)
        else:
            # The same noise in every evaluation, at each of `eval_sigmas`
            noise = evaluation_noise(inputs["row"].tolist(), self.latent_shape, self.args.seed)
            noise = torch.cat([noise, noise]).to(self.accelerator.device)
            levels = [torch.full_like(inputs["label"], sigma) for sigma in self.args.eval_sigmas]
            results = [self._pair_loss(model, inputs, sigma, noise) for sigma in levels]
            losses, scores = (torch.stack(parts).mean(dim=0) for parts in zip(*results, strict=True))
        loss = losses.mean()
        return (loss, {"rewards": scores}) if return_outputs else loss

    def _draw_noise(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Noise levels `(batch_size,)` and noise `(2 * batch_size, *latent_shape)`, chosen first. They depend on the
        seed, the step and the row of the dataset alone: not on the number of processes, nor on whether the run was
        resumed.
        """
        sigmas, chosen_noise, rejected_noise = [], [], []
        for row in rows:
            generator = seeded_generator("slrm", self.args.seed, self.state.global_step, row)
            if self.args.timestep_sampling == "uniform":
                sigma = torch.rand(1, generator=generator)
            else:
                sigma = compute_density_for_timestep_sampling(
                    "logit_normal", batch_size=1, logit_mean=0.0, logit_std=1.0, generator=generator
                )
            sigmas.append(sigma)
            noise = torch.randn(self.latent_shape, generator=generator)
            chosen_noise.append(noise)
            other = noise if self.args.shared_noise else torch.randn(self.latent_shape, generator=generator)
            rejected_noise.append(other)
        device = self.accelerator.device
        return torch.cat(sigmas).to(device), torch.stack(chosen_noise + rejected_noise).to(device)

    def _pair_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], sigma: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses `(batch_size,)` and scores `(batch_size, 2)` of the pairs at noise levels `sigma`."""
        args, mode = self.args, "train" if self.model.training else "eval"
        labels, embeds = inputs["label"], inputs["prompt_embeds"].repeat(2)

        # Both sides of the pairs in one forward, the chosen ones first
        clean = torch.cat([inputs["chosen_latents"], inputs["rejected_latents"]])
        sigmas = sigma.repeat(2)
        broadcast = sigmas.view(-1, *[1] * (clean.ndim - 1))
        noisy = (1 - broadcast) * clean + broadcast * noise
        velocity = noise - clean
        # By name: DeepSpeed casts what is passed by position to float16, in which noise levels collapse
        output = model(
            latents=noisy,
            sigma=sigmas,
            prompt_embeds=embeds.prompt_embeds,
            pooled_prompt_embeds=embeds.pooled_prompt_embeds,
        )

        # Eq. 7 and 8
        rules = {args.velocity_target} if mode == "train" else {args.velocity_target, *args.eval_rules}
        with self.accelerator.autocast():  # as the model's own forward
            targets = rule_targets(sorted(rules), self.policy, self.reference, noisy, velocity, sigmas, embeds)
        target = targets[args.velocity_target]
        if target is None:
            distance = torch.zeros_like(output.logits)
            scores = log_score(output.logits, args.score_link)
        else:
            distance = score_distance(output.velocity, target)
            enhancing = distance.detach() if args.detach_score else distance
            scores = enhanced_log_score(output.logits, enhancing, sigmas, args.rho, args.score_link)
        chosen, rejected = scores.chunk(2)

        # Eq. 9
        smoothing = torch.where(labels == TIE, TIE, args.label_smoothing)
        losses, metrics = slrm_loss(chosen, rejected, args.eta, inputs.get("margin"), smoothing)
        preservation, _ = score_distance(output.velocity, velocity).chunk(2)  # flow matching on the chosen ones
        losses = losses + args.score_preservation_coef * preservation
        if args.center_rewards_coefficient is not None:
            losses = losses + args.center_rewards_coefficient * (chosen + rejected).square()

        chosen_distance, rejected_distance = distance.chunk(2)
        metrics = {
            "accuracy": pair_accuracies(chosen - rejected, labels),
            "margin": metrics["margin"],
            "score_distance/chosen": chosen_distance,
            "score_distance/rejected": rejected_distance,
            "score_preservation_loss": preservation,
        }
        if mode == "eval":
            rule_scores = rule_log_scores(
                output, sigmas, {rule: targets[rule] for rule in args.eval_rules}, self.model.config
            )
            for rule, values in rule_scores.items():
                margins = torch.sub(*values.chunk(2))
                metrics[f"accuracy_{rule}/sigma_{sigma[0].item():.3g}"] = pair_accuracies(margins, labels)
        self._record(mode, metrics, labels, chosen, rejected)
        return losses, torch.stack([chosen, rejected], dim=1)

    @torch.no_grad()
    def _record(
        self,
        mode: str,
        metrics: dict[str, torch.Tensor],
        labels: torch.Tensor,
        chosen: torch.Tensor,
        rejected: torch.Tensor,
    ) -> None:
        """Append the metrics of each pair, of all processes. Accuracies leave ties out."""
        table = torch.stack([labels, chosen, rejected, *metrics.values()], dim=1)
        labels, chosen, rejected, *columns = self.accelerator.gather_for_metrics(table).unbind(dim=1)
        recorded = self._metrics[mode]
        rewards = torch.cat([chosen, rejected])
        recorded["min_reward"].append(rewards.min().item())
        recorded["mean_reward"].append(rewards.mean().item())
        recorded["max_reward"].append(rewards.max().item())
        for name, values in zip(metrics, columns, strict=True):
            values = values[labels != TIE] if name.startswith("accuracy") else values
            if len(values) > 0:
                recorded[name].extend(values.tolist())

    # Saving and loading

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        self.model.save_pretrained(output_dir)
        self.create_model_card()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self.model.load_trained_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self.model.load_trained_weights(self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # `Trainer` copies the files it knows into the folder that is pushed; these are not among them.
        if self.is_world_process_zero():
            for file in Path(checkpoint_folder).glob("*.safetensors*"):
                shutil.copy(file, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    @property
    def _base_model_name(self) -> str:
        return self.model.config.base_model_name_or_path

    def _method_table(self) -> dict[str, Any]:
        args, config = self.args, self.model.config
        table = {name: config[name] for name in ("num_task_tokens", "task_projection_rank", "lora")}
        names = (
            "score_link",
            "rho",
            "eta",
            "velocity_target",
            "detach_score",
            "score_preservation_coef",
            "timestep_sampling",
            "dimension_weights",
            "height",
            "width",
            "num_frames",
            "learning_rate",
            "num_train_epochs",
            "max_steps",
        )
        return table | {name: getattr(args, name) for name in names}


def _check_sharding(args: SLRMConfig) -> None:
    zero_stage = args.deepspeed_plugin.zero_stage if args.deepspeed_plugin is not None else 0
    if uses_fsdp(args) or zero_stage == 3:
        raise ValueError(
            "`SLRMTrainer` cannot save weights that are sharded over processes: use DDP or DeepSpeed ZeRO stage 1 or 2 "
            "instead of FSDP or ZeRO stage 3."
        )


def _named_splits(eval_dataset: Dataset | dict[str, Dataset] | None) -> dict[str, Dataset]:
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{name!r}]": split for name, split in eval_dataset.items()}
    return {} if eval_dataset is None else {"eval_dataset": eval_dataset}


def _load_model(
    model: str | DiffusionPipeline | FlowPolicy | SLRMModel, args: SLRMConfig, peft_config: LoraConfig | None
) -> tuple[FlowPolicy, SLRMModel]:
    """The base policy and the SLRM to train."""
    init_kwargs = dict(args.model_init_kwargs or {})
    dtype = init_kwargs.pop("torch_dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    if dtype is None and peft_config is not None:
        # A base that LoRA keeps frozen is loaded in the precision it is used in
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None

    if isinstance(model, str) and _is_slrm(model):
        model = SLRMModel.from_pretrained(model, torch_dtype=dtype)
    if isinstance(model, SLRMModel):
        if not model.config.base_model_name_or_path:
            raise ValueError(
                "The SLRM was made from a pipeline in memory, so its base model cannot be loaded: pass the pipeline or "
                "the policy as `model`, with `num_task_tokens` and `task_projection_rank` in `args`."
            )
        policy = load_policy(model.config.base_model_name_or_path, torch_dtype=dtype, **init_kwargs)
        model.check_compatible(policy)
        return policy, model

    policy = load_policy(model, torch_dtype=dtype, **init_kwargs)
    slrm = SLRMModel.from_policy(
        policy, num_task_tokens=args.num_task_tokens, task_projection_rank=args.task_projection_rank
    )
    return policy, slrm


def _is_slrm(name_or_path: str) -> bool:
    """Whether a folder or a repository on the Hub holds an SLRM rather than a pipeline."""
    if os.path.isdir(name_or_path):
        return not os.path.exists(os.path.join(name_or_path, DiffusionPipeline.config_name))
    try:
        DiffusionPipeline.load_config(name_or_path)
    except OSError:
        return True
    return False
