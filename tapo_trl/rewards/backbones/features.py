# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Diffusion transformers that stop at an intermediate block and return what it and earlier ones have made."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from torch import nn

from ...networks.sharing import all_tensors
from .base import RewardBackboneMixin


@dataclass
class Features:
    """
    Hidden states after the tapped blocks.

    Args:
        visual (`list[torch.Tensor]`): tokens of the image or video, of shape `(batch_size, num_patches, dim)`.
        text (`list[torch.Tensor | None]`):
            tokens of the prompt, of shape `(batch_size, sequence_length, dim)`. `None` after a block that drops them.
        time (`torch.Tensor` of shape `(batch_size, dim)`): embedding of the noise level, by which blocks are modulated.
    """

    visual: list[torch.Tensor]
    text: list[torch.Tensor | None]
    time: torch.Tensor


class FeatureTransformerMixin(RewardBackboneMixin):
    """
    Mixed into a diffusers transformer, of which only the blocks up to the last tapped one are left. They compute what they
    compute in the whole transformer.

    Args:
        feature_layers (`Sequence[int]`): blocks to tap, counted from 1, in ascending order.
        transformer_config: arguments of the whole transformer.

    Attributes:
        unused_layers (`tuple[str, ...]`): modules behind the blocks, which are left out.
        text_output_layers (`tuple[str, ...]`): layers of a block after its attention that the text alone goes through.
        feature_dim (`int`): width of the features.
    """

    unused_layers: tuple[str, ...]
    text_output_layers: tuple[str, ...] = ()

    def __init__(self, feature_layers: Sequence[int], **transformer_config):
        super().__init__(**transformer_config)
        self.feature_layers = list(feature_layers)
        self.feature_dim = self.dim
        setattr(self, self.blocks_name, self.block_list[: self.feature_layers[-1]])
        for name in self.unused_layers:
            delattr(self, name)

    @classmethod
    @abstractmethod
    def last_layer_with_text(cls, num_layers: int) -> int:
        """The last block of a transformer with `num_layers` blocks after which there are text tokens."""

    @classmethod
    def from_base(
        cls, transformer: ModelMixin, feature_layers: Sequence[int], share: bool = False
    ) -> "FeatureTransformerMixin":
        """
        Copy the layers of `transformer` up to the last of `feature_layers`, each weight in its precision, or share their
        weights.
        """
        with torch.device("meta"):
            model = cls(feature_layers, **cls.base_config(transformer))
        unused = {name for name, _ in all_tensors(transformer) if model._is_unused(name)}
        model._fill(transformer, added=set(), unused=unused, share=share)
        return model

    @abstractmethod
    def embed(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> tuple:
        """Visual tokens, text tokens, the embedding of the noise level, and what else blocks read."""

    @abstractmethod
    def step(
        self, block: nn.Module, visual: torch.Tensor, text: torch.Tensor | None, time: torch.Tensor, *others
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Visual and text tokens after a block, from those before it."""

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Features:
        """Arguments are those of the whole transformer."""
        visual, text, time, *others = self.embed(*args, **kwargs)
        features = Features(visual=[], text=[], time=time)
        for number, block in enumerate(self.block_list, start=1):
            visual, text = self.step(block, visual, text, time, *others)
            if number in self.feature_layers:
                features.visual.append(visual)
                features.text.append(text)
        return features

    def _is_unused(self, name: str) -> bool:
        first, _, rest = name.partition(".")
        if first == self.blocks_name:
            return int(rest.partition(".")[0]) >= len(self.block_list)
        return first in self.unused_layers


def check_layers(feature_layers: Sequence[int], last: int, name: str) -> list[int]:
    """
    Args:
        feature_layers (`Sequence[int]`): blocks to tap, counted from 1.
        last (`int`): the last one that can be tapped.
        name (`str`): how the caller calls them, for the error.

    Returns:
        `list[int]`: the blocks.

    Raises:
        ValueError: if there are none, or if they are not in ascending order within the transformer.
    """
    layers = list(feature_layers)
    if not layers or layers != sorted(set(layers)) or layers[0] < 1 or layers[-1] > last:
        raise ValueError(f"`{name}` must be blocks of the transformer, 1 to {last} in ascending order, got {layers}.")
    return layers


def proportional_layers(shares: Sequence[float], num_layers: int) -> list[int]:
    """The blocks at these shares of the depth, counted from 1: `([0.5, 0.75], 24) -> [12, 18]`."""
    return sorted({min(max(1, round(share * num_layers)), num_layers) for share in shares})
