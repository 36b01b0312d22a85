# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Baselines: models that this package does not train, sampled by the `__call__` of their own pipelines."""

import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

import diffusers
import torch


TAKEN = ("base", "aligned", "samples", "difference")  # names of other models and columns
OURS = ("prompt", "generator", "output_type")


def parse_baselines(specs: Iterable[str], option: str = "baselines") -> dict[str, str]:
    """
    Names and paths of `NAME=PATH`, of an option.

    Raises:
        ValueError: if one is not written so, or if its name is another's.
    """
    paths: dict[str, str] = {}
    for spec in specs:
        name, _, path = spec.partition("=")
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name) or not path.strip():
            raise ValueError(
                f"`{option}`: write `NAME=ID`, such as `sdxl=stabilityai/stable-diffusion-xl-base-1.0`, not `{spec}`."
            )
        if name in paths or name in TAKEN:
            raise ValueError(f"`{option}`: the name `{name}` is taken. Give each a name of its own.")
        paths[name] = path
    return paths


class Baseline:
    """
    A text-to-image or text-to-video pipeline of diffusers. Weights are loaded at the first sample, from safetensors only.

    Args:
        name (`str`): what it is called.
        path (`str`): Hub id or folder.
        dtype (`torch.dtype`): precision of the weights.
        options (`dict[str, Any]`, *optional*): arguments of the pipeline's `__call__`. Others have the pipeline's own defaults.

    Raises:
        ValueError: if it is no such pipeline, or if it has no such argument.
        OSError: if it is not found.
    """

    def __init__(self, name: str, path: str, dtype: torch.dtype, options: dict[str, Any] | None = None):
        self.name, self.path, self.dtype, self.options = name, path, dtype, options or {}
        components = diffusers.DiffusionPipeline.load_config(path)
        class_name = components.get("_class_name")
        # A component that was saved as absent has to be passed as `None` to diffusers.
        self.absent = {part: None for part, value in components.items() if value == [None, None]}
        pipeline_class = getattr(diffusers, str(class_name), None)
        if pipeline_class is None:
            raise ValueError(f"The baseline `{name}` is a `{class_name}`, which is no pipeline of diffusers.")
        known = inspect.signature(pipeline_class.__call__).parameters
        needed = [key for key, parameter in known.items() if parameter.default is inspect.Parameter.empty]
        if not set(OURS) <= set(known) or not set(needed) <= {"self", "prompt", "args", "kwargs"}:
            raise ValueError(f"The baseline `{name}` is a `{class_name}`, which makes nothing of a prompt alone.")
        unknown = [option for option in self.options if option not in known or option in OURS]
        if unknown:
            raise ValueError(
                f"The baseline `{name}`, a `{class_name}`, cannot be called with `{unknown[0]}`: leave it out of `baseline_kwargs`."
            )
        self.modality = "video" if "num_frames" in known else "image"
        self.pipeline: diffusers.DiffusionPipeline | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What its samples depend on, beside the prompts and seeds."""
        return {"model": self.path, "torch_dtype": str(self.dtype), "options": self.options}

    def load(self, device: torch.device) -> None:
        """Load the weights, if they are not loaded yet."""
        if self.pipeline is None:
            self.pipeline = diffusers.DiffusionPipeline.from_pretrained(
                self.path, dtype=self.dtype, use_safetensors=True, **self.absent
            ).to(device)
            self.pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], batch_size: int, device: torch.device
    ) -> torch.Tensor:
        """
        Draw one sample per prompt.

        Args:
            prompts (`Sequence[str]`): prompts.
            seeds (`Sequence[int]`): seed of each sample.
            batch_size (`int`): prompts at once.
            device (`torch.device`): where to compute.

        Returns:
            `torch.Tensor` of shape `(N, 3, H, W)`, or `(N, 3, F, H, W)` of videos: float32 in [0, 1], on the CPU.
        """
        self.load(device)
        samples = []
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
            output = self.pipeline(prompt=list(prompts[rows]), generator=generators, output_type="pt", **self.options)
            pixels = output.frames.transpose(1, 2) if self.modality == "video" else output.images
            if pixels.shape[1] != 3:
                raise ValueError(f"The baseline `{self.name}` made no {self.modality}s, but {tuple(pixels.shape)}.")
            samples.append(pixels.float().clamp(0, 1).cpu())
        return torch.cat(samples)
