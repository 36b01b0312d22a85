# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Wan2.2-T2V-A14B: Wan with two experts."""

import os

import torch
from diffusers import WanPipeline
from diffusers.training_utils import _collate_lora_metadata
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..files import local_file
from .base import Defaults
from .experts import EXPERTS, ExpertStack
from .lora_files import lora_layers
from .wan import WanPolicy


LORA_FILES = {"transformer": "pytorch_lora_weights.safetensors", "transformer_2": "pytorch_lora_weights_2.safetensors"}


class WanExpertsPolicy(WanPolicy):
    """
    [`~diffusers.WanPipeline`] of Wan2.2-T2V-A14B as a policy. Its network is an [`ExpertStack`]: `transformer` predicts at noise
    levels of the pipeline's `boundary_ratio` and more, `transformer_2` below. LoRA weights are one file per expert.

    Attributes:
        guidance_scale_2 (`float`, *optional*): guidance scale of `transformer_2`, by default that of `transformer`.
    """

    guidance_scale_2: float | None = None
    _expert: str | None = None

    def __init__(self, pipeline: WanPipeline):
        super().__init__(pipeline)
        boundary = pipeline.config.boundary_ratio * pipeline.scheduler.config.num_train_timesteps
        self._network = ExpertStack(pipeline.transformer, pipeline.transformer_2, boundary)

    @property
    def transformer(self) -> ExpertStack:
        return self._network

    @transformer.setter
    def transformer(self, network: ExpertStack) -> None:
        self._network = network
        self.pipeline.transformer, self.pipeline.transformer_2 = network.transformer, network.transformer_2

    @property
    def transformer_class(self) -> str:
        return type(self._network.transformer).__name__

    @property
    def experts(self):
        return dict(self._network.named_children())

    @property
    def defaults(self) -> Defaults:
        return Defaults(height=480, width=832, num_frames=81, num_inference_steps=40, guidance_scale=4.0)

    @property
    def trained_experts(self):
        return list(self.experts) if self._expert is None else [EXPERTS[self._expert]]

    def configure_experts(self, expert=None, guidance_scale_2=None, guidance_scale=None):
        if None not in (guidance_scale, guidance_scale_2) and not self.is_guided(guidance_scale):
            raise ValueError(
                f"`guidance_scale_2={guidance_scale_2:g}` has no effect with `guidance_scale={guidance_scale:g}`, which turns guidance "
                "off: leave it unset, or set the latter to more than 1."
            )
        self._expert, self.guidance_scale_2 = expert, guidance_scale_2

    def only(self, expert: str) -> WanPolicy:
        components = self.pipeline.components | {"transformer": self.experts[EXPERTS[expert]], "transformer_2": None}
        policy = WanPolicy(type(self.pipeline)(**components))
        policy.name_or_path, policy.subfolder = self.name_or_path, EXPERTS[expert]
        policy.revision, policy.variant = self.revision, self.variant
        return policy

    def uses_expert(self, name, sigma):
        is_high = self._network.is_high(sigma * 1000)
        return is_high if name == EXPERTS["high"] else ~is_high

    def guidance_at(self, sigma, guidance_scale):
        if self.guidance_scale_2 is None:
            return guidance_scale
        is_high = self._network.is_high(sigma * 1000).view(-1, 1, 1, 1, 1)
        return torch.where(is_high, guidance_scale, self.guidance_scale_2)

    @classmethod
    def tiny(cls, seed: int = 0, **transformer_config) -> WanPipeline:
        """Wan2.2-T2V-A14B's architecture."""
        return super().tiny(seed, experts=2, **transformer_config)

    def save_lora_weights(self, save_directory, model, state_dict=None):
        layers, metadata = lora_layers(model, state_dict), _collate_lora_metadata({"transformer": model})
        for own in metadata.values():
            own["exclude_modules"] = None  # the other expert
        for expert in self.trained_experts:
            prefix = f"{expert}."
            own = {name.removeprefix(prefix): layers[name] for name in layers if name.startswith(prefix)}
            self.pipeline.save_lora_weights(save_directory, own, weight_name=LORA_FILES[expert], **metadata)

    def load_lora_weights(self, name_or_path: str) -> None:
        found = 0
        for expert, file in LORA_FILES.items():
            try:
                path = local_file(name_or_path, file)
            except LocalEntryNotFoundError:  # unreachable, which says nothing of the repository
                raise
            except EntryNotFoundError:
                continue
            if os.path.isfile(path):
                self.pipeline.load_lora_weights(
                    path, use_safetensors=True, load_into_transformer_2=expert == "transformer_2"
                )
                found += 1
        if not found:
            raise ValueError(f"`{name_or_path}` has no LoRA weights: there is none of {list(LORA_FILES.values())}.")

    @property
    def lora_calls(self) -> list[str]:
        options = {"transformer": "", "transformer_2": ", load_into_transformer_2=True"}
        return [
            f'pipeline.load_lora_weights("{{model}}", weight_name="{LORA_FILES[expert]}"{options[expert]})'
            for expert in self.trained_experts
        ]
