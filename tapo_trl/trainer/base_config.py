# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Options that several configurations share."""

from dataclasses import dataclass
from typing import Any

from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..field_types import convert_fields, option


EXPERTS = ["high", "low"]


@dataclass
class DiffusionConfig:
    r"""
    Options of all trainers. Put it before a configuration of TRL.

    Parameters:
        learning_rate (`float`, *optional*, defaults to `1e-5`):
            Initial learning rate of AdamW.
        weight_decay (`float`, *optional*, defaults to `0.01`):
            Weight decay of AdamW.
        activation_checkpointing (`bool`, *optional*, defaults to `True`):
            Whether to recompute activations in the backward pass.
        gradient_checkpointing (`bool`, *optional*):
            Alias of `activation_checkpointing`, which it overrides if set.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~diffusers.DiffusionPipeline.from_pretrained`], used when the `model` argument of
            the trainer is a string, for example `{"torch_dtype": "bfloat16", "revision": "main"}`.
        expert (`str`, *optional*):
            Of a model with two experts (Wan2.2-T2V-A14B), train this one alone: `"high"` or `"low"`, by the noise levels that it
            predicts at. Both are trained by default. A reward model has to start from one of them.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout in the model (LoRA dropout included).
        resolution (`int`, *optional*, defaults to `512`):
            Height and width in pixels of samples, or to which images and videos of a dataset are cropped, around their
            centre, and resized. `height` and `width` take precedence.
        height (`int`, *optional*):
            Height in pixels.
        width (`int`, *optional*):
            Width in pixels.
        num_frames (`int`, *optional*):
            Number of frames, for policies that make videos: one more than a multiple of 4 for Wan2.1. Those of a dataset are
            taken from the start of each video.
        fps (`int`, *optional*, defaults to `16`):
            Frames per second of videos that are read or written. The policy itself knows no speed.
        max_sequence_length (`int`, *optional*):
            Number of tokens of a prompt (SD3.5, FLUX.1: of its T5 embeddings). Defaults to the model family's: 256 for SD3.5
            and HunyuanVideo, 1000 for HunyuanVideo-1.5, 512 for the others.
        vae_tiling (`bool`, *optional*, defaults to `False`):
            Whether to encode and decode large images or videos in overlapping tiles, which needs less memory and changes them
            a little.
        vae_slicing (`bool`, *optional*, defaults to `False`):
            Whether to encode and decode the images or videos of a batch one at a time. Videos are, when their latents are
            cached.
        cache_dir (`str`, *optional*):
            Where prompt embeddings, and latents of datasets, are kept. Defaults to `tapo_trl` in the Hugging Face home.
        max_skipped_updates (`int`, *optional*, defaults to `3`):
            Number of updates in a row that may be skipped because a reward, a loss or a gradient is not finite. After one
            more the run saves a checkpoint and stops with an error. 0 stops at the first.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `activation_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `1e-5` instead of `5e-5`.
    > - `weight_decay`: Defaults to `0.01` instead of `0.0`.
    """

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float = option("The initial learning rate for AdamW.", 1e-5)
    weight_decay: float = option("Weight decay of AdamW.", 0.01)
    activation_checkpointing: bool = option("Recompute activations in the backward pass to save memory.", True)
    gradient_checkpointing: bool | None = option("Alias of `activation_checkpointing`, which it overrides if set.")

    # Parameters that control the model
    model_init_kwargs: dict[str, Any] | str | None = option(
        "Keyword arguments for `DiffusionPipeline.from_pretrained`, if `model` is a string."
    )
    expert: str | None = option(
        "Of a model with two experts (Wan2.2-T2V-A14B), train this one alone: `high` or `low`, by its noise levels. A reward "
        "model starts from this one.",
        choices=EXPERTS,
    )
    disable_dropout: bool = option("Whether to disable dropout in the model.", True)

    # Parameters that control the data
    resolution: int = option(
        "Height and width in pixels, to which images and videos of a dataset are cropped and resized.", 512
    )
    height: int | None = option("Height in pixels. Overrides `resolution`.")
    width: int | None = option("Width in pixels. Overrides `resolution`.")
    num_frames: int | None = option(
        "Number of frames, for video policies; those of a dataset are taken from the start."
    )
    fps: int = option("Frames per second of videos that are read or written.", 16)
    max_sequence_length: int | None = option(
        "Number of tokens of a prompt. By default the model family's, such as 256 for SD3.5 and 512 for Wan."
    )
    vae_tiling: bool = option("Whether the VAE works on large images or videos in overlapping tiles.", False)
    vae_slicing: bool = option("Whether the VAE works on the images or videos of a batch one at a time.", False)
    cache_dir: str | None = option("Where prompt embeddings, and latents of datasets, are kept.")

    # Parameters that control the training
    max_skipped_updates: int = option(
        "Updates in a row that may be skipped because a reward, a loss or a gradient is not finite. After one more "
        "the run saves a checkpoint and stops.",
        3,
    )

    def __post_init__(self):
        convert_fields(self)
        if self.gradient_checkpointing is not None:
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()
        # Under ZeRO-3, Transformers would split what is loaded from here on over the processes: rewards and text encoders, too,
        # which no engine ever puts together again
        unset_hf_deepspeed_config()
        self.check_minimum(1, "resolution", "height", "width", "num_frames", "fps", "max_sequence_length")
        self.check_not_negative("max_skipped_updates")
        self.check_choices(expert=(None, *EXPERTS))

    # Checks of values; all raise a `ValueError` that starts with the name of the field. `None` is left alone

    def check_minimum(self, minimum: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")

    def check_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")

    def check_not_negative(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"`{name}` must not be negative, got {value}.")

    def check_choices(self, **choices: tuple[str | None, ...]) -> None:
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` must be one of {values}, got {getattr(self, name)!r}.")

    def check_label_smoothing(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"`label_smoothing` must be in [0, 0.5), got {self.label_smoothing}.")


@dataclass
class PolicyConfig(DiffusionConfig):
    r"""
    Options of all trainers of a policy.

    Parameters:
        num_inference_steps (`int`, *optional*, defaults to `20`):
            Number of sampling steps T.
        guidance_scale (`float`, *optional*, defaults to `4.5`):
            Guidance scale of samples, in the terms of the family's pipeline: classifier-free guidance, none if at most 1 (Z-Image:
            0), or an input of the network (FLUX.1).
        guidance_scale_2 (`float`, *optional*):
            Of a model with two experts (Wan2.2-T2V-A14B), guidance scale of that for low noise levels. Defaults to `guidance_scale`.
        negative_prompt (`str`, *optional*, defaults to `""`):
            Prompt of the unconditional half of the guidance.
        self_check (`bool`, *optional*, defaults to `True`):
            Whether a run that starts from the reference first checks, before its first update, what must hold then: a loss of
            ln 2 for every pair, or a ratio of 1 up to rounding and a divergence of 0 from the reference.
    """

    num_inference_steps: int = option("Number of sampling steps T.", 20)
    guidance_scale: float = option("Guidance scale of samples, in the terms of the family's pipeline.", 4.5)
    guidance_scale_2: float | None = option(
        "Of a model with two experts, guidance scale of that for low noise levels. `guidance_scale` by default."
    )
    negative_prompt: str = option("Prompt of the unconditional half of the guidance.", "")
    self_check: bool = option("Whether to check before the first update that policy and reference are the same.", True)

    def __post_init__(self):
        super().__post_init__()
        self.check_minimum(1, "num_inference_steps")
