# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Base class of trainers that learn from a dataset of images or videos: [`PreferenceTrainer`]."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler

from ..data.buckets import BucketedPairs, BucketSampler
from ..data.columns import Splits, column_values, map_splits, named_splits
from ..data.preferences import (
    ROW_COLUMN,
    SIDES,
    TIE,
    PreferencePairCollator,
    check_preference_dataset,
    is_prepared,
    prepare_preference_dataset,
)
from .base import DiffusionTrainer
from .policy_setup import encode_late, set_vae_options
from .preference_config import PreferenceDataConfig


def check_preference_splits(train_dataset: Dataset | None, eval_dataset: Splits, args: PreferenceDataConfig) -> None:
    """Check what can be checked of all splits without reading a file, see [`check_preference_dataset`]."""
    if train_dataset is None:
        raise ValueError("`train_dataset` is missing: give preference pairs.")
    for name, split in {"train_dataset": train_dataset, **named_splits(eval_dataset)}.items():
        check_preference_dataset(split, name, args.dimension_weights)


def describe_loss(inputs: dict[str, Any], sigma: torch.Tensor, index: tuple[int, ...]) -> str:
    """What the loss of the row at `index` of a batch is, for [`NonFiniteGuard.watch`]."""
    row, level = inputs["row"][index].item(), sigma[index].item()
    return f"the loss for the prompt {inputs['prompt'][index[0]]!r} (row {row}) at noise level {level:.4f}"


def loss_description(inputs: dict[str, Any], sigma: torch.Tensor) -> Callable[[tuple[int, ...]], str]:
    """[`describe_loss`] of a batch, whose latents are not kept."""
    return partial(describe_loss, {name: inputs[name] for name in ("row", "prompt")}, sigma)


class PreferenceTrainer(DiffusionTrainer):
    """
    Base class of trainers that learn from a dataset of images or videos: from preference pairs, whose configuration is a
    [`PreferenceDataConfig`], unless a subclass says otherwise.
    """

    _collator = PreferencePairCollator()

    # Data

    def _check_datasets(
        self, args: PreferenceDataConfig, train_dataset: Dataset | None, eval_dataset: Splits
    ) -> tuple[Dataset, Splits]:
        check_preference_splits(train_dataset, eval_dataset, args)
        return train_dataset, eval_dataset

    def _check_split(self, dataset: Dataset, args: PreferenceDataConfig, name: str) -> None:
        """Check what can be checked of a split without reading a file."""
        check_preference_dataset(dataset, name, args.dimension_weights)

    def _prepare_split(self, dataset: Dataset, args: PreferenceDataConfig, name: str, **options: Any) -> Dataset:
        """The split in the form that training reads, see [`prepare_preference_dataset`], whose `options` these are."""
        options |= {"dimension_weights": args.dimension_weights}
        return prepare_preference_dataset(
            dataset, self.policy, args.height, args.width, args.num_frames, args.fps, name=name, **options
        )

    @property
    def _media_columns(self) -> tuple[str, ...]:
        return SIDES

    def _encode_datasets(
        self, args: PreferenceDataConfig, train_dataset: Dataset, eval_dataset: Splits, prompts: list[str]
    ) -> tuple[Dataset, Splits]:
        """Encode prompts and, with `cache_latents`, images or videos. The encoders stay on the accelerator."""
        self.policy.move_text_encoders(args.device)
        self.policy.vae.to(args.device)
        set_vae_options(self.policy, args)
        train_dataset = self._prepare_dataset(train_dataset, args, "train_dataset")
        eval_dataset = map_splits(lambda split, name: self._prepare_dataset(split, args, name), eval_dataset)
        with args.main_process_first(desc="encoding prompts"):
            self.prompt_cache.encode(prompts)
        return train_dataset, eval_dataset

    def _prepare_dataset(self, dataset: Dataset, args: PreferenceDataConfig, dataset_name: str) -> Dataset:
        if is_prepared(dataset):
            return dataset
        self._check_split(dataset, args, dataset_name)
        with args.main_process_first(desc=f"encoding {dataset_name}"):
            self.prompt_cache.encode(column_values(dataset, "prompt"))
            return self._prepare_split(
                dataset,
                args,
                dataset_name,
                skip_bad_files=args.skip_bad_files,
                short_videos=args.short_videos,
                aspect_ratio_buckets=args.aspect_ratio_buckets and dataset_name == "train_dataset",
                cache_latents=args.cache_latents,
                cache_dir=args.cache_dir,
            )

    def _get_train_sampler(self, train_dataset: Dataset | BucketedPairs | None = None) -> Sampler | None:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if not isinstance(dataset, BucketedPairs):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return BucketSampler([len(part) for part in dataset.datasets], self._train_batch_size, seed)

    def _encode_new(self, dataset: Dataset, name: str) -> Dataset:
        self._check_split(dataset, self.args, name)
        if isinstance(dataset, Dataset):
            encode_late(dataset["prompt"], self.prompt_cache, self.policy, self.args)
        return self._prepare_dataset(dataset, self.args, name)

    def _set_signature_columns_if_needed(self) -> None:
        latents = [f"{column}_latents" for column in self._media_columns]
        self._signature_columns = ["prompt", ROW_COLUMN, "label", "margin", *self._media_columns, *latents]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        for column in self._media_columns:
            if column in inputs:
                inputs[f"{column}_latents"] = self.policy.encode(inputs.pop(column))
        inputs["prompt_embeds"] = self.prompt_cache.load(inputs["prompt"]).to(self.accelerator.device)
        return inputs

    # Loss

    def _mean_of_real_rows(self, losses: torch.Tensor) -> torch.Tensor:
        """Mean of losses of shape `(num_rows,)` over rows that are not padding; NaN if there are none, which `Trainer` ignores."""
        return losses[: self._num_real_rows(len(losses)) or None].mean()

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        """
        Rows of all processes, in evaluation without padding. In training `gather_for_metrics` would cut every batch of an epoch's last
        update, because all of them are fetched ahead.
        """
        return self.accelerator.gather(rows) if self.model.training else self.accelerator.gather_for_metrics(rows)

    @torch.no_grad()
    def _record_pairs(self, metrics: dict[str, torch.Tensor], labels: torch.Tensor) -> None:
        """Record metrics of shape `(batch_size,)` of the pairs of all processes. Accuracies leave ties out."""
        labels, *columns = self._gather(torch.stack([labels, *metrics.values()], dim=1)).unbind(dim=1)
        for name, values in zip(metrics, columns, strict=True):
            values = values[labels != TIE] if "accurac" in name else values
            if len(values) > 0:
                self._record({name: values})
