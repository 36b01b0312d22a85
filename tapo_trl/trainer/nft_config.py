# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass

from ..field_types import option
from .group_rewards import SCALE_REWARDS
from .rollout_config import RolloutConfig


NFT_TIMESTEP_SAMPLINGS = ("sampling_steps", "uniform", "logit_normal")
LOSS_WEIGHTINGS = ("adaptive", "none")


@dataclass
class DiffusionNFTConfig(RolloutConfig):
    r"""
    Configuration class for the [`DiffusionNFTTrainer`].

    This class includes only the parameters that are specific to DiffusionNFT. For a full list of training arguments, please
    refer to the [`~transformers.TrainingArguments`] documentation. Note that default values in this class may differ from
    those in [`~transformers.TrainingArguments`]. The parameters of all online trainers are those of [`RolloutConfig`].

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the rollout

        num_generations (`int`, *optional*, defaults to `8`):
            Number of samples per prompt, which are compared with each other. The paper draws 24.
        num_inference_steps (`int`, *optional*, defaults to `10`):
            Number of sampling steps T.
        guidance_scale (`float`, *optional*, defaults to `1.0`):
            Guidance scale of samples. The loss has no classifier-free guidance, and neither have the samples by default.

        > Parameters that control the old policy, which samples

        old_policy_decay_rate (`float`, *optional*, defaults to `0.001`):
            Increase of the decay eta of the old policy's weights per optimiser step.
        old_policy_max_decay (`float`, *optional*, defaults to `0.5`):
            Upper bound of the decay, in [0, 1). With 0, the old policy is the trained one of the last update.
        old_policy_decay_start (`int`, *optional*, defaults to `0`):
            Optimiser steps in which the decay is 0, before it increases.

        > Parameters that control the training

        beta (`float`, *optional*, defaults to `1.0`):
            Share of the policy in the implicit positive and negative policies. The optimal change of the velocity is proportional
            to `1 / beta`.
        num_noise_levels (`int`, *optional*):
            Number of noise levels at which each sample is trained on. Defaults to `num_inference_steps - 1`.
        timestep_sampling (`str`, *optional*, defaults to `"sampling_steps"`):
            Where noise levels come from: distinct sampling steps at random (`"sampling_steps"`), or the training schedule, by the
            distribution before the pipeline's shift (`"uniform"`, `"logit_normal"`).
        loss_weighting (`str`, *optional*, defaults to `"adaptive"`):
            `"adaptive"`: squared errors of the predicted clean latent, divided by their mean absolute value. `"none"`: squared errors
            of the velocity.
        advantage_clip (`float`, *optional*, defaults to `5.0`):
            Advantage from which a sample counts as good, or bad, with probability 1.
        scale_rewards (`str`, *optional*, defaults to `"batch"`):
            Standard deviation that advantages are divided by: that of all samples of a micro-step on all processes (`"batch"`), that
            of the prompt's samples (`"group"`), or none (`"none"`).
        kl_coef (`float`, *optional*, defaults to `1e-4`):
            Weight of the mean squared difference of the velocities of policy and reference. With 0 the reference is not evaluated.

    > [!NOTE]
    > These parameters have default values different from [`RolloutConfig`]:
    > - `num_inference_steps`: Defaults to `10` instead of `20`.
    > - `guidance_scale`: Defaults to `1.0` instead of `4.5`.
    """

    # Parameters whose default values are overridden from RolloutConfig
    num_inference_steps: int = option("Number of sampling steps T.", 10)
    guidance_scale: float = option("Guidance scale of samples. The loss has no classifier-free guidance.", 1.0)

    # Parameters that control the rollout
    num_generations: int = option("Number of samples per prompt, which are compared with each other.", 8)

    # Parameters that control the old policy
    old_policy_decay_rate: float = option(
        "Increase of the decay of the old policy's weights per optimiser step.", 0.001
    )
    old_policy_max_decay: float = option("Upper bound of the decay of the old policy's weights.", 0.5)
    old_policy_decay_start: int = option("Optimiser steps in which the decay is 0, before it increases.", 0)

    # Parameters that control the training
    beta: float = option("Share of the policy in the implicit positive and negative policies.", 1.0)
    num_noise_levels: int | None = option(
        "Number of noise levels at which each sample is trained on. Defaults to `num_inference_steps - 1`."
    )
    timestep_sampling: str = option(
        "Where noise levels come from: distinct sampling steps (`sampling_steps`), or the training schedule, by the distribution "
        "before the pipeline's shift (`uniform`, `logit_normal`).",
        "sampling_steps",
        choices=list(NFT_TIMESTEP_SAMPLINGS),
    )
    loss_weighting: str = option(
        "`adaptive`: squared errors of the predicted clean latent, divided by their mean absolute value. `none`: squared errors of "
        "the velocity.",
        "adaptive",
        choices=list(LOSS_WEIGHTINGS),
    )
    advantage_clip: float = option("Advantage from which a sample counts as good, or bad, with probability 1.", 5.0)
    scale_rewards: str = option(
        "Standard deviation that advantages are divided by: of all samples of a micro-step (`batch`), of the prompt's samples "
        "(`group`), or none (`none`).",
        "batch",
        choices=list(SCALE_REWARDS),
    )
    kl_coef: float = option(
        "Weight of the squared difference of velocities from the reference. 0 disables the reference.", 1e-4
    )

    def __post_init__(self):
        super().__post_init__()

        if self.num_generations < 2:
            raise ValueError(f"`num_generations` must be at least 2 to compare, got {self.num_generations}.")
        self.check_positive("beta", "advantage_clip")
        self.check_not_negative("kl_coef", "old_policy_decay_rate", "old_policy_decay_start")
        if not 0 <= self.old_policy_max_decay < 1:
            raise ValueError(f"`old_policy_max_decay` must be in [0, 1), got {self.old_policy_max_decay}.")
        self.check_minimum(1, "num_noise_levels")
        self.check_choices(
            timestep_sampling=NFT_TIMESTEP_SAMPLINGS, loss_weighting=LOSS_WEIGHTINGS, scale_rewards=SCALE_REWARDS
        )
        if self.sync_ref_model and self.kl_coef == 0:
            raise ValueError("`sync_ref_model=True` has no effect without a reference: set `kl_coef` above 0.")
        is_of_sampler = self.timestep_sampling == "sampling_steps"
        if is_of_sampler and self.num_noise_levels is not None and self.num_noise_levels > self.num_inference_steps:
            raise ValueError(
                f"`num_noise_levels={self.num_noise_levels}` distinct sampling steps need at least as many "
                f"`num_inference_steps`, which are {self.num_inference_steps}: lower it, or set `timestep_sampling` to 'uniform' or "
                "'logit_normal'."
            )
