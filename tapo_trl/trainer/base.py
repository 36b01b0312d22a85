# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Base class of all trainers: [`DiffusionTrainer`]."""

import copy
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo
from peft import PeftConfig
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.base_trainer import _BaseTrainer

from ..callbacks.base import PolicyCallback
from ..data.columns import Splits
from ..data.prompts import PromptCache
from ..method_card import MethodCard
from ..moved import moved_names
from ..policies import FlowPolicy
from ..policies.sampling import generate_samples
from ..policies.saving import TRANSFORMER_FOLDER, load_network, save_policy
from ..rewards import StepRewardModel
from ..runs.checkpoints import Checkpoints
from ..runs.checks import (
    autocast_dtype,
    check_dynamo_backend,
    check_launch,
    check_optimizer,
    check_precision,
    check_run,
)
from ..runs.hub import HubUploads
from ..runs.metrics import means_of
from ..runs.model_card import write_card_of
from ..runs.stopping import GracefulStopCallback, NonFiniteGuard, detach_data_workers
from .policy_setup import (
    check_no_adapter,
    check_peft_config,
    check_start,
    eval_mode,
    fill_in_sizes,
    load_trained_policy,
    make_trainable,
    release_text_encoders,
    set_vae_options,
    whole_weights,
)


# Options that every card shows
COMMON_OPTIONS = ("height", "width", "num_frames", "learning_rate", "num_train_epochs", "max_steps")


