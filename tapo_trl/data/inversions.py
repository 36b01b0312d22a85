# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Inverted trajectories of clean latents, kept on disk so that each is computed once."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..files import atomic_write, cache_root
from ..policies import FlowPolicy
from .prompts import encoder_fingerprint


_VERSION = 1  # raise it when `FlowPolicy.invert` returns something else


class InversionCache:
    """
    What [`FlowPolicy.invert`] returns, one safetensors file per clean latent and prompt, in a folder for all that it depends
    on beside those: the transformer, the sampling steps, and what turns prompts into embeddings.

    Args:
        policy ([`FlowPolicy`]): the policy, before an adapter is added, with its text encoders.
        cache_dir (`str` or `Path`, *optional*): root of the cache. Defaults to `tapo_trl` in the Hugging Face home.
        num_inference_steps (`int`): number of sampling steps.
        details (`tuple`): what else the trajectories depend on, such as the precision.
        max_sequence_length (`int`, *optional*): number of tokens of the embeddings.
        embeds_dtype (`torch.dtype`, *optional*): precision in which they are kept, see [`PromptCache`].
    """

    def __init__(
        self,
        policy: FlowPolicy,
        cache_dir: str | Path | None,
        num_inference_steps: int,
        details: tuple = (),
        max_sequence_length: int | None = None,
        embeds_dtype: torch.dtype | None = None,
    ):
        root = cache_root(cache_dir)
        config = {name: value for name, value in policy.pipeline.scheduler.config.items() if not name.startswith("_")}
        encoders = encoder_fingerprint(policy, max_sequence_length, embeds_dtype)
        key = (
            _VERSION,
            policy.transformer_fingerprint(),
            sorted(config.items()),
            num_inference_steps,
            encoders,
            details,
        )
        self.folder = root / "inversions" / hashlib.sha256(repr(key).encode()).hexdigest()[:16]

    def _file(self, prompt: str, latent: torch.Tensor) -> Path:
        digest = hashlib.sha256(prompt.encode())
        digest.update(latent.float().cpu().contiguous().numpy().tobytes())
        return self.folder / f"{digest.hexdigest()[:32]}.safetensors"

    def load(self, prompts: list[str], latents: torch.Tensor) -> torch.Tensor | None:
        """
        Args:
            prompts (`list[str]`): one per latent.
            latents (`torch.Tensor` of shape `(batch_size, *latent_shape)`): clean latents.

        Returns:
            `torch.Tensor` of shape `(num_inference_steps, batch_size, *latent_shape)` on the device of `latents`, or `None`
            if one of the trajectories is not on disk.
        """
        files = [self._file(prompt, latent) for prompt, latent in zip(prompts, latents, strict=True)]
        if not all(file.exists() for file in files):
            return None
        return torch.stack([load_file(file)["trajectory"] for file in files], dim=1).to(latents.device)

    def save(self, prompts: list[str], latents: torch.Tensor, trajectories: torch.Tensor) -> None:
        """Keep trajectories, of the shape that [`~InversionCache.load`] returns. Safe in several processes at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for prompt, latent, trajectory in zip(prompts, latents, trajectories.unbind(1), strict=True):
            file = self._file(prompt, latent)
            with atomic_write(file) as aside:
                save_file({"trajectory": trajectory.cpu().contiguous()}, aside)
