# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass

from ..field_types import option
from ..schedulers.noise_levels import TIMESTEP_SAMPLINGS
from .rollout_config import RolloutConfig


@dataclass
class OnlineDiffusionDPOConfig(RolloutConfig):
    r"""
    Configuration class for the [`OnlineDiffusionDPOTrainer`].

    This class includes only the parameters that are specific to online Diffusion-DPO. For a full list of training
    arguments, please refer to the [`~transformers.TrainingArguments`] documentation. Note that default values in this
    class may differ from those in [`~transformers.TrainingArguments`]. The parameters of all trainers with rollouts are
    those of [`RolloutConfig`].

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the rollout

        num_generations (`int`, *optional*, defaults to `8`):
            Number of samples per prompt, of which the best and the worst make the pair.

        > Parameters that control the training

        num_noise_levels (`int`, *optional*, defaults to `4`):
            Number of random noise levels at which a pair is compared. They cost little compared with a rollout.
        timestep_sampling (`str`, *optional*, defaults to `"logit_normal"`):
            Distribution of the noise level before the pipeline's shift: `"logit_normal"`, as in the training of SD3, or
            `"uniform"`.
        beta (`float`, *optional*, defaults to `100.0`):
            Strength of the regularisation towards the reference. It is meant for squared errors averaged over the
            latent's dimensions, as in [`DiffusionDPOConfig`]. The default there is higher: here both sides of a pair
            are samples of the policy and closer to each other.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Assumed probability that a preference label is flipped.
        beta_reference_dim (`int`, *optional*):
            Dimensions of the latents that `beta` is meant for, such as 65536 for SD3.5 at 512 x 512. With it, `beta` is scaled
            by sqrt(D / beta_reference_dim), so that a pair's logit has the same noise, see [`~losses.transferred_beta`]. By
            default, `beta` as it is.

    > [!NOTE]
    > `learning_rate` defaults to `1e-5` instead of the `1e-4` of [`RolloutConfig`].
    """

    # Parameters whose default values are overridden from RolloutConfig
    learning_rate: float = option("The initial learning rate for AdamW.", 1e-5)

    # Parameters that control the rollout
    num_generations: int = option("Number of samples per prompt, of which the best and the worst make the pair.", 8)

    # Parameters that control the training
    num_noise_levels: int = option("Number of random noise levels at which a pair is compared.", 4)
    timestep_sampling: str = option(
        "Distribution of the noise level before the pipeline's shift.",
        "logit_normal",
        choices=list(TIMESTEP_SAMPLINGS),
    )
    beta: float = option("Strength of the regularisation to the reference.", 100.0)
    label_smoothing: float = option("Assumed probability that a preference label is flipped.", 0.0)
    beta_reference_dim: int | None = option(
        "Dimensions of the latents that `beta` is meant for: it is scaled by sqrt(D / beta_reference_dim). By default, "
        "`beta` as it is."
    )

    def __post_init__(self):
        super().__post_init__()

        if self.num_generations < 2:
            raise ValueError(f"`num_generations` must be at least 2 to have a pair, got {self.num_generations}.")
        self.check_minimum(1, "num_noise_levels")
        self.check_positive("beta")
        self.check_minimum(1, "beta_reference_dim")
        self.check_label_smoothing()
        self.check_choices(timestep_sampling=TIMESTEP_SAMPLINGS)
