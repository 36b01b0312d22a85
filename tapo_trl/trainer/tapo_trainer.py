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

import copy
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset, load_dataset
from diffusers import DiffusionPipeline
from peft import PeftConfig, get_peft_model
from torch.utils.data import Sampler
from transformers import TrainerCallback, set_seed
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import RepeatSampler, disable_dropout_in_model, identity

from ..data.prompts import ROW_COLUMN, PromptCache, default_prompts, prepare_prompts
from ..losses import tapo_loss
from ..policies import FlowPolicy, load_policy
from ..rewards.scoring import WeightedReward
from ..rollouts import TAPOSampler, TrajectoryPairs, TransitionPairs
from ..schedulers import gaussian_kl, sde_step_indices
from ..seeding import seeded_generator
from .base import DiffusionTrainerMixin, check_no_data_parallel, check_writable, whole_weights
from .callbacks import TAPOCallback
from .launch_checks import check_launch
from .model_card import TAPO_OPTIONS
from .policy_trainer import PolicyTrainerMixin
from .reward_loading import RewardModel, check_rewards, load_reward, place_reward
from .tapo_config import TAPOConfig
from .tapo_metrics import rollout_metrics, transition_metrics
from .tracking import make_config_trackable


class TAPOTrainer(PolicyTrainerMixin, DiffusionTrainerMixin, _BaseTrainer):
    r"""
    Trainer for Trajectory Advantages Preference Optimization (TAPO).

    Every step grows a winning and a losing trajectory for each prompt, keeping the best and the worst of P stochastic
    candidates at n of the T sampling steps (Algorithm 1), and trains on those pairs with a step-wise DPO loss (Eq. 13).

    Example:

    ```python
    from tapo_trl import TAPOConfig, TAPOTrainer

    trainer = TAPOTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward_model="my-name/sd35-slrm",
        args=TAPOConfig(output_dir="sd35-tapo"),
    )
    trainer.train()
    ```

    Args:
        model (`str`, [`~diffusers.DiffusionPipeline`] or [`FlowPolicy`]):
            Hub id or folder of a pipeline, a pipeline, or a policy.
        reward_model (`str`, [`SLRMModel`], `Callable` or a `list` of those):
            - `str`: Hub id or folder of an [`SLRMModel`].
            - [`SLRMModel`]: scores the noisy latents.
            - `Callable`: `f(images, prompts, **columns) -> scores`, with images as a float tensor in [0, 1] of shape
              `(N, 3, height, width)`, or `(N, 3, num_frames, height, width)` for video. It is applied to the decoded
              one-step estimate of the clean sample.
            - `list`: a weighted sum of them, see `args.reward_weights`.
        args ([`TAPOConfig`], *optional*):
            Configuration. Defaults to the paper's, with a folder named after the model.
        train_dataset ([`~datasets.Dataset`], *optional*):
            Prompts, in the column `prompt`. Other columns are passed to reward callables. Defaults to
            `args.dataset_name`, else to the prompts that ship with the package.
        eval_dataset ([`~datasets.Dataset`] or `dict` of those, *optional*):
            Held-out prompts.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Callbacks. Those that are a [`TAPOCallback`] get the trainer and have their prompts encoded.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning rate scheduler.
        peft_config ([`~peft.PeftConfig`], *optional*):
            LoRA configuration. `target_modules` defaults to the policy's. Without it the transformer is fully
            fine-tuned and a frozen copy of it is the reference.
    """

    loss_is_scaled_for_ga = False  # the Trainer divides by the accumulation steps
    _tag_names = ["trl", "tapo"]
    _name = "TAPO"
    _card_metrics = ("reward", "eval_", "kl")

    def __init__(
        self,
        model: str | DiffusionPipeline | FlowPolicy,
        reward_model: RewardModel | list[RewardModel],
        args: TAPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        if args is None:
            args = TAPOConfig(f"{Path(model).name if isinstance(model, str) else 'policy'}-TAPO")
        check_writable(args.output_dir)
        check_no_data_parallel(args, "TAPOTrainer")
        reward_models = list(reward_model) if isinstance(reward_model, (list, tuple)) else [reward_model]
        check_rewards(reward_models, args)

        # Data
        if train_dataset is None:
            train_dataset = (
                default_prompts()
                if args.dataset_name is None
                else load_dataset(args.dataset_name, split=args.dataset_split)
            )
        train_dataset = prepare_prompts(train_dataset, "train_dataset")
        check_launch(args, len(train_dataset))
        global_batch_size = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        if args.num_iterations > 1 and len(train_dataset) < global_batch_size:
            raise ValueError(
                f"With `num_iterations={args.num_iterations}` the train dataset needs at least one whole batch of "
                f"{global_batch_size} prompts, but has {len(train_dataset)}."
            )
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: prepare_prompts(split, f"eval_dataset[{name!r}]") for name, split in eval_dataset.items()
            }
        elif eval_dataset is not None:
            eval_dataset = prepare_prompts(eval_dataset, "eval_dataset")

        # Policy
        with whole_weights(args):
            self.policy = load_policy(model, **_model_init_kwargs(args, peft_config))
        args.height, args.width = args.height or args.resolution, args.width or args.resolution
        self.latent_shape = self.policy.latent_shape(args.height, args.width, args.num_frames)
        if args.max_sequence_length is None:
            args.max_sequence_length = self.policy.max_sequence_length
        offload = self.policy.modality == "video" if args.offload_transitions is None else args.offload_transitions
        with whole_weights(args):
            rewards = [load_reward(reward, self.policy, args) for reward in reward_models]
        self.reward = WeightedReward(rewards, args.reward_weights)

        transformer = self.policy.transformer.requires_grad_(peft_config is None)
        make_config_trackable(transformer)
        if peft_config is not None:
            if args.sync_ref_model:
                raise ValueError("`sync_ref_model=True` needs full fine-tuning: with LoRA the base is the reference.")
            if peft_config.target_modules is None:
                peft_config.target_modules = self.policy.lora_target_modules
            set_seed(args.seed)  # LoRA starts at random
            transformer = get_peft_model(transformer, peft_config)
            self.ref_model = None
        else:
            if args.fp16 and transformer.dtype == torch.float16:
                raise ValueError(
                    "`fp16=True` with full fine-tuning needs float32 weights: load `model` without `torch_dtype`, or "
                    "pass a `peft_config`."
                )
            self.ref_model = copy.deepcopy(transformer).requires_grad_(False).eval()
        if args.disable_dropout:
            disable_dropout_in_model(transformer)
        if args.activation_checkpointing:
            self.policy.transformer.enable_gradient_checkpointing()
            args.activation_checkpointing = False  # done: diffusers models lack the method that Trainer would call

        # Prompts are encoded once, then the text encoders leave the memory
        callbacks = list(callbacks or [])
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self.prompt_cache = PromptCache(self.policy, args.cache_dir, args.max_sequence_length, dtype)
        with args.main_process_first(desc="encoding prompts"):
            self.policy.move_text_encoders(args.device)
            splits = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
            prompts = [args.negative_prompt, *train_dataset["prompt"]]
            prompts += [prompt for split in splits if split is not None for prompt in split["prompt"]]
            prompts += [prompt for cb in callbacks if isinstance(cb, TAPOCallback) for prompt in cb.prompts]
            self.prompt_cache.encode(prompts)
        self.policy.unload_text_encoders()

        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._buffer: list[tuple[list[int], TrajectoryPairs]] = []
        self._buffer_step, self._slot = -1, 0

        super().__init__(
            model=transformer,
            args=args,
            data_collator=identity,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.can_return_loss = True

        device = self.accelerator.device
        self.policy.vae.to(device).requires_grad_(False)
        if args.vae_tiling:
            self.policy.vae.enable_tiling()
        if args.vae_slicing:
            self.policy.vae.enable_slicing()
        for reward in self.reward.rewards:
            place_reward(reward, args)
        if self.ref_model is not None:
            self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)
        if args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))

        self.scheduler = self.policy.build_scheduler(
            args.num_inference_steps,
            self.latent_shape,
            device,
            noise_level=args.noise_level,
            sde_type=args.sde_type,
            logprob_reduction=args.logprob_reduction,
        )
        self.step_indices = sde_step_indices(args.num_inference_steps, args.num_sde_steps, args.t_init)
        self.step_weights = self._step_weights()
        self.sampler = TAPOSampler(
            policy=self.policy,
            scheduler=self.scheduler,
            step_indices=self.step_indices,
            num_candidates=args.num_candidates,
            reward=self.reward,
            latent_shape=self.latent_shape,
            guidance_scale=args.guidance_scale,
            reference=self.reference,
            score_batch_size=args.score_batch_size,
            store_on="cpu" if offload else None,
            show_progress=self.is_world_process_zero() and not args.disable_tqdm,
        )
        self.negative_prompt_embeds = self.prompt_cache.load([args.negative_prompt]).to(device)
        for callback in callbacks:
            if isinstance(callback, TAPOCallback):
                callback.attach(self)
        self._add_run_callbacks(stop_every_n_steps=args.num_iterations)

    def _step_weights(self) -> torch.Tensor:
        """Weight of each of the T steps in the loss, `step_weighting`, with mean 1 over the stochastic ones."""
        weights = torch.ones(self.args.num_inference_steps)
        if self.args.step_weighting == "velocity":
            # The mean of a step is linear in the velocity: the log-ratio's gradient is its slope over the std.
            steps = torch.tensor(self.step_indices)
            zeros = torch.zeros(len(steps), 1, device=self.accelerator.device)
            offset, std = self.scheduler.sde_mean_std(zeros, zeros, steps)
            slope = self.scheduler.sde_mean_std(zeros, zeros + 1, steps)[0] - offset
            inverse = (std / slope.abs()).flatten().cpu()
            weights[steps] = inverse / inverse.mean()
        return weights

    # Rollout: Algorithm 1, lines 2-13

    def training_step(
        self, model: torch.nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        model.train()  # from here on metrics are those of the training
        pairs = self._pairs_of_step(inputs)
        chunk_size = self.args.transition_batch_size or self.args.per_device_train_batch_size
        num_chunks = math.ceil(pairs.num_pairs / chunk_size)
        loss = torch.zeros((), device=self.accelerator.device)
        ends_accumulation = self.accelerator.sync_gradients
        for index, chunk in enumerate(pairs.transitions(chunk_size)):
            # Only the last backward of an optimiser step shares gradients, and makes DeepSpeed update: it does so in the
            # backward itself, after every one that it takes for the last.
            is_last = ends_accumulation and index == num_chunks - 1
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            shares = is_last or self.accelerator.distributed_type == DistributedType.DEEPSPEED
            with nullcontext() if shares else self.accelerator.no_sync(model):
                loss += super().training_step(model, chunk, num_items_in_batch)
        self.accelerator.gradient_state._set_sync_gradients(ends_accumulation)
        return loss

    def _pairs_of_step(self, batch: list[dict[str, Any]]) -> TrajectoryPairs:
        """A new rollout, or the stored one of this batch when `num_iterations` uses it again."""
        step = self.state.global_step
        if step != self._buffer_step:
            self._buffer_step, self._slot = step, 0
            if step % self.args.num_iterations == 0:
                self._buffer = []
        slot, self._slot = self._slot, self._slot + 1

        rows = [example[ROW_COLUMN] for example in batch]
        if slot == len(self._buffer):
            pairs = self._generate_and_score_trajectories(batch, seed_step=step)
            self._buffer.append((rows, pairs))
        stored_rows, pairs = self._buffer[slot]
        if stored_rows != rows:
            raise RuntimeError(f"The rollout of rows {stored_rows} is up for reuse, but the batch has rows {rows}.")
        return pairs

    def _generate_and_score_trajectories(self, batch: list[dict[str, Any]], seed_step: int) -> TrajectoryPairs:
        device = self.accelerator.device
        prompts = [example["prompt"] for example in batch]
        columns = {
            name: [example[name] for example in batch] for name in batch[0] if name not in ("prompt", ROW_COLUMN)
        }
        generators = [seeded_generator("tapo", self.args.seed, seed_step, example[ROW_COLUMN]) for example in batch]
        with self._eval_mode(), self.accelerator.autocast():
            pairs = self.sampler.sample(
                self.model,
                prompts,
                self.prompt_cache.load(prompts).to(device),
                self.negative_prompt_embeds,
                generators,
                columns,
            )
        self._record(rollout_metrics(pairs))
        return pairs

    @contextmanager
    def reference(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """The reference network: `model` with its adapter disabled, or the frozen copy."""
        if self.ref_model is not None:
            yield self.ref_model
        else:
            with self.accelerator.unwrap_model(model).disable_adapter():
                yield model

    # Loss: Eq. 13

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: TransitionPairs,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        inputs = inputs.to(self.accelerator.device)
        latents, next_latents = inputs.latents.flatten(0, 1), inputs.next_latents.flatten(0, 1)
        indices = inputs.step_indices.repeat(2)
        embeds = inputs.prompt_embeds.repeat(2)
        sigma = self.scheduler.sigma(indices.to(self.scheduler.sigmas.device))
        guidance_scale = self.args.guidance_scale if self.args.train_cfg else 1.0
        arguments = (latents, sigma, embeds, self.negative_prompt_embeds, guidance_scale)

        # [win; lose] in one forward each
        velocity = self.policy.velocity(model, *arguments)
        with torch.no_grad(), self.reference(self.model) as reference:
            ref_velocity = self.policy.velocity(reference, *arguments)

        mean, std = self.scheduler.sde_mean_std(latents, velocity, indices)
        ref_mean, _ = self.scheduler.sde_mean_std(latents, ref_velocity, indices)
        chosen_log_ratios, rejected_log_ratios = self.scheduler.log_ratio(next_latents, mean, ref_mean, std).chunk(2)
        losses, metrics = tapo_loss(
            chosen_log_ratios,
            rejected_log_ratios,
            beta=self.args.beta,
            loss_type=self.args.loss_type,
            label_smoothing=self.args.label_smoothing,
            ratio_clip=self.args.ratio_clip,
        )
        self._check_start(losses)
        kl = gaussian_kl(mean.detach(), ref_mean, std, self.args.logprob_reduction).view(2, -1).mean(0)
        self._record(transition_metrics(inputs.step_indices, losses, metrics | {"kl": kl}))

        weights = self.step_weights[inputs.step_indices].to(losses.device)
        loss = (weights * losses).mean() * inputs.share
        return (loss, metrics) if return_outputs else loss

    def _check_start(self, losses: torch.Tensor) -> None:
        """Policy and reference are the same at the start, so every loss is ln 2: anything else is a bug upstream."""
        if not self.args.self_check or not self.model.training or self.state.global_step > 0:
            return
        if self.args.loss_type == "sigmoid" and (losses.detach() - math.log(2)).abs().max() > 1e-6:
            raise RuntimeError(
                f"The loss at the start is {losses.detach().tolist()}, not ln 2 = {math.log(2):.6f}: the policy and the "
                "reference differ before the first update. Does the adapter start from trained weights, or is some "
                "layer (dropout, batch norm) random? Set `self_check=False` if the difference is meant."
            )

    # Trainer hooks

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = self.train_dataset.column_names

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        if self.args.num_iterations == 1:
            return super()._get_train_sampler(dataset)
        return RepeatSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=1,
            batch_size=self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps,
            repeat_count=self.args.num_iterations,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: list[dict[str, Any]],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Loss and rewards on held-out prompts, from the same noise at every evaluation."""
        pairs = self._generate_and_score_trajectories(inputs, seed_step=-1)
        chunk_size = self.args.transition_batch_size or self.args.per_device_eval_batch_size
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = [self.compute_loss(model, chunk) for chunk in pairs.transitions(chunk_size)]
        return torch.stack(losses).sum(), None, None

    def _record(self, metrics: dict[str, torch.Tensor]) -> None:
        """Keep `metrics` for the next call of `log`, which logs their means."""
        for name, values in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(values)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        names = sorted(self._metrics[mode])
        if names:
            means = torch.stack([torch.cat([v.flatten() for v in self._metrics[mode][n]]).mean() for n in names])
            means = self.accelerator.reduce(means, reduction="mean").tolist()
            prefix = "eval_" if mode == "eval" else ""
            logs.update({f"{prefix}{name}": mean for name, mean in zip(names, means, strict=True)})
        super().log(logs, start_time)
        self._metrics[mode].clear()

    @property
    def _base_model_name(self) -> str:
        return self.policy.name_or_path

    def _method_table(self) -> dict[str, Any]:
        options = {name: getattr(self.args, name) for name in TAPO_OPTIONS}
        return {name: value for name, value in options.items() if value is not None}


def _model_init_kwargs(args: TAPOConfig, peft_config: PeftConfig | None) -> dict[str, Any]:
    """Loading arguments. A base that LoRA keeps frozen is loaded in the precision it is used in."""
    kwargs = dict(args.model_init_kwargs or {})
    dtype: str | torch.dtype | None = kwargs.pop("torch_dtype", None)
    if dtype is None and peft_config is not None:
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return kwargs | {"torch_dtype": dtype}
