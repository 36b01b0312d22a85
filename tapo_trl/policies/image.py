# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What several families of images share: [`ImagePolicy`], and packing of latents."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from .base import FlowPolicy


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents of shape `(B, C, H, W)` as tokens of 2 x 2 positions, of shape `(B, H / 2 * W / 2, 4 * C)`."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """The way back of [`pack`], in the shape of `latents`."""
    height, width = latents.shape[2:]
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def linear_sigmas(num_inference_steps: int) -> np.ndarray:
    """Noise levels that most pipelines give to their scheduler: from 1 to 1 / T in equal steps."""
    return np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)


class ImagePolicy(FlowPolicy):
    """
    A text-to-image pipeline that samples with flow-matching Euler steps.

    Attributes:
        latent_channels (`int`): channels of a latent.
        patch_size (`int`): positions of a latent, on a side, that are one token.
    """

    modality = "image"
    comfyui_knows_layers = True  # `model_lora_keys_unet` in its `comfy/lora.py`
    patch_size: int = 2

    def __init__(self, pipeline: DiffusionPipeline):
        super().__init__(pipeline)
        if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"The pipeline's scheduler is a `{type(pipeline.scheduler).__name__}`; a "
                "`FlowMatchEulerDiscreteScheduler` is needed, since steps of a multistep method have no density."
            )

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def encoder_device(self) -> torch.device:
        """
        Where the text encoders are.

        Raises:
            ValueError: if one is missing.
        """
        encoders = {name: self.pipeline.components[name] for name in self.text_encoder_names}
        missing = [name for name, encoder in encoders.items() if encoder is None]
        if missing:
            raise ValueError(f"The pipeline has no `{missing[0]}` (any more): encode prompts before it is unloaded.")
        return next(iter(encoders.values())).device

    def latent_shape(self, height: int, width: int, num_frames: int | None = None) -> tuple[int, ...]:
        if num_frames is not None:
            raise ValueError(f"`num_frames={num_frames}` was given, but `{self.name_or_path}` makes images.")
        scale, patch_size = self.pipeline.vae_scale_factor, self.patch_size
        multiple = scale * patch_size
        if height % multiple or width % multiple or height <= 0 or width <= 0:
            raise ValueError(
                f"The resolution must be a multiple of {multiple} pixels (VAE factor {scale} x patch size "
                f"{patch_size}), got {height} x {width}."
            )
        return self.latent_channels, height // scale, width // scale

    def num_tokens(self, latent_shape, max_sequence_length: int = 0) -> tuple[int, int]:
        _, height, width = latent_shape
        return height // self.patch_size * (width // self.patch_size), max_sequence_length
