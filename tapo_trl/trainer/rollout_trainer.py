# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Base class of online trainers: [`RolloutTrainer`]."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset, load_dataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.utils import logging
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import RepeatSampler, identity

from ..callbacks.profile import ProfileCallback
from ..data.columns import Splits, map_splits, named_splits
from ..data.prompts import ROW_COLUMN, default_prompts, prepare_prompts
from ..policies import FlowPolicy, PromptEmbeddings
from ..policies.saving import load_network, save_network
from ..profiling import StageTimer
from ..rewards.scoring import PixelReward, WeightedReward
from ..rollouts import Rollout, RolloutSampler, Transitions
from ..rollouts.base import RolloutBuffer, load_rollouts, metrics_of_steps, save_rollouts
from ..runs.checks import check_speed_options
from ..runs.stopping import Watched
from ..schedulers import FlowMatchSDEScheduler
from ..seeding import seeded_generator
from .base import DiffusionTrainer
from .policy_setup import apply_memory_options, encode_late, eval_mode, trained_levels, whole_weights
from .reward_setup import (
    RewardModel,
    ShareCallback,
    check_reward_functions,
    check_rewards,
    check_sharing,
    load_reward,
    move_rewards,
)
from .rollout_config import RolloutConfig


logger = logging.get_logger(__name__)

REFERENCE_FOLDER = "reference"


