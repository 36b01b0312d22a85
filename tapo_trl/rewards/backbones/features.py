# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Diffusion transformers that stop at an intermediate block and return what it and earlier ones have made."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
        time (`torch.Tensor` of shape `(batch_size, time_dim)`): embedding of the noise level, by which blocks are modulated.
        text_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            which tokens of the prompt are no padding, bool. By default all.
    """

    visual: list[torch.Tensor]
    text: list[torch.Tensor | None]
    time: torch.Tensor
    text_mask: torch.Tensor | None = None


class FeatureTransformerMixin(RewardBackboneMixin):
    """
    Mixed into a diffusers transformer, of which only the blocks up to the last tapped one are left. They compute what they
    compute in the whole transformer. Its forward takes the arguments of the whole one and returns [`Features`].

    Args:
        feature_layers (`Sequence[int]`): blocks to tap, counted from 1 through all lists of blocks, in ascending order.
        transformer_config: arguments of the whole transformer.

    Attributes:
        unused_layers (`tuple[str, ...]`): modules behind the blocks, which are left out.
        text_output_layers (`tuple[str, ...]`): layers of a block after its attention that the text alone goes through.
    """

    unused_layers: tuple[str, ...]
    text_output_layers: tuple[str, ...] = ()

    def __init__(self, feature_layers: Sequence[int], **transformer_config):
        super().__init__(**transformer_config)
        self.feature_layers = list(feature_layers)
        left = self.feature_layers[-1]
        for name in self.blocks_names:
            blocks = getattr(self, name)
            setattr(self, name, blocks[:left])
            left = max(left - len(blocks), 0)
        for name in self.unused_layers:
            self._leave_out(name)

    def _leave_out(self, name: str) -> None:
        delattr(self, name)

    @property
    def feature_dim(self) -> int:
        """Width of the features."""
        return self.dim

    @property
    def time_dim(self) -> int:
        """Width of the embedding of the noise level."""
        return self.dim

    @classmethod
    def num_blocks(cls, transformer_config: Mapping[str, Any]) -> int:
        """Blocks of the whole transformer."""
        return transformer_config["num_layers"]

    @classmethod
    def last_layer_with_text(cls, num_layers: int) -> int:
        """The last block of a transformer with `num_layers` blocks after which there are text tokens."""
        return num_layers

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

    def _is_unused(self, name: str) -> bool:
        first, _, rest = name.partition(".")
        if first in self.blocks_names:
            return int(rest.partition(".")[0]) >= len(getattr(self, first))
        return any(name == layer or name.startswith(f"{layer}.") for layer in self.unused_layers)


class SteppedFeatureTransformerMixin(FeatureTransformerMixin):
    """A [`FeatureTransformerMixin`] that calls block by block."""

    @abstractmethod
    def embed(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> tuple:
        """Visual tokens, text tokens, the embedding of the noise level, and what else blocks read."""

    @abstractmethod
    def step(
        self, block: nn.Module, visual: torch.Tensor, text: torch.Tensor | None, time: torch.Tensor, *others
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Visual and text tokens after a block, from those before it."""

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Features:
        visual, text, time, *others = self.embed(*args, **kwargs)
        features = Features(visual=[], text=[], time=time)
        for number, block in enumerate(self.block_list, start=1):
            visual, text = self.step(block, visual, text, time, *others)
            if number in self.feature_layers:
                features.visual.append(visual)
                features.text.append(text)
        return features


class LeftOut(nn.Module):
    """In the place of a layer whose result nobody reads."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


class HookedFeatureTransformerMixin(FeatureTransformerMixin):
    """
    A [`FeatureTransformerMixin`] that runs the forward of the transformer in diffusers, and reads what tapped blocks return
    by hooks. Its arguments are passed by name.

    Attributes:
        time_layer (`str`): module that returns the embedding of the noise level.
    """

    time_layer: str

    def _leave_out(self, name: str) -> None:
        self.set_submodule(name, LeftOut())

    def split(self, output: Any, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            output: what a block returns.
            inputs (`Mapping`): arguments of the forward.

        Returns:
            `tuple`: its visual and its text tokens.
        """
        if isinstance(output, tuple):
            text, visual = output
            return visual, text
        count = inputs["encoder_hidden_states"].shape[1]
        return output[:, count:], output[:, :count]

    def text_mask(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """Which tokens of the prompt are no padding, from the arguments of the forward."""
        return inputs.get("encoder_hidden_states_mask")

    def forward(self, **inputs: Any) -> Features:
        blocks = self.block_list
        modules = [self.get_submodule(self.time_layer), *(blocks[number - 1] for number in self.feature_layers)]
        outputs: list[Any] = []
        hooks = [
            module.register_forward_hook(lambda module, args, output: outputs.append(output)) for module in modules
        ]
        try:
            self.base_class.forward(self, **inputs, return_dict=False)
        finally:
            for hook in hooks:
                hook.remove()
        time, *states = outputs
        visual, text = zip(*(self.split(state, inputs) for state in states), strict=True)
        return Features(list(visual), list(text), time, self.text_mask(inputs))


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
