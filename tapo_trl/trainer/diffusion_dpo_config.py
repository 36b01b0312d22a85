# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass

from trl.trainer.base_config import _BaseConfig

from ..field_types import option
from ..runs.checks import check_without_effect
from ..schedulers.noise_levels import TIMESTEP_SAMPLINGS
from .base_config import PolicyConfig
from .preference_config import PreferenceDataConfig


VARIANTS = ("diffusion_dpo", "inversion_dpo", "dense_reward", "video_dpo")


@dataclass
class DiffusionDPOConfig(PreferenceDataConfig, PolicyConfig, _BaseConfig):
    r"""
    Configuration class for the [`DiffusionDPOTrainer`].

    This class includes only the parameters that are specific to Diffusion-DPO training. For a full list of training
    arguments, please refer to the [`~transformers.TrainingArguments`] documentation. Note that default values in this
    class may differ from those in [`~transformers.TrainingArguments`]. Further parameters are those of
    [`PreferenceDataConfig`], [`PolicyConfig`] and [`DiffusionConfig`].

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the training

        variant (`str`, *optional*, defaults to `"diffusion_dpo"`):
            Which noisy latents of a pair are compared, and with which weight.

            - `"diffusion_dpo"`: both sides with one noise, at a random noise level.
            - `"inversion_dpo"`: each side at a step of the trajectory on which the reference would sample it, found by
              inverting the ODE.
            - `"dense_reward"`: both sides with one noise, at a step of the sampler drawn with a probability that falls by
              `gamma` per step.
            - `"video_dpo"`: as `"diffusion_dpo"`, with larger weights for pairs whose scores are rare. The dataset needs the
              columns `chosen_score` and `rejected_score`, or the column `weight`.
        beta (`float`, *optional*, defaults to `2000.0`):
            Strength of the regularisation towards the reference. It fits squared errors that are averaged over the
            latent's dimensions.
        timestep_sampling (`str`, *optional*, defaults to `"logit_normal"`):
            Distribution of the noise level before the pipeline's shift, for `variant="diffusion_dpo"` and `"video_dpo"`:
            `"logit_normal"`, as in the training of SD3, or `"uniform"`.
        gamma (`float`, *optional*, defaults to `0.9`):
            Discount per sampling step, counted from the noise, for `variant="dense_reward"`. 1 makes all steps alike.
        cache_inversions (`bool`, *optional*, defaults to `False`):
            Whether to keep the trajectories of `"inversion_dpo"` on disk, `num_inference_steps` latents in float32 for each
            side of a pair. Otherwise they are computed again whenever a pair comes up.
        beta_reference_dim (`int`, *optional*):
            Dimensions of the latents that `beta` is meant for, such as 65536 for SD3.5 at 512 x 512. With it, `beta` is scaled
            by sqrt(D / beta_reference_dim), so that a pair's logit has the same noise, see [`~losses.transferred_beta`]. By
            default, `beta` as it is.
        pair_weight_alpha (`float`, *optional*, defaults to `1.0`):
            How much larger the weights of rare pairs are, for `variant="video_dpo"` and columns of scores.
        score_bin_width (`float`, *optional*, defaults to `0.01`):
            Width of the bins of the histogram of scores, which says how rare a score is, for `variant="video_dpo"` and columns
            of scores.
    """

    _VALID_DICT_FIELDS = _BaseConfig._VALID_DICT_FIELDS + ["model_init_kwargs", "dimension_weights"]

    # Parameters that control the training
    variant: str = option(
        "Which noisy latents of a pair are compared, and with which weight.", "diffusion_dpo", choices=list(VARIANTS)
    )
    beta: float = option("Strength of the regularisation to the reference.", 2000.0)
    timestep_sampling: str = option(
        "Distribution of the noise level before the pipeline's shift, for `diffusion_dpo` and `video_dpo`.",
        "logit_normal",
        choices=list(TIMESTEP_SAMPLINGS),
    )
    gamma: float = option("Discount per sampling step, counted from the noise, for `dense_reward`.", 0.9)
    cache_inversions: bool = option("Whether to keep the trajectories of `inversion_dpo` on disk.", False)
    beta_reference_dim: int | None = option(
        "Dimensions of the latents that `beta` is meant for: it is scaled by sqrt(D / beta_reference_dim). By default, "
        "`beta` as it is."
    )
    pair_weight_alpha: float = option("How much larger the weights of rare pairs are, for `video_dpo`.", 1.0)
    score_bin_width: float = option("Width of the bins of the histogram of scores, for `video_dpo`.", 0.01)

    def __post_init__(self):
        super().__post_init__()
        self.check_choices(variant=VARIANTS, timestep_sampling=TIMESTEP_SAMPLINGS)
        self.check_positive("beta", "score_bin_width")
        self.check_not_negative("pair_weight_alpha")
        self.check_minimum(1, "beta_reference_dim")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"`gamma` must be in (0, 1], got {self.gamma}.")
        variants = {
            "gamma": ("dense_reward",),
            "timestep_sampling": ("diffusion_dpo", "video_dpo"),
            "pair_weight_alpha": ("video_dpo",),
            "score_bin_width": ("video_dpo",),
        }
        for name, users in variants.items():
            if self.variant not in users:
                words = " and ".join(repr(variant) for variant in users)
                check_without_effect(self, [name], f"with `variant={self.variant!r}`, since it is for {words}")
        if self.cache_inversions and self.variant != "inversion_dpo":
            raise ValueError(
                f'`cache_inversions` is for `variant="inversion_dpo"`, but `variant` is {self.variant!r}.'
            )
