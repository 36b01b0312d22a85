# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What trainers share that learn from preference pairs: encoding them, and bringing batches to the accelerator."""

from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler

from ..data.buckets import BucketedPairs, BucketSampler
from ..data.columns import column_values
from ..data.preferences import (
    LATENT_COLUMNS,
    ROW_COLUMN,
    check_preference_dataset,
    is_prepared,
    prepare_preference_dataset,
)
from ..data.prompts import PromptCache
from ..policies import FlowPolicy
from .base import autocast_dtype
from .preference_config import PreferenceDataConfig


def check_preference_splits(
    train_dataset: Dataset | None, eval_dataset: Dataset | dict[str, Dataset] | None, args: PreferenceDataConfig
) -> None:
    """Check what can be checked of all splits without reading a file, see [`check_preference_dataset`]."""
    if train_dataset is None:
        raise ValueError("`train_dataset` is missing: give preference pairs.")
    splits = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        splits |= {f"eval_dataset[{name!r}]": split for name, split in eval_dataset.items()}
    elif eval_dataset is not None:
        splits["eval_dataset"] = eval_dataset
    for name, split in splits.items():
        check_preference_dataset(split, name, args.dimension_weights)


def describe_loss(inputs: dict[str, Any], sigma: torch.Tensor, index: tuple[int, ...]) -> str:
    """What the loss of the pair at `index` of a batch is, for [`NonFiniteGuard.watch`]."""
    row, level = inputs["row"][index].item(), sigma[index].item()
    return f"the loss for the prompt {inputs['prompt'][index[0]]!r} (row {row}) at noise level {level:.4f}"


class PreferenceDataMixin:
    """Put before a Trainer that learns from preference pairs and whose configuration is a [`PreferenceDataConfig`]."""

    policy: FlowPolicy
    prompt_cache: PromptCache

    def _prepare_splits(
        self,
        train_dataset: Dataset,
        eval_dataset: Dataset | dict[str, Dataset] | None,
        args: PreferenceDataConfig,
    ) -> tuple[Dataset, Dataset | dict[str, Dataset] | None]:
        """Encode prompts and, with `cache_latents`, images or videos. The encoders stay on the accelerator."""
        self.prompt_cache = PromptCache(self.policy, args.cache_dir, args.max_sequence_length, autocast_dtype(args))
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
        return train_dataset, eval_dataset

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: None, args: PreferenceDataConfig, dataset_name: str
    ) -> Dataset:
        if is_prepared(dataset):
            return dataset
        check_preference_dataset(dataset, dataset_name, args.dimension_weights)
        with args.main_process_first(desc=f"encoding {dataset_name}"):
            self.prompt_cache.encode(column_values(dataset, "prompt"))
            return prepare_preference_dataset(
                dataset,
                self.policy,
                args.height,
                args.width,
                args.num_frames,
                args.fps,
                dimension_weights=args.dimension_weights,
                skip_bad_files=args.skip_bad_files,
                short_videos=args.short_videos,
                aspect_ratio_buckets=args.aspect_ratio_buckets and dataset_name == "train_dataset",
                cache_latents=args.cache_latents,
                cache_dir=args.cache_dir,
                name=dataset_name,
            )

    def _get_train_sampler(self, train_dataset: Dataset | BucketedPairs | None = None) -> Sampler | None:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if not isinstance(dataset, BucketedPairs):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return BucketSampler([len(part) for part in dataset.datasets], self._train_batch_size, seed)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        return super().get_eval_dataloader(self._prepare_new_pairs(eval_dataset, "eval_dataset"))

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        return super().get_test_dataloader(self._prepare_new_pairs(test_dataset, "test_dataset"))

    def _prepare_new_pairs(self, dataset: str | Dataset | None, name: str) -> str | Dataset | None:
        """What was done to the datasets of the constructor; a name or `None` stands for one of those."""
        if dataset is None or isinstance(dataset, str):
            return dataset
        check_preference_dataset(dataset, name, self.args.dimension_weights)
        if isinstance(dataset, Dataset):
            self._encode_prompts(dataset["prompt"])
        return self._prepare_dataset(dataset, None, self.args, name)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt", ROW_COLUMN, "label", "margin", "chosen", "rejected", *LATENT_COLUMNS]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if "chosen_latents" not in inputs:
            for column, side in zip(LATENT_COLUMNS, ("chosen", "rejected"), strict=True):
                inputs[column] = self.policy.encode(inputs.pop(side))
        inputs["prompt_embeds"] = self.prompt_cache.load(inputs["prompt"]).to(self.accelerator.device)
        return inputs