class DiffusionTrainer(_BaseTrainer):
    """
    Base class of all trainers. It loads and checks models and data, logs, draws samples, writes model cards, and makes runs
    safe to stop at any time.

    `__init__` calls hooks in this order, of which a subclass has its own: `_check_options` and `_check_datasets` before
    anything is loaded, `_load_policy`, `_build_network`, `_encode_datasets`, and `_set_up` when the accelerator is known.

    The arguments are those of [`DiffusionDPOTrainer`].

    Attributes:
        policy ([`FlowPolicy`]): the model's family.
        ref_model (`torch.nn.Module`, *optional*): frozen copy that is the reference in full fine-tuning.
        hub ([`~runs.hub.HubUploads`]): uploads of the run.
        checkpoints ([`~runs.checkpoints.Checkpoints`]): checkpoints of the run.
    """

    loss_is_scaled_for_ga = False  # the Trainer divides by the accumulation steps
    config_class: type[TrainingArguments]
    dataset_name: str | None = None  # for every card of the run
    ref_model: torch.nn.Module | None = None
    has_stochastic_steps = False  # whether it is trained on `step_indices` of the sampler
    _collator: Callable  # rows of the dataset to a batch
    _compute_metrics: Callable[[EvalPrediction], dict] | None = None
    _was_trained = False  # by an earlier call of `train`, which starts to count steps anew
    _updates_per_batch = 1
    _resumed_from: str | None = None
    method_card: MethodCard  # of the method that is the default, until the options are known
    _template_file = "tapo_model_card.md"
    _reward_model_class: type[StepRewardModel] | None = None  # what is trained, if it is one
    _card_metrics: tuple[str, ...]  # what the names of metrics start with that the card shows
    _card_options: tuple[str, ...]

    def __init__(
        self,
        model: str | DiffusionPipeline | FlowPolicy,
        args: TrainingArguments | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Splits = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        if args is None:
            args = self.config_class(f"{Path(model).name if isinstance(model, str) else 'policy'}-{self._name}")
        args, peft_config = copy.copy(args), copy.deepcopy(peft_config)  # the user's stay as they are
        callbacks = list(callbacks or [])

        # Everything that can be wrong and is cheap to find out
        check_run(args, model, type(self).__name__)
        self._check_options(args, peft_config)
        for callback in callbacks:
            self._check_callback(callback)
        train_dataset, eval_dataset = self._check_datasets(args, train_dataset, eval_dataset)
        check_launch(args, len(train_dataset))

        # Networks
        with whole_weights(args):
            self.policy = self._load_policy(model, args, peft_config)
        check_precision(args, self.policy)
        check_no_adapter(self.policy)
        self.latent_shape = fill_in_sizes(args, self.policy)
        network = self._build_network(args, peft_config)

        # Data: prompts and pixels are encoded once, then the text encoders leave the accelerator
        self.prompt_cache = PromptCache(self.policy, args.cache_dir, args.max_sequence_length, autocast_dtype(args))
        prompts = [prompt for cb in callbacks if isinstance(cb, PolicyCallback) for prompt in cb.prompts]
        train_dataset, eval_dataset = self._encode_datasets(args, train_dataset, eval_dataset, prompts)
        self._release_encoders(model, args)

        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.hub, self.checkpoints, self.graceful_stop = HubUploads(args), Checkpoints(args), GracefulStopCallback()
        _BaseTrainer.__init__(  # also where `RewardTrainer`, whose own is for language models, comes in between
            self,
            model=network,
            args=args,
            data_collator=self._collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=self._compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.can_return_loss = True
        self._set_up()
        for callback in callbacks:
            if isinstance(callback, PolicyCallback):
                callback.attach(self)
        check_optimizer(self.optimizer, self.model)
        self.nonfinite_guard = NonFiniteGuard(self, self._updates_per_batch)
        for callback in (self.nonfinite_guard, self.graceful_stop, self.checkpoints):  # the last ones
            self.add_callback(callback)

    # What a subclass makes of `__init__`

    def _check_options(self, args: TrainingArguments, peft_config: PeftConfig | None) -> None:
        """Refuse what cannot work."""
        check_peft_config(peft_config)
        check_dynamo_backend()

    def _check_callback(self, callback: TrainerCallback) -> None:
        """Refuse a callback that has nothing to act on."""

    @abstractmethod
    def _check_datasets(
        self, args: TrainingArguments, train_dataset: Dataset | None, eval_dataset: Splits
    ) -> tuple[Dataset, Splits]:
        """Datasets whose columns are right. Nothing is encoded yet."""

    def _load_policy(self, model: Any, args: TrainingArguments, peft_config: PeftConfig | None) -> FlowPolicy:
        """The policy, or the base model of what is trained."""
        return load_trained_policy(model, args, peft_config)

    def _build_network(self, args: TrainingArguments, peft_config: PeftConfig | None) -> torch.nn.Module:
        """The network to train. That of the policy, beside which `self.ref_model` is set, by default."""
        network, self.ref_model = make_trainable(self.policy, args, peft_config)
        return network

    @abstractmethod
    def _encode_datasets(
        self, args: TrainingArguments, train_dataset: Dataset, eval_dataset: Splits, prompts: list[str]
    ) -> tuple[Dataset, Splits]:
        """Encode the datasets, and further `prompts`, on `args.device`."""

    @abstractmethod
    def _encode_new(self, dataset: Dataset, name: str) -> Dataset:
        """Check and encode a dataset that came after `__init__`."""

    def _release_encoders(self, model: Any, args: TrainingArguments) -> None:
        release_text_encoders(model, self.policy)

    def _set_up(self) -> None:
        """Bring what is frozen to the accelerator: here the VAE, and the reference if it is a copy."""
        self.policy.vae.to(self.accelerator.device).requires_grad_(False)
        set_vae_options(self.policy, self.args)
        if self.ref_model is not None:
            self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)

    # The policy and its reference

    @contextmanager
    def reference(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """The reference network: `model` with its adapter disabled, or the frozen copy."""
        if self.ref_model is not None:
            yield self.ref_model
        else:
            with self.accelerator.unwrap_model(model).disable_adapter():
                yield model

    @property
    def _checks_start(self) -> bool:
        if not self.args.self_check:
            return False
        return self.model.training and self.state.global_step == 0 and not self._was_trained

    def _check_start(self, margins: torch.Tensor) -> None:
        """Check the rewards' margins of pairs, see [`check_start`]."""
        if self._checks_start:
            check_start(margins)

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
            num_inference_steps, guidance_scale (*optional*): default to the configuration's.
            batch_size (`int`, *optional*): prompts at once. Defaults to `per_device_eval_batch_size`.

        Returns:
            `torch.Tensor`: see [`~policies.sampling.generate_samples`].
        """
        args, device = self.args, self.accelerator.device
        prompts = [prompts] if isinstance(prompts, str) else prompts
        with eval_mode(self.model), self.accelerator.autocast():
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

    # Training and evaluation

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> Any:
        """
        Train, or go on.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*, defaults to `args.resume_from_checkpoint`):
                Folder of a checkpoint, or `True` for the last whole one of `args.output_dir`; without any, the run starts from
                the beginning, so that a job that is restarted by a scheduler needs no other command. `False` always does.
            kwargs: further arguments of [`~transformers.Trainer.train`].

        Raises:
            ValueError: if the folder is no whole checkpoint, or if a start would overwrite checkpoints of an earlier run.
        """
        checkpoint = self.checkpoints.to_resume(resume_from_checkpoint, has_started=self.state.global_step > 0)
        self._resumed_from = None if checkpoint is None else str(checkpoint)
        if checkpoint is not None:
            self._load_training_state(checkpoint)
        try:
            output = super().train(resume_from_checkpoint=self._resumed_from, **kwargs)
        finally:  # also of a run that was interrupted, after which one may go on
            self.graceful_stop.restore_handlers()
            self._was_trained = self._was_trained or self.state.global_step > 0
        self.nonfinite_guard.raise_if_over()
        return output

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:  # `Trainer` would make one more step of a complete run
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_dataloader(self, *args, **kwargs) -> DataLoader:
        return detach_data_workers(super()._get_dataloader(*args, **kwargs))

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        is_new = not (eval_dataset is None or isinstance(eval_dataset, str))  # a name is one of the constructor's
        return super().get_eval_dataloader(self._encode_new(eval_dataset, "eval_dataset") if is_new else eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        return super().get_test_dataloader(self._encode_new(test_dataset, "test_dataset"))

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        self.nonfinite_guard.grad_norm = super()._get_grad_norm(model, grad_norm)
        return self.nonfinite_guard.grad_norm

    def evaluate(self, eval_dataset: Any = None, *args, **kwargs) -> dict[str, float]:
        splits = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if isinstance(eval_dataset, str) and eval_dataset not in splits:
            found = list(splits) if splits else "no names"
            raise ValueError(
                f"`eval_dataset={eval_dataset!r}` is the name of a split, but the `eval_dataset` of the trainer has {found}."
            )
        # TRL would prepare the dataset here, and not as `get_eval_dataloader` does
        return Trainer.evaluate(self, eval_dataset, *args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self._metrics["eval"].clear()  # of an evaluation that was interrupted
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        # Before they are logged: each of several `eval_dataset`s has a prefix of its own
        recorded = self._pop_metrics("eval").items()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in recorded})
        return output

    def _num_real_rows(self, num_rows: int) -> int:
        """How many of an evaluation batch's rows are not padding, which comes last: `Trainer` fills the last batch up."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder < 1:
            return num_rows
        return max(0, min(num_rows, state.remainder - self.accelerator.process_index * num_rows))

    # Logs

    def _record(self, metrics: dict[str, torch.Tensor]) -> None:
        """Keep `metrics` for the next call of `log`, which logs their means."""
        for name, values in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(values)

    def _pop_metrics(self, mode: str, only: str | None = None) -> dict[str, float]:
        """What [`means_of`] says of all that was recorded since the last call, of `"train"` or `"eval"`."""
        names = [name for name in sorted(self._metrics[mode]) if only in (None, name)]
        recorded = {name: torch.cat([v.flatten().float() for v in self._metrics[mode].pop(name)]) for name in names}
        return means_of(recorded, self.accelerator) if names else {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "learning_rate" in logs:
            logs["skipped_updates"] = self.nonfinite_guard.pop_skipped()
        if self.model.training:
            logs.update(self._pop_metrics("train"))
        super().log(logs, start_time)

    def _send_telemetry(self) -> None:
        """None is sent: TRL's reads fields that only language models have."""

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
        load_network(folder, self.accelerator.unwrap_model(self.model if model is None else model))

    def _load_best_model(self) -> None:
        is_sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if (Path(self.state.best_model_checkpoint) / TRANSFORMER_FOLDER).is_dir() and not is_sharded:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.create_model_card()
        with self.checkpoints.writing(self.state.global_step) as folder:
            Trainer._save_checkpoint(self, model, trial)  # TRL's would write its own card
            self._save_training_state(folder)

    def _save_training_state(self, folder: Path) -> None:
        """Write what else it takes to go on exactly, on every process."""

    def _load_training_state(self, folder: Path) -> None:
        """Read what `_save_training_state` wrote."""

    # Model card and Hub

    @property
    def _base_model_name(self) -> str:
        return self.policy.name_or_path

    def _method_table(self) -> dict[str, Any]:
        """Options of the training, for the card's table."""
        options = {name: getattr(self.args, name) for name in (*self._card_options, *COMMON_OPTIONS)}
        return {name: value for name, value in options.items() if value is not None}

    @property
    def _name(self) -> str:
        return self.method_card.name

    @property
    def _tag_names(self) -> list[str]:
        return ["trl", *self.method_card.tags]

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Write the model card `README.md` into the output folder. `model_name` defaults to that of the Hub or of the folder,
        `dataset_name` to `self.dataset_name`; `tags` come beside those of the method.
        """
        if self.is_world_process_zero():
            write_card_of(self, model_name, dataset_name, tags)

    @property
    def hub_model_id(self) -> str | None:
        """Repository of the run on the Hub, once it is known to exist."""
        return self.hub.repo_id

    @hub_model_id.setter
    def hub_model_id(self, repo_id: str | None) -> None:
        self.hub.repo_id = repo_id

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        if self.is_world_process_zero():
            self.hub.open(token, private)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self.hub.push_checkpoint(self, Path(checkpoint_folder))

    def _finish_current_push(self) -> None:
        self.hub.wait()

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ) -> CommitInfo | Future | None:
        """Save the model and upload it with its card and samples, see [`~runs.hub.HubUploads.push`]."""
        return self.hub.push(self, commit_message, blocking, token, revision, private, **kwargs)


__getattr__ = moved_names(__name__)
