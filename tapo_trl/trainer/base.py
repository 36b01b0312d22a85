# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What both trainers share: the paper, the model card, and checks that come before any work."""

import os
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from huggingface_hub.constants import HF_HOME
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.trainer_utils import EvalLoopOutput

from ..data.prompts import PromptCache
from ..field_types import check_folder_name
from ..policies import FlowPolicy
from ..policies.loading import pop_dtype
from ..runs.checkpoints import SealCallback, SealedCheckpointsMixin
from ..runs.hub import HubPushMixin
from ..runs.interruption import GracefulStopCallback, start_data_worker
from ..runs.model_card import current_command, write_model_card
from ..runs.nonfinite import NonFiniteGuard
from ..runs.option_checks import check_optimizer, check_without_effect


class DiffusionTrainerMixin(HubPushMixin, SealedCheckpointsMixin):
    """
    Put before a TRL trainer, it replaces what only fits language models, the model card and the telemetry, and makes runs
    safe to stop at any time.

    A trainer says what its card shows in `_base_model_name`, `_method_table` and `_card_metrics`.
    """

    _paper = {
        "title": "Consistent Noisy Latent Rewards for Trajectory Preference Optimization in Diffusion Models",
        "citation": (
            "@inproceedings{xian2026consistent,\n"
            "    title     = {{Consistent Noisy Latent Rewards for Trajectory Preference Optimization in Diffusion "
            "Models}},\n"
            "    author    = {Xian, Xiaole and He, Xilin and Chen, Wenting and Liu, Wenshuang and Mu, Wenqi and He, "
            "Yancheng and Li, Liang and Zhang, Yi and Yue, Xiangyu},\n"
            "    year      = {2026},\n"
            "}"
        ),
    }
    dataset_name: str | None = None  # for every card of the run
    _was_trained = False  # by an earlier call of `train`, which starts to count steps anew
    _card_metrics: tuple[str, ...]
    policy: FlowPolicy
    prompt_cache: PromptCache

    @property
    @abstractmethod
    def _base_model_name(self) -> str:
        """Hub id or folder of the pipeline that is trained."""

    @abstractmethod
    def _method_table(self) -> dict[str, Any]:
        """Options of the training, for the card's table."""

    @property
    def _card_method(self) -> tuple[str, list[str], dict[str, str]]:
        """Name of the method, its tags and its paper, for the card."""
        return self._name, self._tag_names, self._paper

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """
        Write the model card `README.md` into the output folder.

        Args:
            model_name (`str`, *optional*): name of the model. Defaults to the Hub id's or the folder's.
            dataset_name (`str`, *optional*): name of the dataset. Defaults to `self.dataset_name`.
            tags (`str` or `list[str]`, *optional*): further tags.
        """
        if not self.is_world_process_zero():
            return
        folder, hub_model_id = Path(self.args.output_dir), self.hub_model_id or self.args.hub_model_id
        name, method_tags, paper = self._card_method
        metrics = {}
        for logs in self.state.log_history:
            metrics |= {name: value for name, value in logs.items() if name.startswith(self._card_metrics)}
        write_model_card(
            folder / "README.md",
            trainer_name=name,
            base_model=self._base_model_name,
            model_name=model_name or (hub_model_id or folder.resolve().name).split("/")[-1],
            dataset_name=dataset_name or self.dataset_name,
            pipeline_class=type(self.policy.pipeline).__name__,
            transformer_class=self.policy.pipeline.config["transformer"][1],  # FSDP changes that of the object
            modality=self.policy.modality,
            fps=self.args.fps if self.policy.modality == "video" else None,
            is_lora=is_peft_model(self.accelerator.unwrap_model(self.model)),
            tags=[*method_tags, *([tags] if isinstance(tags, str) else tags or [])],
            license=None,
            method_table=self._method_table(),
            metrics=metrics,
            images=sorted(folder.glob("samples/*.png"))[-4:],
            hub_model_id=hub_model_id,
            paper=paper,
            command=current_command(),
        )

    def _encode_prompts(self, prompts: list[str]) -> None:
        """Encode prompts that are new since the start, if the text encoders are still there."""
        with self.args.main_process_first(desc="encoding prompts"):
            missing = self.prompt_cache.missing(prompts)
            if not missing:
                return
            if not self.policy.has_text_encoders:
                raise ValueError(
                    f"The prompt {missing[0]!r} (one of {len(missing)}) was not encoded at the start, and the text encoders have "
                    "left the memory since. Give its dataset to the trainer as `eval_dataset`, of which a `dict` may hold "
                    "several; or pass a loaded pipeline as `model`, whose text encoders stay."
                )
            self.policy.move_text_encoders(self.args.device)
            self.prompt_cache.encode(missing)
            self.policy.move_text_encoders("cpu")

    @property
    def _is_untrained(self) -> bool:
        """Whether the model is as it was before the first update of the first run."""
        return self.model.training and self.state.global_step == 0 and not self._was_trained

    def _add_run_callbacks(self, stop_every_n_steps: int = 1) -> None:
        """
        The last callbacks of the list: a checkpoint is sealed when all others have written into it. Called at the end of
        `__init__`.
        """
        check_optimizer(self.optimizer, self.model)
        self.nonfinite_guard = NonFiniteGuard(self, stop_every_n_steps)
        self.add_callback(self.nonfinite_guard)
        self.add_callback(GracefulStopCallback())
        self.add_callback(SealCallback(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> Any:
        try:
            output = super().train(resume_from_checkpoint, **kwargs)
        finally:  # also of a run that was interrupted, after which one may go on
            self._was_trained = self._was_trained or self.state.global_step > 0
        self.nonfinite_guard.raise_if_over()
        return output

    def _get_dataloader(self, *args, **kwargs) -> DataLoader:
        dataloader = super()._get_dataloader(*args, **kwargs)
        start = partial(start_data_worker, dataloader.worker_init_fn)
        dataloader.worker_init_fn = dataloader.base_dataloader.worker_init_fn = start
        return dataloader

    @abstractmethod
    def _pop_metrics(self, mode: str) -> dict[str, float]:
        """Means of what was recorded since the last call, of `"train"` or `"eval"`."""

    def evaluate(self, eval_dataset: Any = None, *args, **kwargs) -> dict[str, float]:
        splits = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if isinstance(eval_dataset, str) and eval_dataset not in splits:
            raise ValueError(
                f"`eval_dataset={eval_dataset!r}` is the name of a split, but the `eval_dataset` of the trainer "
                + (f"has {list(splits)}." if splits else "has no names.")
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
        """
        How many of this process's `num_rows` rows of an evaluation batch are no repetition: with several processes the
        last batch is filled up with the first rows, so that all make the same forwards. They come last.
        """
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder < 1:
            return num_rows
        return max(0, min(num_rows, state.remainder - self.accelerator.process_index * num_rows))

    def _mean_of_real_rows(self, losses: torch.Tensor) -> torch.Tensor:
        """Mean of losses of shape `(num_rows,)` over the rows that are no repetition; `Trainer` drops one of none."""
        return losses[: self._num_real_rows(len(losses)) or None].mean()

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        self.nonfinite_guard.grad_norm = super()._get_grad_norm(model, grad_norm)
        return self.nonfinite_guard.grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "learning_rate" in logs:
            logs["skipped_updates"] = self.nonfinite_guard.pop_skipped()
        super().log(logs, start_time)

    def _send_telemetry(self) -> None:
        """None is sent: TRL's reads fields that only language models have."""


def autocast_dtype(args: TrainingArguments) -> torch.dtype | None:
    """The half precision that a configuration asks for, `None` if it asks for none."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def check_precision(
    args: TrainingArguments, policy: FlowPolicy | None = None, torch_dtype: torch.dtype | str | None = None
) -> None:
    """
    Check that no network is in another half precision than that of `args`: autocast cannot mix them.

    Args:
        args ([`~transformers.TrainingArguments`]): the configuration, with `model_init_kwargs`.
        policy ([`FlowPolicy`], *optional*): what was loaded. Without it, only what is asked for is looked at.
        torch_dtype (`torch.dtype` or `str`, *optional*): what is asked for where `args` says nothing.

    Raises:
        ValueError: if one is. The VAE may be, for it computes outside of autocast.
    """
    if policy is None:
        kwargs = dict(args.model_init_kwargs or {})
        name = "torch_dtype" if kwargs.get("dtype") is None else "dtype"
        dtype = pop_dtype(kwargs)
        asked = f"`{name}`" if dtype is None else f"`{name}` in `model_init_kwargs`"
        dtype = dtype or torch_dtype
        if isinstance(dtype, dict):
            found = {f"`{part}` of {asked}": value for part, value in dtype.items() if part != "vae"}
        else:
            found = {asked: dtype}
    else:
        names = [name for name in policy.text_encoder_names if policy.pipeline.components[name] is not None]
        components = {name: policy.pipeline.components[name] for name in ("transformer", *names)}
        found = {f"the `{name}` of `model`": component.dtype for name, component in components.items()}
    own = autocast_dtype(args)
    if own is None:
        return
    for name, dtype in found.items():
        if dtype in (torch.bfloat16, torch.float16) and dtype != own:
            raise ValueError(
                f"`{'bf16' if args.bf16 else 'fp16'}=True` computes in {own}, but {name} is {str(dtype).removeprefix('torch.')}, "
                f"which cannot be mixed with it: load `model` in {str(own).removeprefix('torch.')} or float32, or set "
                + ("`fp16=True` and `bf16=False`." if args.bf16 else "`bf16=True` and `fp16=False`.")
            )


def release_text_encoders(model: Any, policy: FlowPolicy) -> None:
    """Drop the text encoders of a `model` that was loaded by name; those of a user's object wait on the CPU."""
    if isinstance(model, str):
        policy.unload_text_encoders()
    else:
        policy.move_text_encoders("cpu")


def fill_in_sizes(args: TrainingArguments, policy: FlowPolicy) -> tuple[int, ...]:
    """Put what `args` leaves to `resolution` and to the policy's family into it, and return the shape of one latent."""
    if policy.modality == "image":
        check_without_effect(args, ["fps"], "because `model` makes images")
    args.height, args.width = args.height or args.resolution, args.width or args.resolution
    if args.max_sequence_length is None:
        args.max_sequence_length = policy.max_sequence_length
    return policy.latent_shape(args.height, args.width, args.num_frames)


def check_folders(args: TrainingArguments) -> None:
    """[`check_writable`] of the folders that a run writes to."""
    check_writable(args.output_dir)
    check_writable(args.cache_dir or Path(HF_HOME) / "tapo_trl", "cache_dir")


def check_writable(folder: str | Path, option: str = "output_dir") -> None:
    """Make the folder that an option names, or say why it can't be written to."""
    check_folder_name(folder, option)
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`{option}={folder}` cannot be created: {error}.") from error
    if not os.access(path, os.W_OK):
        raise ValueError(f"`{option}={folder}` is not writable.")


@contextmanager
def whole_weights(args: TrainingArguments) -> Iterator[None]:
    """
    Inside, models are loaded whole on every process. Under ZeRO-3 Transformers would split them over the processes right
    away, also those that no engine ever puts together again, such as text encoders.
    """
    if args.deepspeed_plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(args.deepspeed_plugin.hf_ds_config)


def check_no_data_parallel(args: TrainingArguments, trainer: str) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"`{trainer}` does not run under `torch.nn.DataParallel`. Start it with `accelerate launch`, or show it a "
            "single GPU with `CUDA_VISIBLE_DEVICES`."
        )
