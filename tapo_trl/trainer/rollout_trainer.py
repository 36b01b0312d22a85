# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What every trainer that draws samples while it trains has in common: [`RolloutTrainer`]."""

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset, load_dataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback
from transformers.utils import logging
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import identity

from ..callbacks.base import PolicyCallback
from ..callbacks.profile import ProfileCallback
from ..data.prompts import ROW_COLUMN, PromptCache, default_prompts, prepare_prompts
from ..networks.speed import check_speed_options, shrink_and_speed_up
from ..policies import FlowPolicy, PromptEmbeddings, load_policy
from ..policies.lora import check_no_adapter, check_peft_config
from ..profiling import StageTimer
from ..rewards.scoring import PixelReward, WeightedReward
from ..rollouts import Rollout, RolloutSampler, Transitions
from ..rollouts.metrics import metrics_of_steps
from ..rollouts.reuse import EpochRepeatSampler, load_rollouts, save_rollouts
from ..runs.hub import check_hub_strategy
from ..runs.launch_checks import check_launch
from ..runs.nonfinite import Watched
from ..runs.option_checks import check_arguments_of_trainer
from ..seeding import seeded_generator
from .base import (
    DiffusionTrainerMixin,
    autocast_dtype,
    check_folders,
    check_no_data_parallel,
    check_precision,
    fill_in_sizes,
    release_text_encoders,
    whole_weights,
)
from .policy_trainer import PolicyTrainerMixin, make_trainable, policy_init_kwargs
from .reward_loading import (
    RewardModel,
    TieCallback,
    check_reward_functions,
    check_rewards,
    check_sharing,
    load_reward,
    place_rewards,
)
from .rollout_config import RolloutConfig


logger = logging.get_logger(__name__)

REFERENCE_FOLDER = "reference"


