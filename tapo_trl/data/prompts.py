# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Prompts and their embeddings, kept on disk so that the text encoders run once per prompt, ever."""

import hashlib
import json
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from ..files import atomic_write, cache_root, update_with_weights
from ..policies import FlowPolicy, PromptEmbeddings
from .columns import check_prompts, refuse_transform, stored_table


logger = logging.get_logger(__name__)

ROW_COLUMN = "tapo_row"
LARGE_CACHE = 1e9  # bytes of embeddings, of which a warning tells

_VERSION = 1  # raise it when other embeddings come out of the same encoders
_PROBE = "A red fox, two cats & 3 dogs: naïve CAFÉ, 猫!"  # how a tokenizer splits, beside its vocabulary
_SIZES_OF_EMBEDDINGS = ("joint_attention_dim", "pooled_projection_dim", "text_dim")
_NO_MATTER = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype")  # of a text encoder


def default_prompts() -> Dataset:
    """The prompts that ship with the package, one per row, in the column `prompt`."""
    text = resources.files("tapo_trl.data").joinpath("prompts.txt").read_text(encoding="utf-8")
    return Dataset.from_dict({"prompt": [line for line in text.splitlines() if line]})


def prepare_prompts(dataset: Dataset, name: str) -> Dataset:
    """
    Check the prompts and number the rows: the noise of a rollout depends on the row, not on the process. The rows are
    plain Python objects then, whatever the dataset's format was.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(f"`{name}` must be a `datasets.Dataset`, got `{type(dataset).__name__}`.")
    refuse_transform(dataset, name)
    dataset = dataset.with_format(None)
    if "prompt" not in dataset.column_names:
        raise ValueError(f"`{name}` needs a column `prompt`, but has {dataset.column_names}. Rename yours.")
    check_prompts(dataset, name)
    if ROW_COLUMN in dataset.column_names:
        dataset = dataset.remove_columns(ROW_COLUMN)
    table, rows = stored_table(dataset)
    if len(np.unique(rows)) < len(rows):  # a row that comes twice has two numbers
        return dataset.add_column(ROW_COLUMN, list(range(len(dataset))))
    numbers = np.zeros(len(table), dtype=np.int64)
    numbers[rows] = np.arange(len(rows))
    return concatenate_datasets([table, Dataset.from_dict({ROW_COLUMN: numbers})], axis=1).select(rows)


def encoder_fingerprint(policy: FlowPolicy, max_sequence_length: int | None, dtype: torch.dtype | None) -> str:
    """
    Short hash of all that embeddings of prompts depend on beside the prompts: tokenizers and text encoders, their number of
    tokens and their precisions, and the sizes that the transformer wants.

    Args:
        policy ([`FlowPolicy`]): policy that encodes.
        max_sequence_length (`int`, *optional*): number of tokens of a prompt.
        dtype (`torch.dtype`, *optional*): see [`PromptCache`].
    """
    sizes = [policy.transformer.config.get(name) for name in _SIZES_OF_EMBEDDINGS]
    key = [_VERSION, type(policy).__name__, max_sequence_length, str(dtype), sizes]
    digest = hashlib.sha256(json.dumps(key).encode())
    for name in policy.text_encoder_names:
        encoder = policy.pipeline.components[name]
        digest.update(name.encode())
        if encoder is not None:
            components = policy.pipeline.components
            tokenizer = components.get(name.replace("text_encoder", "tokenizer")) or components["processor"]
            tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
            vocabulary = sorted(tokenizer.get_vocab().items())
            sides = [tokenizer.pad_token_id, tokenizer.padding_side, tokenizer.truncation_side]
            tokens = tokenizer(_PROBE, verbose=False).input_ids  # no warning that they are too many for the encoder
            key = [tokenizer.model_max_length, tokens, vocabulary, sides, str(encoder.dtype)]
            digest.update(json.dumps(key).encode())
            config = {key: value for key, value in encoder.config.to_dict().items() if key not in _NO_MATTER}
            digest.update(json.dumps(config, sort_keys=True, default=str).encode())
            update_with_weights(digest, encoder)
    return digest.hexdigest()[:16]


class PromptCache:
    """
    Prompt embeddings on disk, one safetensors file per prompt, in a folder per text encoder. Zeros at the end of a prompt, with
    which some families pad, are counted and not stored.

    Args:
        policy ([`FlowPolicy`]):
            Policy that encodes. Its text encoders are needed only for prompts that are not on disk yet.
        cache_dir (`str` or `Path`, *optional*):
            Root of the cache. Defaults to `tapo_trl/prompts` in the Hugging Face home.
        max_sequence_length (`int`, *optional*, defaults to `256`):
            Number of tokens of a prompt.
        dtype (`torch.dtype`, *optional*):
            Precision in which float32 embeddings are stored. Nothing is lost if it is the one in which the transformer
            reads them: that of its weights, or that of autocast. Defaults to that of the text encoders.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        cache_dir: str | Path | None = None,
        max_sequence_length: int = 256,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.policy = policy
        self.max_sequence_length = max_sequence_length
        self.dtype = dtype
        root = cache_root(cache_dir) / ("prompts" if cache_dir is None else "")
        self.folder = root / encoder_fingerprint(policy, max_sequence_length, dtype)

    def _file(self, prompt: str) -> Path:
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.safetensors"

    def missing(self, prompts: list[str]) -> list[str]:
        """The prompts that are not on disk yet, each once."""
        return [prompt for prompt in dict.fromkeys(prompts) if not self._file(prompt).exists()]

    def encode(self, prompts: list[str], batch_size: int = 32) -> None:
        """
        Encode the prompts that are not on disk yet. Safe to interrupt, and to run in several processes at once. After the first
        batch, a warning says what all of them will take on disk, if that is much.
        """
        missing = self.missing(prompts)
        self.folder.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            embeds = self.policy.encode_prompts(batch, self.max_sequence_length).to("cpu")
            if embeds.prompt_embeds.dtype == torch.float32:
                embeds = embeds.to(dtype=self.dtype)
            size = sum(self._write(prompt, row) for row, prompt in zip(embeds.rows(), batch, strict=True)) / len(batch)
            if start == 0 and len(missing) * size > LARGE_CACHE:
                logger.warning(
                    f"The embeddings of {len(missing):,} prompts will take about {len(missing) * size / 1e9:,.1f} GB in "
                    f"{self.folder}: {size / 1e6:.1f} MB each. `cache_dir` puts them elsewhere, and half precision (`bf16` or "
                    "`torch_dtype`) halves those that are in float32."
                )

    def _write(self, prompt: str, row: dict[str, torch.Tensor]) -> int:
        """Write the embeddings of a prompt, and return their bytes."""
        tokens = row["prompt_embeds"]
        last = tokens.any(dim=-1).nonzero().max() if tokens.any() else -1
        tensors = row | {"prompt_embeds": tokens[: last + 1]}
        # Copies, which take the disk space of what is left alone
        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        tensors["sequence_length"] = torch.tensor(len(tokens))
        with atomic_write(self._file(prompt)) as aside:
            save_file(tensors, aside)
        return sum(tensor.nbytes for tensor in tensors.values())

    def load(self, prompts: list[str]) -> PromptEmbeddings:
        """
        Embeddings of `prompts`, on the CPU, in the precision in which they are stored.

        Raises:
            KeyError: if a prompt has not been encoded.
        """
        rows = []
        for prompt in prompts:
            file = self._file(prompt)
            if not file.exists():
                raise KeyError(f"The prompt {prompt!r} was not encoded before the text encoders were unloaded.")
            tensors = load_file(file)
            missing = tensors.pop("sequence_length").item() - len(tensors["prompt_embeds"])
            tensors["prompt_embeds"] = F.pad(tensors["prompt_embeds"], (0, 0, 0, missing))
            rows.append(PromptEmbeddings(**{name: tensor[None] for name, tensor in tensors.items()}))
        return PromptEmbeddings.cat(rows)
