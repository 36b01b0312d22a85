# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass
from typing import Any, ClassVar

from trl.trainer.base_config import _BaseConfig

from ..field_types import option
from ..runs.checks import check_without_effect
from .base_config import PolicyConfig


SDE_TYPES = ("flow", "constant", "cps")


@dataclass
class RolloutConfig(PolicyConfig, _BaseConfig):
    r"""
    Options of all online trainers, which draw samples while they train: [`TAPOConfig`], [`OnlineDiffusionDPOConfig`],
    [`FlowGRPOConfig`], [`ReFLConfig`] and [`DiffusionNFTConfig`]. Further ones are those of [`PolicyConfig`] and [`DiffusionConfig`].

    Parameters:
        > Parameters that control the model

        attention_backend (`str`, *optional*):
            Implementation of attention, by its name in diffusers, such as `"flash_hub"` or `"_native_cudnn"`. Applied to the
            policy, and to latent reward models whose attention asks for one. By default PyTorch chooses.
        layerwise_casting (`bool`, *optional*, defaults to `False`):
            Whether to keep the linear layers of the policy's frozen base in float8, one byte per weight, and cast each
            layer only for its forward and backward pass. Needs LoRA. Policy and reference both use the rounded base.

        > Parameters that control the data

        dataset_name (`str`, *optional*):
            Dataset on the Hub, or its folder, with a `prompt` column. Used when the trainer gets no `train_dataset`;
            without either, the prompts that ship with the package are used.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split of `dataset_name`.

        > Parameters that control the reward

        reward_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`load_reward_model`] and [`get_reward`], used for rewards given by name, for example
            `{"torch_dtype": "bfloat16"}`, which halves their memory. A mapping under the name of a reward applies to
            that reward only: `{"ocr": {"detect": False}}`.
        reward_weights (`list[float]`, *optional*):
            Weights of several reward models. All 1 by default.
        standardize_rewards (`bool`, *optional*, defaults to `False`):
            Whether to bring each reward to mean 0 and standard deviation 1 over the candidates (or samples) of a prompt
            before they are weighted and summed. Otherwise the one with the largest spread dominates.
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
            Whether to keep the transitions of a rollout on the CPU and move each chunk to the accelerator when it is
            trained on. The gradient does not depend on it. Defaults to `True` for video policies, whose transitions
            are large, else `False`.
        num_iterations (`int`, *optional*, defaults to `1`):
            Number of optimiser steps per rollout.
        sync_ref_model (`bool`, *optional*, defaults to `False`):
            Whether the reference follows the policy. Needs full fine-tuning.
        ref_model_mixup_alpha (`float`, *optional*, defaults to `0.6`):
            Share of the policy in the reference at a synchronisation.
        ref_model_sync_steps (`int`, *optional*, defaults to `512`):
            Steps between synchronisations.
        profile (`bool`, *optional*, defaults to `False`):
            Whether to print the time of each stage at the end of training, see [`~profiling.StageTimer`].

    > [!NOTE]
    > These parameters have default values different from [`DiffusionConfig`] and [`~transformers.TrainingArguments`]:
    > - `learning_rate`: Defaults to `1e-4`, a rate for LoRA. Without `peft_config`, set `1e-5` or less.
    > - `remove_unused_columns`: Defaults to `False` instead of `True`.
    """

    _VALID_DICT_FIELDS = _BaseConfig._VALID_DICT_FIELDS + ["model_init_kwargs", "reward_model_init_kwargs"]

    # Of clean samples; fields of [`TAPOConfig`], which scores noisy candidates and makes pairs of them
    velocity_target: ClassVar[str | None] = None
    score_estimates: ClassVar[bool] = False
    pairs_per_update: ClassVar[int | None] = None

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float = option("The initial learning rate for AdamW.", 1e-4)
    remove_unused_columns: bool = option("Must stay `False`: reward functions get all columns of the dataset.", False)

    # Parameters that control the model
    attention_backend: str | None = option(
        "Implementation of attention, by its name in diffusers. PyTorch's by default."
    )
    layerwise_casting: bool = option(
        "Whether to keep the linear layers of the policy's frozen base in float8. Needs LoRA.", False
    )

    # Parameters that control the data
    dataset_name: str | None = option("Dataset with a `prompt` column, used when the trainer gets no `train_dataset`.")
    dataset_split: str = option("Split of `dataset_name`.", "train")

    # Parameters that control the reward
    reward_model_init_kwargs: dict[str, Any] | str | None = option(
        "Keyword arguments for `load_reward_model` and `get_reward`, for rewards given by name. A mapping under the name of "
        "a reward applies to that reward only."
    )
    reward_weights: list[float] | None = option("Weights of several reward models. All 1 by default.")
    standardize_rewards: bool = option(
        "Whether to standardise each reward over the candidates of a prompt before the weighted sum.", False
    )
    score_batch_size: int | None = option("Candidates per forward of a reward model. All of a step by default.")
    share_backbone: bool = option(
        "Whether policy, reference and reward models use one set of frozen base weights. Needs LoRA.", False
    )
    reward_layerwise_casting: bool = option(
        "Whether to keep the linear layers of an SLRM's backbone in float8.", False
    )
    reward_group_offload: bool = option(
        "Whether to keep an SLRM on the CPU and move one block at a time to the accelerator.", False
    )

    # Parameters that control the training
    transition_batch_size: int | None = option(
        "Transition pairs per forward and backward. Defaults to `per_device_train_batch_size`."
    )
    offload_transitions: bool | None = option(
        "Whether to keep transitions on the CPU until they are trained on. By default for videos only."
    )
    num_iterations: int = option("Number of optimiser steps per rollout.", 1)
    sync_ref_model: bool = option("Whether the reference follows the policy.", False)
    ref_model_mixup_alpha: float = option("Share of the policy in the reference at a synchronisation.", 0.6)
    ref_model_sync_steps: int = option("Steps between synchronisations.", 512)
    profile: bool = option("Whether to print the time of each stage at the end of training.", False)

    def __post_init__(self):
        super().__post_init__()
        self.check_minimum(1, "num_iterations", "transition_batch_size", "score_batch_size", "ref_model_sync_steps")
        if self.auto_find_batch_size:
            raise ValueError("`auto_find_batch_size` is not supported: a retried step would repeat its rollout.")
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be `False`: rewards get the columns of the dataset.")
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"`ref_model_mixup_alpha` must be in (0, 1], got {self.ref_model_mixup_alpha}.")
        if not self.sync_ref_model:
            names = ["ref_model_mixup_alpha", "ref_model_sync_steps"]
            check_without_effect(self, names, "without `sync_ref_model=True`")


