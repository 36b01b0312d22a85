# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass, field
from typing import Any

from trl.trainer.base_config import _BaseConfig

from ..field_types import convert_fields
from ..runs.option_checks import check_without_effect
from ..schedulers.noise_levels import TIMESTEP_SAMPLINGS
from .preference_config import PreferenceDataConfig


VARIANTS = ("diffusion_dpo", "inversion_dpo", "dense_reward")


@dataclass
class DiffusionDPOConfig(PreferenceDataConfig, _BaseConfig):
    r"""
    Configuration class for the [`DiffusionDPOTrainer`].

    This class includes only the parameters that are specific to Diffusion-DPO training. For a full list of training
    arguments, please refer to the [`~transformers.TrainingArguments`] documentation. Note that default values in this
    class may differ from those in [`~transformers.TrainingArguments`]. The parameters that control the data are those of
    [`PreferenceDataConfig`].

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~diffusers.DiffusionPipeline.from_pretrained`], used when the `model` argument of
            the [`DiffusionDPOTrainer`] is a string, for example `{"torch_dtype": "bfloat16", "revision": "main"}`.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout in the policy (LoRA dropout included).

        > Parameters that control the training

        variant (`str`, *optional*, defaults to `"diffusion_dpo"`):
            Which noisy latents of a pair are compared. The loss is the same.

            - `"diffusion_dpo"`: both sides with one noise, at a random noise level.
            - `"inversion_dpo"`: each side at a step of the trajectory on which the reference would sample it, found by
              inverting the ODE.
            - `"dense_reward"`: both sides with one noise, at a step of the sampler drawn with a probability that falls by
              `gamma` per step.
        beta (`float`, *optional*, defaults to `2000.0`):
            Strength of the regularisation towards the reference. It fits squared errors that are averaged over the
            latent's dimensions.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Probability that a label is flipped. Ties (label 0.5) always count as one half.
        timestep_sampling (`str`, *optional*, defaults to `"logit_normal"`):
            Distribution of the noise level before the pipeline's shift, for `variant="diffusion_dpo"`: `"logit_normal"`,
            as in the training of SD3, or `"uniform"`.
        gamma (`float`, *optional*, defaults to `0.9`):
            Discount per sampling step, counted from the noise, for `variant="dense_reward"`. 1 makes all steps alike.
        num_inference_steps (`int`, *optional*, defaults to `20`):
            Number of sampling steps: of the trajectories of `"inversion_dpo"` and `"dense_reward"`, and of samples that are
            looked at.
        cache_inversions (`bool`, *optional*, defaults to `False`):
            Whether to keep the trajectories of `"inversion_dpo"` on disk, `num_inference_steps` latents in float32 for each
            side of a pair. Otherwise they are computed again whenever a pair comes up.
        self_check (`bool`, *optional*, defaults to `True`):
            Whether a run that starts from the reference first checks that its loss is ln 2.
        max_skipped_updates (`int`, *optional*, defaults to `3`):
            Number of updates in a row that may be skipped because a loss or a gradient is not finite. After one more
            the run saves a checkpoint and stops with an error. 0 stops at the first.

        > Parameters that control the evaluation

        eval_sigmas (`list[float]`, *optional*, defaults to `[0.1, 0.3, 0.5, 0.7, 0.9]`):
            Noise levels at which held-out pairs are compared; the evaluation loss is the mean over them. The nearest
            levels of the training are taken.

        > Parameters that control the samples that are looked at

        guidance_scale (`float`, *optional*, defaults to `4.5`):
            Scale of classifier-free guidance, none if at most 1. Training uses none.
        negative_prompt (`str`, *optional*, defaults to `""`):
            Prompt of the unconditional half of the guidance.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `activation_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `1e-5` instead of `5e-5`.
    > - `weight_decay`: Defaults to `0.01` instead of `0.0`.
    """

    _VALID_DICT_FIELDS = _BaseConfig._VALID_DICT_FIELDS + ["model_init_kwargs", "dimension_weights"]

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
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

    # Parameters that control the training
    variant: str = field(
        default="diffusion_dpo",
        metadata={"help": "Which noisy latents of a pair are compared.", "choices": list(VARIANTS)},
    )
    beta: float = field(default=2000.0, metadata={"help": "Strength of the regularisation to the reference."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Probability that a label is flipped."})
    timestep_sampling: str = field(
        default="logit_normal",
        metadata={
            "help": "Distribution of the noise level before the pipeline's shift, for `diffusion_dpo`.",
            "choices": list(TIMESTEP_SAMPLINGS),
        },
    )
    gamma: float = field(
        default=0.9, metadata={"help": "Discount per sampling step, counted from the noise, for `dense_reward`."}
    )
    num_inference_steps: int = field(
        default=20,
        metadata={
            "help": "Sampling steps: of the trajectories of `inversion_dpo` and `dense_reward`, and of samples."
        },
    )
    cache_inversions: bool = field(
        default=False, metadata={"help": "Whether to keep the trajectories of `inversion_dpo` on disk."}
    )
    self_check: bool = field(
        default=True, metadata={"help": "Whether to check at the start that the loss is ln 2 for every pair."}
    )
    max_skipped_updates: int = field(
        default=3,
        metadata={
            "help": "Updates in a row that may be skipped because a loss or a gradient is not finite. After one more the "
            "run saves a checkpoint and stops."
        },
    )

    # Parameters that control the evaluation
    eval_sigmas: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9],
        metadata={"help": "Noise levels at which held-out pairs are compared."},
    )

    # Parameters that control the samples that are looked at
    guidance_scale: float = field(default=4.5, metadata={"help": "Scale of classifier-free guidance in samples."})
    negative_prompt: str = field(default="", metadata={"help": "Prompt of the unconditional half of the guidance."})

    def __post_init__(self):
        convert_fields(self)
        if self.gradient_checkpointing is not None:
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()

        self.check_preference_data()
        for name, values in {"variant": VARIANTS, "timestep_sampling": TIMESTEP_SAMPLINGS}.items():
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` must be one of {values}, got {getattr(self, name)!r}.")
        if self.beta <= 0:
            raise ValueError(f"`beta` must be positive, got {self.beta}.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"`label_smoothing` must be in [0, 0.5), got {self.label_smoothing}.")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"`gamma` must be in (0, 1], got {self.gamma}.")
        if self.num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, got {self.num_inference_steps}.")
        for name, variant in {"gamma": "dense_reward", "timestep_sampling": "diffusion_dpo"}.items():
            if self.variant != variant:
                check_without_effect(self, [name], f"with `variant={self.variant!r}`, since it is for {variant!r}")
        if self.cache_inversions and self.variant != "inversion_dpo":
            raise ValueError(
                f'`cache_inversions` is for `variant="inversion_dpo"`, but `variant` is {self.variant!r}.'
            )
        if self.max_skipped_updates < 0:
            raise ValueError(f"`max_skipped_updates` must not be negative, got {self.max_skipped_updates}.")
        if not self.eval_sigmas or not all(0 <= sigma <= 1 for sigma in self.eval_sigmas):
            raise ValueError(f"`eval_sigmas` must be noise levels in [0, 1], at least one, got {self.eval_sigmas}.")