class RolloutTrainer(PolicyTrainerMixin, DiffusionTrainerMixin, _BaseTrainer):
    """
    A trainer of a policy that draws samples of prompts, has a reward score them, and trains on what came of it.

    Every step makes a rollout, or uses the last one again, and goes through its examples in chunks, with a backward pass
    each. A subclass says how a rollout is made ([`~RolloutTrainer.build_sampler`]) and what the loss of its examples is
    ([`~RolloutTrainer.transition_losses`]), and what is logged of both.

    Args:
        model (`str`, [`~diffusers.DiffusionPipeline`] or [`FlowPolicy`]):
            Hub id or folder of a pipeline, a pipeline, or a policy.
        reward_model (`str`, [`StepRewardModel`], `Callable` or a `list` of those):
            See [`TAPOTrainer`].
        args ([`RolloutConfig`], *optional*):
            Configuration. Defaults to one with a folder named after the model.
        train_dataset ([`~datasets.Dataset`], *optional*):
            Prompts, in the column `prompt`. Other columns are passed to reward callables. Defaults to
            `args.dataset_name`, else to the prompts that ship with the package.
        eval_dataset ([`~datasets.Dataset`] or `dict` of those, *optional*):
            Held-out prompts.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Callbacks. Those that are a [`PolicyCallback`] get the trainer and have their prompts encoded.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning rate scheduler.
        peft_config ([`~peft.PeftConfig`], *optional*):
            LoRA configuration. `target_modules` defaults to the policy's. Without it the transformer is fully
            fine-tuned, in float32 whatever precision it comes in, and a frozen copy of it is the reference.
    """

    loss_is_scaled_for_ga = False  # the Trainer divides by the accumulation steps
    config_class: type[RolloutConfig]
    _seed_name: str  # what rollouts are seeded with, beside the seed, the step and the row

    def __init__(
        self,
        model: str | DiffusionPipeline | FlowPolicy,
        reward_model: RewardModel | list[RewardModel],
        args: RolloutConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        if args is None:
            args = self.config_class(f"{Path(model).name if isinstance(model, str) else 'policy'}-{self._name}")
        check_folders(args)
        check_no_data_parallel(args, type(self).__name__)
        check_hub_strategy(args)
        check_arguments_of_trainer(args, model)
        check_precision(args)
        reward_models = list(reward_model) if isinstance(reward_model, (list, tuple)) else [reward_model]
        check_rewards(reward_models, args)
        check_sharing(reward_models, args, peft_config)
        if args.sync_ref_model and peft_config is not None:
            raise ValueError("`sync_ref_model=True` needs full fine-tuning: with LoRA the base is the reference.")
        check_peft_config(peft_config)
        check_speed_options(args, peft_config)

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

        splits = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        check_reward_functions(reward_models, [train_dataset, *splits.values()])

        # Policy
        with whole_weights(args):
            self.policy = load_policy(model, **policy_init_kwargs(args, peft_config))
        check_precision(args, self.policy)
        check_no_adapter(self.policy)
        self.latent_shape = fill_in_sizes(args, self.policy)
        with whole_weights(args):
            rewards = [load_reward(reward, self.policy, args) for reward in reward_models]
        self.reward = WeightedReward(rewards, args.reward_weights)

        transformer, self.ref_model = make_trainable(self.policy, args, peft_config)
        shrink_and_speed_up(self.policy, self.ref_model, rewards, args)

        # Prompts are encoded once, then the text encoders leave the accelerator
        callbacks = list(callbacks or [])
        self.prompt_cache = PromptCache(self.policy, args.cache_dir, args.max_sequence_length, autocast_dtype(args))
        self.timer = StageTimer(args.profile, args.device)
        with self.timer.stage("encode prompts"), args.main_process_first(desc="encoding prompts"):
            self.policy.move_text_encoders(args.device)
            splits = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
            prompts = [args.negative_prompt, *train_dataset["prompt"]]
            prompts += [prompt for split in splits if split is not None for prompt in split["prompt"]]
            prompts += [prompt for cb in callbacks if isinstance(cb, PolicyCallback) for prompt in cb.prompts]
            self.prompt_cache.encode(prompts)
        release_text_encoders(model, self.policy)

        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._buffer: list[tuple[list[int], Rollout]] = []
        self._buffer_step, self._slot = -1, 0
        self._batches: list[list[dict[str, Any]]] = []  # of the update
        self._chunk_prompts: list[str] = []
        self._chunk_counts: torch.Tensor | None = None  # all of its examples do

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
        self.dataset_name = args.dataset_name

        device = self.accelerator.device
        self._place_frozen_models()
        place_rewards(self.reward.rewards, self.policy, args)
        if args.share_backbone:
            self.add_callback(TieCallback(self.reward.rewards, self.policy))
        if args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))

        offload = self.policy.modality == "video" if args.offload_transitions is None else args.offload_transitions
        self.sampler = self.build_sampler(
            policy=self.policy,
            reward=self.reward,
            latent_shape=self.latent_shape,
            guidance_scale=args.guidance_scale,
            store_on="cpu" if offload else None,
            show_progress=self.is_world_process_zero() and not args.disable_tqdm,
            timer=self.timer,
        )
        self.negative_prompt_embeds = self.prompt_cache.load([args.negative_prompt]).to(device)
        for callback in callbacks:
            if isinstance(callback, PolicyCallback):
                callback.attach(self)
        if args.profile:
            self.add_callback(ProfileCallback(self.timer))
        self._add_run_callbacks(stop_every_n_steps=args.num_iterations)

    # What a method consists of

    @abstractmethod
    def build_sampler(self, **kwargs) -> RolloutSampler:
        """
        Make what draws samples, and whatever else of the schedule the loss needs. Called once the accelerator is known.

        Args:
            kwargs: what all samplers take, but for the scheduler, see [`~rollouts.sampler.RolloutSampler`].
        """

    @abstractmethod
    def transition_losses(
        self, model: torch.nn.Module, inputs: Transitions
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """
        Losses of examples. Nothing is logged, and the trainer stays as it is.

        Args:
            model (`torch.nn.Module`): the policy's network.
            inputs ([`~rollouts.rollout.Transitions`]): the examples, on the device of the training.

        Returns:
            `tuple`: losses of shape `(num_examples,)`; the same with all that the training loss adds, such as weights;
            and metrics of shape `(num_examples,)` each.
        """

    @abstractmethod
    def rollout_metrics(self, rollout: Rollout) -> dict[str, torch.Tensor]:
        """What is logged of a rollout, of shape `(B,)` each."""

    def step_metrics(self, losses: torch.Tensor, metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is logged of each step on its own, as `step_XX/...`, of what [`~RolloutTrainer.transition_losses`] returned."""
        return {}

    @abstractmethod
    def check_before_first_update(self, losses: torch.Tensor, metrics: dict[str, torch.Tensor]) -> None:
        """Called with what [`~RolloutTrainer.transition_losses`] returned, to find bugs while the policy is untrained."""

    # Rollouts

    def training_step(
        self, model: torch.nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        model.train()  # from here on metrics are those of the training
        rollout = self._rollout_of_step(inputs)
        prompts = [example["prompt"] for example in inputs]
        self.nonfinite_guard.watch(rollout.rewards, partial(rollout.describe_reward, prompts), prompts)
        chunk_size = self.args.transition_batch_size or self.args.per_device_train_batch_size
        num_chunks = math.ceil(rollout.num_examples / chunk_size)
        loss = torch.zeros((), device=self.accelerator.device)
        ends_accumulation = self.accelerator.sync_gradients
        for index, chunk in enumerate(self._chunks(rollout, prompts, chunk_size)):
            # Only the last backward of an optimiser step shares gradients, and makes DeepSpeed update: it does so in the
            # backward itself, after every one that it takes for the last.
            is_last = ends_accumulation and index == num_chunks - 1
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            shares = is_last or self.accelerator.distributed_type == DistributedType.DEEPSPEED
            synchronisation = nullcontext() if shares else self.accelerator.no_sync(model)
            with self.timer.stage("loss and backward"), synchronisation:
                loss += super().training_step(model, chunk, num_items_in_batch)
        self.accelerator.gradient_state._set_sync_gradients(ends_accumulation)
        return loss

    def _chunks(self, rollout: Rollout, prompts: list[str], chunk_size: int) -> Iterator[Transitions]:
        """Examples in chunks; `_chunk_prompts` and `_chunk_counts` are those of the current one's examples."""
        num_real = len(prompts) if self.model.training else self._num_real_rows(len(prompts))
        rows = (torch.arange(rollout.num_examples) % len(prompts)).split(chunk_size)
        is_used_again = self.model.training and self.args.num_iterations > 1
        for chunk, in_chunk in zip(rollout.transitions(chunk_size, keep_reference=is_used_again), rows, strict=True):
            self._chunk_prompts, self._chunk_counts = [prompts[row] for row in in_chunk], in_chunk < num_real
            yield chunk
        self._chunk_prompts, self._chunk_counts = [], None

    def _rollout_of_step(self, batch: list[dict[str, Any]]) -> Rollout:
        """A new rollout, or the stored one of this batch when `num_iterations` uses it again."""
        step = self.state.global_step
        if step != self._buffer_step:
            self._buffer_step, self._slot = step, 0
            if step % self.args.num_iterations == 0:
                self._buffer = []
            elif not self._buffer:
                process, device = self.args.process_index, self.accelerator.device
                self._buffer = load_rollouts(self._resumed_from, process, device)
            if self.args.sync_ref_model and step % self.args.ref_model_sync_steps == 0:
                for _, rollout in self._buffer:
                    rollout.ref_velocities = None  # those of the reference before it was synchronised
        slot, self._slot = self._slot, self._slot + 1

        rows = [example[ROW_COLUMN] for example in batch]
        if slot == len(self._buffer):
            starts_update = slot == 0 and any(batch is first for first in self._batches[:1])
            self._generate(self._batches if starts_update else [batch], seed_step=step)
        stored_rows, rollout = self._buffer[slot]
        if stored_rows != rows:
            raise RuntimeError(f"The rollout of rows {stored_rows} is up for reuse, but the batch has rows {rows}.")
        return rollout

    def get_batch_samples(self, *args, **kwargs) -> tuple[list[list[dict[str, Any]]], Any]:
        self._batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        return self._batches, num_items_in_batch

    def _generate(self, batches: list[list[dict[str, Any]]], seed_step: int) -> None:
        """
        Make the rollouts of all batches of an update, and scale the weights of their examples, which go to the CPU, so that
        the loss is the mean over those that count, of all processes.
        """
        rollouts = [self._generate_and_score_trajectories(batch, seed_step) for batch in batches]
        totals = [torch.tensor([rollout.weights.sum(), rollout.num_examples]) for rollout in rollouts]
        totals = torch.stack(totals).sum(0).to(self.accelerator.device)
        count, number = self.accelerator.reduce(totals, reduction="sum").tolist()
        for batch, rollout in zip(batches, rollouts, strict=True):
            rollout.weights = rollout.weights.cpu() * (number / count if count else 1.0)
            self._buffer.append(([example[ROW_COLUMN] for example in batch], rollout))

    def _generate_and_score_trajectories(self, batch: list[dict[str, Any]], seed_step: int) -> Rollout:
        device = self.accelerator.device
        prompts = [example["prompt"] for example in batch]
        columns = {
            name: [example[name] for example in batch] for name in batch[0] if name not in ("prompt", ROW_COLUMN)
        }
        generators = [
            seeded_generator(self._seed_name, self.args.seed, seed_step, example[ROW_COLUMN]) for example in batch
        ]
        with self.timer.stage("rollout"), self._eval_mode(), self.accelerator.autocast():
            rollout = self.sampler.sample(
                self.model,
                prompts,
                self.prompt_cache.load(prompts).to(device),
                self.negative_prompt_embeds,
                generators,
                columns,
            )
        num_real = len(prompts) if self.model.training else self._num_real_rows(len(prompts))
        metrics = self.rollout_metrics(rollout)
        self._record({name: values[:num_real] for name, values in metrics.items()})
        return rollout

    # Loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and "loss" in logs:
            means = self._pop_metrics("train", only="loss")
            if math.isfinite(logs["loss"]):
                logs.update(means) if means else logs.pop("loss")
        super().log(logs, start_time)

    def reference_velocity(
        self,
        inputs: Transitions,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        prompt_embeds: PromptEmbeddings,
        negative_prompt_embeds: PromptEmbeddings | None = None,
        guidance_scale: float | None = None,
    ) -> torch.Tensor:
        """
        Velocity of the reference at the latents of `inputs`, without gradient. Computed once for all updates from the same
        rollout (`num_iterations`): the reference does not change in between.

        Args:
            inputs ([`~rollouts.rollout.Transitions`]): the examples, on the device of the training.

        The others are those of [`~FlowPolicy.velocity`].
        """
        if inputs.ref_velocity is not None:
            return inputs.ref_velocity
        with self.timer.stage("reference, training", latents=len(latents)):
            with torch.no_grad(), self.reference(self.model) as reference:
                velocity = self.policy.velocity(
                    reference, latents, sigma, prompt_embeds, negative_prompt_embeds, guidance_scale
                )
        if inputs.keep_ref_velocity is not None:
            inputs.keep_ref_velocity(velocity)
        return velocity

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Transitions,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        counts = inputs.weights.cpu() > 0
        if self._chunk_counts is not None:
            counts &= self._chunk_counts
        inputs = inputs.to(self.accelerator.device)
        losses, weighted_losses, metrics = self.transition_losses(model, inputs)
        self.check_before_first_update(losses, metrics)
        # The loss that `Trainer` knows has zeros for updates none of whose examples count
        values = metrics | {"loss": weighted_losses.detach() / inputs.weights}
        values = metrics_of_steps(inputs.step_indices, values, self.step_metrics(losses, metrics), counts)
        if self.model.training and self.args.logging_nan_inf_filter:
            values["loss"] = values["loss"][values["loss"].isfinite()]
        self._record(values)

        loss = weighted_losses.mean() * inputs.share
        if self.model.training:
            self.nonfinite_guard.watch(losses, partial(inputs.describe_loss, self._chunk_prompts))
            loss = self.nonfinite_guard.mark(loss)
        return (loss, metrics) if return_outputs else loss

    # Trainer hooks

    def train(self, *args, **kwargs) -> Any:
        self._buffer, self._buffer_step = [], -1  # of an earlier run
        return super().train(*args, **kwargs)

    def _save_training_state(self, folder: Path) -> None:
        if self.state.global_step % self.args.num_iterations:
            save_rollouts(folder, self.args.process_index, self._buffer)
        if self.args.sync_ref_model and self.args.should_save:
            self.accelerator.unwrap_model(self.ref_model).save_pretrained(folder / REFERENCE_FOLDER)

    def _load_training_state(self, folder: Path) -> None:
        if self.args.sync_ref_model:
            reference = self.accelerator.unwrap_model(self.ref_model)
            saved = type(reference).from_pretrained(folder / REFERENCE_FOLDER, torch_dtype=reference.dtype)
            reference.load_state_dict(saved.state_dict())

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = self.train_dataset.column_names

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        return super().get_eval_dataloader(self._prepare_new_prompts(eval_dataset, "eval_dataset"))

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        return super().get_test_dataloader(self._prepare_new_prompts(test_dataset, "test_dataset"))

    def _prepare_new_prompts(self, dataset: str | Dataset | None, name: str) -> str | Dataset | None:
        """What was done to the datasets of the constructor; a name or `None` stands for one of those."""
        if dataset is None or isinstance(dataset, str):
            return dataset
        if not isinstance(dataset, Dataset) or ROW_COLUMN not in dataset.column_names:
            dataset = prepare_prompts(dataset, name)
        functions = [reward.function for reward in self.reward.rewards if isinstance(reward, PixelReward)]
        check_reward_functions(functions, [dataset])
        self._encode_prompts(dataset["prompt"])
        return dataset

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        if self.args.num_iterations == 1:
            return super()._get_train_sampler(dataset)
        return EpochRepeatSampler(
            lambda: int(self.state.epoch or 0),
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
        rollout = self._generate_and_score_trajectories(inputs, seed_step=-1)
        prompts = [example["prompt"] for example in inputs]
        problem = Watched(rollout.rewards, partial(rollout.describe_reward, prompts)).problem()
        if problem is not None:
            logger.warning(f"Evaluation: {problem}.")
        num_real = self._num_real_rows(len(prompts))
        if 0 < num_real < len(prompts):  # the mean over these alone
            weights = rollout.weights
            is_real = torch.arange(weights.shape[1], device=weights.device) % len(prompts) < num_real
            rollout.weights = weights * is_real * (len(prompts) / num_real)
        chunk_size = self.args.transition_batch_size or self.args.per_device_eval_batch_size
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = [self.compute_loss(model, chunk) for chunk in self._chunks(rollout, prompts, chunk_size)]
        return torch.stack(losses).sum(), None, None
