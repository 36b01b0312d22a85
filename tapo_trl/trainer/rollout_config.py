# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass, field
from typing import Any, ClassVar

from trl.trainer.base_config import _BaseConfig

from ..field_types import convert_fields
from ..runs.option_checks import check_without_effect


@dataclass
class RolloutConfig(_BaseConfig):
    r"""
    What the configurations of all trainers that draw samples while they train have in common: [`TAPOConfig`],
    [`OnlineDiffusionDPOConfig`] and [`FlowGRPOConfig`].

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~diffusers.DiffusionPipeline.from_pretrained`], used when the `model` argument of
            the trainer is a string, for example `{"torch_dtype": "bfloat16", "revision": "main"}`.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout in the policy (LoRA dropout included).
        attention_backend (`str`, *optional*):
            Implementation of attention, by its name in diffusers, such as `"flash_hub"` or `"_native_cudnn"`. Applied to the
            policy, and to latent reward models whose attention asks for one. By default PyTorch chooses.
        layerwise_casting (`bool`, *optional*, defaults to `False`):
            Whether to keep the linear layers of the policy's frozen base in float8, one byte per weight, and cast each for
            its own forward and backward only. Needs LoRA. The policy and its reference are both the rounded base's.

        > Parameters that control the data

        dataset_name (`str`, *optional*):
            Dataset on the Hub, or its folder, with a `prompt` column. Used when the trainer gets no `train_dataset`;
            without either, the prompts that ship with the package are used.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split of `dataset_name`.
        resolution (`int`, *optional*, defaults to `512`):
            Height and width of the samples in pixels. `height` and `width` take precedence.
        height (`int`, *optional*):
            Height of the samples in pixels.
        width (`int`, *optional*):
            Width of the samples in pixels.
        num_frames (`int`, *optional*):
            Number of frames, for policies that make videos: one more than a multiple of 4 for Wan2.1.
        max_sequence_length (`int`, *optional*):
            Number of tokens of the T5 (or UMT5) text encoder. Defaults to the model family's: 256 for SD3.5 and 512 for
            Wan2.1.
        cache_dir (`str`, *optional*):
            Where prompt embeddings are kept. Defaults to `tapo_trl/prompts` in the Hugging Face home.

        > Parameters that control the rollout

        num_inference_steps (`int`, *optional*, defaults to `20`):
            Number of sampling steps T.
        guidance_scale (`float`, *optional*, defaults to `4.5`):
            Scale of classifier-free guidance in rollouts, none if at most 1.
        negative_prompt (`str`, *optional*, defaults to `""`):
            Prompt of the unconditional half of the guidance.

        > Parameters that control the samples that are looked at

        fps (`int`, *optional*, defaults to `16`):
            Frames per second of the videos that are written. The policy itself knows no speed.
        vae_tiling (`bool`, *optional*, defaults to `False`):
            Whether to decode large samples in overlapping tiles, which needs less memory and changes them a little.
        vae_slicing (`bool`, *optional*, defaults to `False`):
            Whether to decode one sample at a time.

        > Parameters that control the reward

        reward_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`load_reward_model`], used for reward models that are given by name, for
            example `{"torch_dtype": "bfloat16"}`, which halves their memory.
        reward_weights (`list[float]`, *optional*):
            Weights of several reward models. All 1 by default.
        score_batch_size (`int`, *optional*):
            Number of candidates per forward of a reward model. All of a step at once by default.
        share_backbone (`bool`, *optional*, defaults to `False`):
            Whether the policy, its reference and the reward models use one set of frozen base weights. Needs LoRA in all of
            them, and reward models that were trained from this very policy. Changes no result.
        reward_layerwise_casting (`bool`, *optional*, defaults to `False`):
            Whether to keep the linear layers of an SLRM's backbone in float8, one byte per weight, and cast each for its
            own forward only. Changes the scores a little.
        reward_group_offload (`bool`, *optional*, defaults to `False`):
            Whether to keep an SLRM on the CPU and bring its blocks to the accelerator one by one. Changes no score.

        > Parameters that control the training

        transition_batch_size (`int`, *optional*):
            Number of transition pairs per forward and backward. The gradient does not depend on it. Defaults to
            `per_device_train_batch_size`, that is one stochastic step at a time.
        offload_transitions (`bool`, *optional*):
            Whether the transitions of a rollout wait on the CPU and visit the accelerator chunk by chunk. The gradient
            does not depend on it. Defaults to `True` for video policies, whose transitions are large, else `False`.
        num_iterations (`int`, *optional*, defaults to `1`):
            Number of optimiser steps per rollout.
        sync_ref_model (`bool`, *optional*, defaults to `False`):
            Whether the reference follows the policy. Needs full fine-tuning.
        ref_model_mixup_alpha (`float`, *optional*, defaults to `0.6`):
            Share of the policy in the reference at a synchronisation.
        ref_model_sync_steps (`int`, *optional*, defaults to `512`):
            Steps between synchronisations.
        profile (`bool`, *optional*, defaults to `False`):
            Whether to print at the end where the time went, see [`~profiling.StageTimer`].
        max_skipped_updates (`int`, *optional*, defaults to `3`):
            Number of updates in a row that may be skipped because a reward, a loss or a gradient is not finite. After
            one more the run saves a checkpoint and stops with an error. 0 stops at the first.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `activation_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `1e-4` instead of `5e-5`, a rate for LoRA. Without `peft_config`, set `1e-5` or less.
    > - `weight_decay`: Defaults to `0.01` instead of `0.0`.
    > - `remove_unused_columns`: Defaults to `False` instead of `True`.
    """

    _VALID_DICT_FIELDS = _BaseConfig._VALID_DICT_FIELDS + ["model_init_kwargs", "reward_model_init_kwargs"]

    velocity_target: ClassVar[str | None] = None  # clean samples have none; a field where noisy candidates are scored

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate for AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay `False`: reward functions get all columns of the dataset."}
    )
    activation_checkpointing: bool = field(
        default=True, metadata={"help": "Recompute activations in the backward pass to save memory."}
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Alias of `activation_checkpointing`, which it overrides if set."}
    )

    # Parameters that control the model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for `DiffusionPipeline.from_pretrained`, if `model` is a string."},
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Whether to disable dropout in the policy."})
    attention_backend: str | None = field(
        default=None, metadata={"help": "Implementation of attention, by its name in diffusers. PyTorch's by default."}
    )
    layerwise_casting: bool = field(
        default=False,
        metadata={"help": "Whether to keep the linear layers of the policy's frozen base in float8. Needs LoRA."},
    )

    # Parameters that control the data
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset with a `prompt` column, used when the trainer gets no `train_dataset`."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of `dataset_name`."})
    resolution: int = field(default=512, metadata={"help": "Height and width of the samples in pixels."})
    height: int | None = field(default=None, metadata={"help": "Height of the samples. Overrides `resolution`."})
    width: int | None = field(default=None, metadata={"help": "Width of the samples. Overrides `resolution`."})
    num_frames: int | None = field(default=None, metadata={"help": "Number of frames, for video policies."})
    max_sequence_length: int | None = field(
        default=None,
        metadata={
            "help": "Number of tokens of the T5 (or UMT5) text encoder. By default the model family's: 256 for SD3.5, 512 "
            "for Wan2.1."
        },
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where prompt embeddings are kept."})

    # Parameters that control the rollout
    num_inference_steps: int = field(default=20, metadata={"help": "Number of sampling steps T."})
    guidance_scale: float = field(default=4.5, metadata={"help": "Scale of classifier-free guidance."})
    negative_prompt: str = field(default="", metadata={"help": "Prompt of the unconditional half of the guidance."})

    # Parameters that control the samples that are looked at
    fps: int = field(default=16, metadata={"help": "Frames per second of the videos that are written."})
    vae_tiling: bool = field(default=False, metadata={"help": "Whether to decode large samples in overlapping tiles."})
    vae_slicing: bool = field(default=False, metadata={"help": "Whether to decode one sample at a time."})

    # Parameters that control the reward
    reward_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for `load_reward_model`, if a reward model is a string."},
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of several reward models. All 1 by default."}
    )
    score_batch_size: int | None = field(
        default=None, metadata={"help": "Candidates per forward of a reward model. All of a step by default."}
    )
    share_backbone: bool = field(
        default=False,
        metadata={
            "help": "Whether policy, reference and reward models use one set of frozen base weights. Needs LoRA."
        },
    )
    reward_layerwise_casting: bool = field(
        default=False, metadata={"help": "Whether to keep the linear layers of an SLRM's backbone in float8."}
    )
    reward_group_offload: bool = field(
        default=False,
        metadata={"help": "Whether to keep an SLRM on the CPU and bring its blocks to the accelerator one by one."},
    )

    # Parameters that control the training
    transition_batch_size: int | None = field(
        default=None,
        metadata={"help": "Transition pairs per forward and backward. Defaults to `per_device_train_batch_size`."},
    )
    offload_transitions: bool | None = field(
        default=None,
        metadata={
            "help": "Whether transitions wait on the CPU until they are trained on. By default for videos only."
        },
    )
    num_iterations: int = field(default=1, metadata={"help": "Number of optimiser steps per rollout."})
    sync_ref_model: bool = field(default=False, metadata={"help": "Whether the reference follows the policy."})
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "Share of the policy in the reference at a synchronisation."}
    )
    ref_model_sync_steps: int = field(default=512, metadata={"help": "Steps between synchronisations."})
    profile: bool = field(default=False, metadata={"help": "Whether to print at the end where the time went."})
    max_skipped_updates: int = field(
        default=3,
        metadata={
            "help": "Updates in a row that may be skipped because a reward, a loss or a gradient is not finite. After one "
            "more the run saves a checkpoint and stops."
        },
    )

    def __post_init__(self):
        convert_fields(self)
        if self.gradient_checkpointing is not None:
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()

        if self.max_skipped_updates < 0:
            raise ValueError(f"`max_skipped_updates` must not be negative, got {self.max_skipped_updates}.")
        positive = ["resolution", "height", "width", "num_frames", "fps", "max_sequence_length", "num_inference_steps"]
        positive += ["num_iterations", "transition_batch_size", "score_batch_size", "ref_model_sync_steps"]
        for name in positive:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.auto_find_batch_size:
            raise ValueError("`auto_find_batch_size` is not supported: a retried step would repeat its rollout.")
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be `False`: rewards get the columns of the dataset.")
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"`ref_model_mixup_alpha` must be in (0, 1], got {self.ref_model_mixup_alpha}.")
        if not self.sync_ref_model:
            names = ["ref_model_mixup_alpha", "ref_model_sync_steps"]
            check_without_effect(self, names, "without `sync_ref_model=True`")

    def check_noise(self, step_indices: list[int]) -> None:
        """
        Args:
            step_indices (`list[int]`): the stochastic steps, which need noise.

        Raises:
            ValueError: if `sde_type` and `noise_level` leave one without.
        """
        if self.noise_level <= 0 or (self.sde_type == "cps" and self.noise_level > 1):
            raise ValueError(
                "`noise_level` must be positive, since stochastic steps without noise teach nothing, and at most 1 for "
                f'`sde_type="cps"`. Got {self.noise_level}.'
            )
        if self.sde_type == "cps" and self.num_inference_steps - 1 in step_indices:
            raise ValueError(
                '`sde_type="cps"` has no noise at the last sampling step, which the stochastic steps '
                f"{step_indices} include: lower `num_sde_steps` or `t_init`."
            )

    def check_choices(self, **choices: tuple[str | None, ...]) -> None:
        """
        Args:
            choices (`tuple`): values that a field may have, by its name.

        Raises:
            ValueError: if one has another.
        """
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` must be one of {values}, got {getattr(self, name)!r}.")
