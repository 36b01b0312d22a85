# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass, field
from typing import Literal

from ..estimate.known_pipelines import SIZES


@dataclass
class BenchArguments:
    """
    Arguments of `tapo-trl bench`.

    Parameters:
        size (`str`, *optional*, defaults to `"tiny"`):
            Networks with random weights: `"tiny"` (SD3) and `"tiny_wan"`, for a CPU, or `"sd35"` (SD3.5-medium) and `"wan21"`
            (Wan2.1 1.3B). It also gives the defaults of what is left out below.
        model_name_or_path (`str`, *optional*):
            A pipeline to load instead.
        device (`str`, *optional*, defaults to `"cpu"`):
            Where to run.
        torch_dtype (`str`, *optional*, defaults to `"float32"`):
            Precision of the frozen weights.
        height (`int`, *optional*):
            Height of a sample in pixels.
        width (`int`, *optional*):
            Width of a sample in pixels.
        num_frames (`int`, *optional*):
            Number of frames of a video.
        max_sequence_length (`int`, *optional*):
            Number of tokens of the T5 or UMT5 text encoder.
        num_inference_steps (`int`, *optional*):
            Sampling steps T.
        num_sde_steps (`list[int]`, *optional*, defaults to `[2, 4, 8, 16]`):
            Stochastic steps n.
        num_candidates (`list[int]`, *optional*, defaults to `[2, 4]`):
            Candidates P per branch.
        prompts (`list[int]`, *optional*, defaults to `[1, 4, 8]`):
            Prompts per batch.
        sweep_steps (`list[int]`, *optional*):
            Other values of T to run the first n and prompts and the last P with.
        sweep_resolutions (`list[int]`, *optional*):
            Heights and widths to do the same with.
        guidance_scale (`float`, *optional*, defaults to `4.5`):
            Scale of classifier-free guidance, none if at most 1.
        score_batch_size (`int`, *optional*):
            Candidates per forward of the reward model. All of a step by default.
        transition_batch_size (`int`, *optional*, defaults to `1`):
            Transition pairs per forward and backward.
        lora_r (`int`, *optional*, defaults to `64`):
            Rank of the LoRA.
        share_backbone (`bool`, *optional*, defaults to `False`):
            Whether policy and reward model share one set of base weights.
        layerwise_casting (`bool`, *optional*, defaults to `False`):
            Whether the policy's frozen linear layers are kept in float8.
        reward_layerwise_casting (`bool`, *optional*, defaults to `False`):
            Whether the reward model's linear layers are kept in float8.
        reward_group_offload (`bool`, *optional*, defaults to `False`):
            Whether the reward model stays on the CPU and lends its blocks to the device.
        attention_backend (`str`, *optional*):
            Another implementation of attention, by diffusers' name.
        torch_compile (`bool`, *optional*, defaults to `False`):
            Whether every transformer block is compiled.
        repeats (`int`, *optional*, defaults to `3`):
            How often everything is run. The median counts.
        warm_up (`bool`, *optional*, defaults to `True`):
            Whether to run everything once before.
        plot (`bool`, *optional*, defaults to `True`):
            Whether to draw `bench.png`, which needs matplotlib.
        output_dir (`str`, *optional*, defaults to `"bench"`):
            Where to write `bench.json`, `bench.md` and `bench.png`.
    """

    size: Literal["tiny", "tiny_wan", "sd35", "wan21"] = field(
        default="tiny", metadata={"help": "Networks with random weights; gives the defaults of what is left out."}
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "A pipeline to load instead."})
    device: str = field(default="cpu", metadata={"help": "Where to run."})
    torch_dtype: Literal["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"] = field(
        default="float32", metadata={"help": "Precision of the frozen weights."}
    )
    height: int | None = field(default=None, metadata={"help": "Height of a sample in pixels."})
    width: int | None = field(default=None, metadata={"help": "Width of a sample in pixels."})
    num_frames: int | None = field(default=None, metadata={"help": "Number of frames of a video."})
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "Number of tokens of the T5 or UMT5 text encoder."}
    )
    num_inference_steps: int | None = field(default=None, metadata={"help": "Sampling steps T."})
    num_sde_steps: list[int] = field(default_factory=lambda: [2, 4, 8, 16], metadata={"help": "Stochastic steps n."})
    num_candidates: list[int] = field(default_factory=lambda: [2, 4], metadata={"help": "Candidates P per branch."})
    prompts: list[int] = field(default_factory=lambda: [1, 4, 8], metadata={"help": "Prompts per batch."})
    sweep_steps: list[int] = field(
        default_factory=list, metadata={"help": "Other values of T, with the first n and prompts and the last P."}
    )
    sweep_resolutions: list[int] = field(
        default_factory=list, metadata={"help": "Heights and widths, with the first n and prompts and the last P."}
    )
    guidance_scale: float = field(default=4.5, metadata={"help": "Scale of classifier-free guidance."})
    score_batch_size: int | None = field(
        default=None, metadata={"help": "Candidates per forward of the reward model. All of a step by default."}
    )
    transition_batch_size: int = field(default=1, metadata={"help": "Transition pairs per forward and backward."})
    lora_r: int = field(default=64, metadata={"help": "Rank of the LoRA."})
    share_backbone: bool = field(
        default=False, metadata={"help": "Whether policy and reward model share one set of base weights."}
    )
    layerwise_casting: bool = field(
        default=False, metadata={"help": "Whether the policy's frozen linear layers are kept in float8."}
    )
    reward_layerwise_casting: bool = field(
        default=False, metadata={"help": "Whether the reward model's linear layers are kept in float8."}
    )
    reward_group_offload: bool = field(
        default=False,
        metadata={"help": "Whether the reward model stays on the CPU and lends its blocks to the device."},
    )
    attention_backend: str | None = field(
        default=None, metadata={"help": "Another implementation of attention, by diffusers' name."}
    )
    torch_compile: bool = field(default=False, metadata={"help": "Whether every transformer block is compiled."})
    repeats: int = field(default=3, metadata={"help": "How often everything is run. The median counts."})
    warm_up: bool = field(default=True, metadata={"help": "Whether to run everything once before."})
    plot: bool = field(default=True, metadata={"help": "Whether to draw `bench.png`, which needs matplotlib."})
    output_dir: str = field(default="bench", metadata={"help": "Where to write the results."})

    def __post_init__(self):
        size = SIZES[self.size]
        for name in ("height", "width", "num_frames", "max_sequence_length", "num_inference_steps"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(size, name))
