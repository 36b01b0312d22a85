# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Sampling with the tiny `WanPipeline` of the moving-emoji world.

pipeline = load_pipeline()
clips = sample(pipeline, ["panda face moving left"])  # [1, 3, 9, 48, 48] in [-1, 1]
"""

from pathlib import Path

import torch
from clips import FRAMES, HERE, SIZE
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline


MAX_LENGTH = 8  # the `max_sequence_length` of the pipeline call; the longest prompt has five tokens
SHIFT = 3.0


def use_euler(pipeline: WanPipeline) -> WanPipeline:
    """Replaces the scheduler by the Euler steps that preference training takes, with the same shift."""
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_pipeline(folder: Path | str = HERE / "pipeline") -> WanPipeline:
    """Loads an exported pipeline in single precision, with the Euler steps that preference training takes."""
    return use_euler(WanPipeline.from_pretrained(folder))


def sample(
    pipeline: WanPipeline, prompts: list[str], seed: int = 0, steps: int = 16, guidance: float = 1.5
) -> torch.Tensor:
    """Samples one clip per prompt, `[N, 3, 9, 48, 48]` in [-1, 1]; clip `i` has the seed `1000 * seed + i`."""
    frames = pipeline(
        prompts,
        height=SIZE,
        width=SIZE,
        num_frames=FRAMES,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=MAX_LENGTH,
        generator=[torch.Generator().manual_seed(1000 * seed + i) for i in range(len(prompts))],
        output_type="pt",
    ).frames
    return frames.transpose(1, 2) * 2 - 1
