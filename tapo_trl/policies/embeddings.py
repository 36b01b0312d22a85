# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F


class PromptEmbeddings:
    """
    Encoded prompts: named tensors with one row per prompt.

    `<name>_mask` says which tokens of `<name>` count. Such sequences are padded on the right, and cut to the longest one of
    the rows that are present.

    Args:
        prompt_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, dim)`):
            Embeddings of the tokens.
        pooled_prompt_embeds (`torch.Tensor` of shape `(batch_size, pooled_dim)`, *optional*):
            Pooled embeddings, for the families that have them.
        tensors (`torch.Tensor`, *optional*):
            What else a family's transformer reads of a prompt, and masks: bool, of shape `(batch_size, sequence_length)`.

    Raises:
        ValueError: if a mask has a token that counts behind one that does not.
    """

    def __init__(
        self,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor | None = None,
        **tensors: torch.Tensor | None,
    ):
        tensors = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds, **tensors}
        self.tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        for name in self._masks():
            mask = self.tensors[name] = self.tensors[name].bool()
            if (mask[:, 1:] & ~mask[:, :-1]).any():
                raise ValueError(f"`{name}` has tokens that count behind some that do not: pad on the right.")
        self._cut()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Checkpoints of version 0.1 hold the fields themselves
        tensors = state.get("tensors", state)
        self.tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @property
    def prompt_embeds(self) -> torch.Tensor:
        return self.tensors["prompt_embeds"]

    @property
    def pooled_prompt_embeds(self) -> torch.Tensor | None:
        return self.tensors.get("pooled_prompt_embeds")

    @property
    def device(self) -> torch.device:
        return self.prompt_embeds.device

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, index: slice | list[int] | torch.Tensor) -> "PromptEmbeddings":
        return self._map(lambda tensor: tensor[index])._cut()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "PromptEmbeddings":
        """Move all tensors, and cast those of floating-point numbers."""
        return self._map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def repeat(self, times: int) -> "PromptEmbeddings":
        """`[a, b] -> [a, b, a, b]`."""
        return self._map(lambda tensor: tensor.repeat(times, *[1] * (tensor.ndim - 1)))

    def repeat_interleave(self, times: int) -> "PromptEmbeddings":
        """`[a, b] -> [a, a, b, b]`."""
        return self._map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def expand(self, batch_size: int) -> "PromptEmbeddings":
        """One prompt, as a view of `batch_size` of them."""
        return self._map(lambda tensor: tensor.expand(batch_size, *tensor.shape[1:]))

    @staticmethod
    def cat(parts: Sequence["PromptEmbeddings"]) -> "PromptEmbeddings":
        """Join batches of the same family. Masked sequences are padded to a common length."""
        masks = parts[0]._masks()
        padded = {*masks, *(name.removesuffix("_mask") for name in masks)}
        tensors = {}
        for name in parts[0].tensors:
            rows = [part.tensors[name] for part in parts]
            if name in padded:
                longest = max(part.shape[1] for part in rows)
                rows = [F.pad(part, (*[0] * (2 * part.ndim - 4), 0, longest - part.shape[1])) for part in rows]
            tensors[name] = torch.cat(rows)
        return PromptEmbeddings(**tensors)

    def rows(self) -> list[dict[str, torch.Tensor]]:
        """The tensors of each prompt by name, without the batch dimension and with its own tokens only."""
        return [{name: tensor[0] for name, tensor in self[[row]].tensors.items()} for row in range(len(self))]

    def _masks(self) -> list[str]:
        return [name for name in self.tensors if name.endswith("_mask")]

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "PromptEmbeddings":
        mapped = object.__new__(PromptEmbeddings)
        mapped.tensors = {name: function(tensor) for name, tensor in self.tensors.items()}
        return mapped

    def _cut(self) -> "PromptEmbeddings":
        for mask in self._masks():
            longest = max(int(self.tensors[mask].sum(1).max()), 1)
            for name in (mask, mask.removesuffix("_mask")):
                self.tensors[name] = self.tensors[name][:, :longest]
        return self
