# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What families of videos share: [`VideoPolicy`]."""

import math

import torch

from .base import FlowPolicy


class VideoPolicy(FlowPolicy):
    """
    A text-to-video pipeline whose autoencoder has frames of its own and groups of frames behind the first one.

    Attributes:
        patch_sizes (`tuple[int, int, int]`): frames, rows and columns of a latent that are one token.
    """

    modality = "video"

    @property
    def patch_sizes(self) -> tuple[int, int, int]:
        config = self.transformer.config
        return config.patch_size_t, config.patch_size, config.patch_size

    @property
    def latent_channels(self) -> int:
        return self.transformer.config.in_channels

    @property
    def encoder_device(self) -> torch.device:
        """
        Where the text encoders are.

        Raises:
            ValueError: if one is missing.
        """
        encoders = [self.pipeline.components[name] for name in self.text_encoder_names]
        if None in encoders:
            raise ValueError("The pipeline has no text encoder (any more): encode prompts before it is unloaded.")
        return encoders[0].device

    def latent_shape(self, height: int, width: int, num_frames: int | None = None) -> tuple[int, ...]:
        if num_frames is None:
            raise ValueError(f"`num_frames` is missing: `{self.name_or_path}` makes videos, for example of 81 frames.")
        space, time = self.pipeline.vae_scale_factor_spatial, self.pipeline.vae_scale_factor_temporal
        multiples = [space * patch for patch in self.patch_sizes[1:]]

        nearest = [max(round(size / m), 1) * m for size, m in zip((height, width), multiples, strict=True)]
        nearest.append(max(round((num_frames - 1) / time), 0) * time + 1)
        if [height, width, num_frames] != nearest:
            raise ValueError(
                f"`height` and `width` must be multiples of {multiples[0]} and {multiples[1]} pixels, and `num_frames` "
                f"one more than a multiple of {time}, but they are {height}, {width} and {num_frames}. The nearest that "
                f"fit are {nearest[0]}, {nearest[1]} and {nearest[2]}."
            )
        return self.latent_channels, (num_frames - 1) // time + 1, height // space, width // space

    def num_tokens(self, latent_shape, max_sequence_length: int = 0) -> tuple[int, int]:
        _, *sides = latent_shape
        tokens = math.prod(side // patch for side, patch in zip(sides, self.patch_sizes, strict=True))
        return tokens, max_sequence_length