@dataclass
class StochasticRolloutConfig(RolloutConfig):
    r"""
    Options of online trainers that train on stochastic sampling steps, [`TAPOConfig`] and [`FlowGRPOConfig`].

    Parameters:
        noise_level (`float`, *optional*, defaults to `0.7`):
            Strength a of the noise of a stochastic step.
        sde_type (`str`, *optional*, defaults to `"flow"`):
            Noise law: `"flow"`, `"constant"` or `"cps"`, see [`FlowMatchSDEScheduler`].
        logprob_reduction (`str`, *optional*, defaults to `"mean"`):
            Reduction of log-probabilities over the latent's dimensions, `"mean"` or `"sum"`.
    """

    noise_level: float = option("Strength a of the noise of a stochastic step.", 0.7)
    sde_type: str = option("Noise law of a stochastic step.", "flow", choices=list(SDE_TYPES))
    logprob_reduction: str = option(
        "Reduction of log-probabilities over the latent's dimensions.", "mean", choices=["mean", "sum"]
    )

    def check_noise(self, step_indices: list[int]) -> None:
        """
        Check that every stochastic step has noise.

        Args:
            step_indices (`list[int]`): the stochastic steps.

        Raises:
            ValueError: if `sde_type` and `noise_level` leave one without.
        """
        self.check_choices(sde_type=SDE_TYPES, logprob_reduction=("mean", "sum"))
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