class RolloutTrainer(DiffusionTrainer):
    """
    Base class of online trainers, which draw samples of prompts, have a reward score them, and train on the result.

    Every step makes a rollout, or uses the last one again, and goes through its examples in chunks, with a backward pass
    each. A subclass says how a rollout is made ([`~RolloutTrainer.build_sampler`]) and what the loss of its examples is
    ([`~RolloutTrainer.transition_losses`]), and what is logged of both.

    The arguments are those of [`TAPOTrainer`].
    """

    config_class: type[RolloutConfig]
    rollout_class: type[Rollout]
    _collator = staticmethod(identity)
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
        self._reward_models = list(reward_model) if isinstance(reward_model, (list, tuple)) else [reward_model]
        super().__init__(model, args, train_dataset, eval_dataset, callbacks, optimizers, peft_config)

    def _check_options(self, args: RolloutConfig, peft_config: PeftConfig | None) -> None:
        check_rewards(self._reward_models, args)
        check_sharing(self._reward_models, args, peft_config)
        if args.sync_ref_model and peft_config is not None:
            raise ValueError("`sync_ref_model=True` needs full fine-tuning: with LoRA the base is the reference.")
        super()._check_options(args, peft_config)
        check_speed_options(args, peft_config)

    def _check_datasets(
        self, args: RolloutConfig, train_dataset: Dataset | None, eval_dataset: Splits
    ) -> tuple[Dataset, Splits]:
        if train_dataset is None and args.dataset_name is None:
            train_dataset = default_prompts()
        elif train_dataset is None:
            train_dataset = load_dataset(args.dataset_name, split=args.dataset_split)
        train_dataset = prepare_prompts(train_dataset, "train_dataset")
        global_batch_size = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        if args.num_iterations > 1 and len(train_dataset) < global_batch_size:
            raise ValueError(
                f"With `num_iterations={args.num_iterations}` the train dataset needs at least one whole batch of "
                f"{global_batch_size} prompts, but has {len(train_dataset)}."
            )
        eval_dataset = map_splits(prepare_prompts, eval_dataset)
        check_reward_functions(self._reward_models, [train_dataset, *named_splits(eval_dataset).values()])
        return train_dataset, eval_dataset

    def _build_network(self, args: RolloutConfig, peft_config: PeftConfig | None) -> torch.nn.Module:
        with whole_weights(args):
            rewards = [load_reward(reward, self.policy, args) for reward in self._reward_models]
        self.reward = WeightedReward(rewards, args.reward_weights, args.standardize_rewards)
        network = super()._build_network(args, peft_config)
        apply_memory_options(self.policy, self.ref_model, rewards, args)
        return network

    def _encode_datasets(
        self, args: RolloutConfig, train_dataset: Dataset, eval_dataset: Splits, prompts: list[str]
    ) -> tuple[Dataset, Splits]:
        self.timer = StageTimer(args.profile, args.device)
        with self.timer.stage("encode prompts"), args.main_process_first(desc="encoding prompts"):
            self.policy.move_text_encoders(args.device)
            held_out = [prompt for split in named_splits(eval_dataset).values() for prompt in split["prompt"]]
            self.prompt_cache.encode([args.negative_prompt, *train_dataset["prompt"], *held_out, *prompts])
        return train_dataset, eval_dataset

    def _set_up(self) -> None:
        super()._set_up()
        args, device = self.args, self.accelerator.device
        self.dataset_name = args.dataset_name
        self._updates_per_batch = args.num_iterations
        self.buffer = RolloutBuffer(args.num_iterations)
        self._batches: list[list[dict[str, Any]]] = []  # of the update
        move_rewards(self.reward.rewards, self.policy, args)
        if args.share_backbone:
            self.add_callback(ShareCallback(self.reward.rewards, self.policy))
        if args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))
        if args.profile:
            self.add_callback(ProfileCallback(self.timer))
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

    # What a method consists of

    @abstractmethod
    def build_sampler(self, **kwargs) -> RolloutSampler:
        """
        Make what draws samples, and whatever else of the schedule the loss needs. Called once the accelerator is known.

        Args:
            kwargs: what all samplers take, but for the scheduler, see [`~rollouts.base.RolloutSampler`].
        """

    def stochastic_steps(self, indices: list[int]) -> list[int]:
        """Those of the steps that train something: with `expert`, its own."""
        levels = trained_levels(self.policy, self.scheduler.sigmas[indices])
        return [index for index, is_trained in zip(indices, levels.tolist(), strict=True) if is_trained]

    def stochastic_scheduler(self) -> FlowMatchSDEScheduler:
        """The pipeline's grid with the noise of a [`StochasticRolloutConfig`]."""
        args = self.args
        return self.policy.build_scheduler(
            args.num_inference_steps,
            self.latent_shape,
            self.accelerator.device,
            noise_level=args.noise_level,
            sde_type=args.sde_type,
            logprob_reduction=args.logprob_reduction,
        )

    @abstractmethod
    def transition_losses(
        self, model: torch.nn.Module, inputs: Transitions
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """
        Losses of examples. Nothing is logged, and the trainer stays as it is.

        Args:
            model (`torch.nn.Module`): the policy's network.
            inputs ([`~rollouts.base.Transitions`]): the examples, on the device of the training.

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

    def check_before_first_update(self, losses: torch.Tensor, metrics: dict[str, torch.Tensor]) -> None:
        """
        Called with what [`~RolloutTrainer.transition_losses`] returned, to find bugs while the policy is untrained. Here the
        rewards of both sides of a pair, if there are pairs, must be the same.
        """
        if "rewards/margins" in metrics:
            self._check_start(metrics["rewards/margins"])

    # Training: rollout -> chunks -> losses

    def training_step(
        self, model: torch.nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        model.train()  # from here on metrics are those of the training
        rollout, prompts = self._rollout_of_step(inputs), [row["prompt"] for row in inputs]
        self.nonfinite_guard.watch(rollout.rewards, partial(rollout.describe_reward, prompts), prompts)
        chunk_size = self.args.transition_batch_size or self.args.per_device_train_batch_size
        num_chunks = math.ceil(rollout.num_examples / chunk_size)
        loss = torch.zeros((), device=self.accelerator.device)
        for index, chunk in enumerate(self._chunks(rollout, prompts, chunk_size)):
            is_last = index == num_chunks - 1
            with self.timer.stage("loss and backward"), self._synchronising(model, is_last):
                loss += super().training_step(model, chunk, num_items_in_batch)  # calls `compute_loss`
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Transitions,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        counts, inputs = inputs.counts, inputs.to(self.accelerator.device)
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
            self.nonfinite_guard.watch(losses, inputs.outline().describe_loss)
            loss = self.nonfinite_guard.mark(loss)
        return (loss, metrics) if return_outputs else loss

    def _chunks(self, rollout: Rollout, prompts: list[str], chunk_size: int) -> Iterator[Transitions]:
        num_real = None if self.model.training else self._num_real_rows(len(prompts))
        is_used_again = self.model.training and self.args.num_iterations > 1 and rollout.examples is None
        return rollout.transitions(chunk_size, prompts, num_real, keep_reference=is_used_again)

    @contextmanager
    def _synchronising(self, model: torch.nn.Module, is_last: bool) -> Iterator[None]:
        """
        Inside is one of several backwards. Only the last one of an optimizer step shares gradients, and makes DeepSpeed update:
        it does so in the backward itself, after every one that it takes for the last.
        """
        state, ends_accumulation = self.accelerator.gradient_state, self.accelerator.sync_gradients
        state._set_sync_gradients(ends_accumulation and is_last)
        shares = state.sync_gradients or self.accelerator.distributed_type == DistributedType.DEEPSPEED
        with nullcontext() if shares else self.accelerator.no_sync(model):
            yield
        state._set_sync_gradients(ends_accumulation)

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
            inputs ([`~rollouts.base.Transitions`]): the examples, on the device of the training.

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

    # Rollouts

    def rollout(self, batch: list[dict[str, Any]], seed_step: int | None = None) -> Rollout:
        """
        Draw and score samples of a batch of prompts with the current policy, and record the metrics.

        Args:
            batch (`list[dict]`): rows of a dataset of prompts, such as `trainer.train_dataset`.
            seed_step (`int`, *optional*): optimizer step whose noise is drawn. Defaults to the current one.

        Returns:
            [`~rollouts.base.Rollout`], of the trainer's `rollout_class`.
        """
        seed_step = self.state.global_step if seed_step is None else seed_step
        prompts = [row["prompt"] for row in batch]
        columns = {name: [row[name] for row in batch] for name in batch[0] if name not in ("prompt", ROW_COLUMN)}
        generators = [seeded_generator(self._seed_name, self.args.seed, seed_step, row[ROW_COLUMN]) for row in batch]
        embeds = self.prompt_cache.load(prompts).to(self.accelerator.device)
        with self.timer.stage("rollout"), eval_mode(self.model), self.accelerator.autocast():
            rollout = self.sampler.sample(
                self.model, prompts, embeds, self.negative_prompt_embeds, generators, columns
            )
        num_real = len(prompts) if self.model.training else self._num_real_rows(len(prompts))
        metrics = self.rollout_metrics(rollout)
        self._record({name: values[:num_real] for name, values in metrics.items()})
        return rollout

    def _rollout_of_step(self, batch: list[dict[str, Any]]) -> Rollout:
        """A new rollout, or the stored one of this batch when `num_iterations` uses it again."""
        step, args = self.state.global_step, self.args
        load = partial(
            load_rollouts, self._resumed_from, args.process_index, self.accelerator.device, self.rollout_class
        )
        is_new_step = self.buffer.begin(step, load)
        if is_new_step and args.sync_ref_model and step % args.ref_model_sync_steps == 0:
            self.buffer.forget_reference()
        if self.buffer.is_used_up:
            starts_update = is_new_step and any(batch is first for first in self._batches[:1])
            self._fill_buffer(self._batches if starts_update else [batch], seed_step=step)
        return self.buffer.take([row[ROW_COLUMN] for row in batch])

    def get_batch_samples(self, *args, **kwargs) -> tuple[list[list[dict[str, Any]]], Any]:
        self._batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        return self._batches, num_items_in_batch

    def _fill_buffer(self, batches: list[list[dict[str, Any]]], seed_step: int) -> None:
        """
        Make the rollouts of all batches of an update, and scale the weights of their examples, which go to the CPU, so that
        the loss is the mean over those that count, of all processes.
        """
        rollouts = [self.rollout(batch, seed_step) for batch in batches]
        totals = torch.stack([torch.tensor([rollout.weights.sum(), 1.0]) for rollout in rollouts]).sum(0)
        count, number = self.accelerator.reduce(totals.to(self.accelerator.device), reduction="sum").tolist()
        for batch, rollout in zip(batches, rollouts, strict=True):  # each loss is a mean, maybe of fewer
            rollout.weights = rollout.weights.cpu() * (rollout.num_examples * number / count if count else 1.0)
            self.buffer.rollouts.append(([row[ROW_COLUMN] for row in batch], rollout))

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: list[dict[str, Any]],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Loss and rewards on held-out prompts, from the same noise at every evaluation."""
        rollout, prompts = self.rollout(inputs, seed_step=-1), [row["prompt"] for row in inputs]
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

    # Trainer hooks

    def train(self, *args, **kwargs) -> Any:
        self.buffer = RolloutBuffer(self.args.num_iterations)  # without those of an earlier run
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and "loss" in logs:
            means = self._pop_metrics("train", only="loss")
            if math.isfinite(logs["loss"]):
                logs.update(means) if means else logs.pop("loss")
        super().log(logs, start_time)

    def _save_training_state(self, folder: Path) -> None:
        if self.state.global_step % self.args.num_iterations:
            save_rollouts(folder, self.args.process_index, self.buffer.rollouts)
        if self.args.sync_ref_model and self.args.should_save:
            save_network(folder / REFERENCE_FOLDER, self.accelerator.unwrap_model(self.ref_model))

    def _load_training_state(self, folder: Path) -> None:
        if self.args.sync_ref_model:
            load_network(folder / REFERENCE_FOLDER, self.accelerator.unwrap_model(self.ref_model))

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = self.train_dataset.column_names

    def _encode_new(self, dataset: Dataset, name: str) -> Dataset:
        if not isinstance(dataset, Dataset) or ROW_COLUMN not in dataset.column_names:
            dataset = prepare_prompts(dataset, name)
        functions = [reward.function for reward in self.reward.rewards if isinstance(reward, PixelReward)]
        check_reward_functions(functions, [dataset])
        encode_late(dataset["prompt"], self.prompt_cache, self.policy, self.args)
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
