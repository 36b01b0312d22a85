# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass

from ..field_types import option
from ..schedulers import sde_step_indices
from .group_rewards import SCALE_REWARDS
from .rollout_config import StochasticRolloutConfig


@dataclass
class FlowGRPOConfig(StochasticRolloutConfig):
    r"""
    Configuration class for the [`FlowGRPOTrainer`].

    This class includes only the parameters that are specific to Flow-GRPO. For a full list of training arguments, please
    refer to the [`~transformers.TrainingArguments`] documentation. Note that default values in this class may differ from
    those in [`~transformers.TrainingArguments`]. The parameters of all trainers with rollouts are those of
    [`RolloutConfig`]. Options that TRL's GRPO has, too, have the same names.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the rollout

        num_generations (`int`, *optional*, defaults to `8`):
            Number of trajectories per prompt, the group of GRPO.
        num_inference_steps (`int`, *optional*, defaults to `10`):
            Number of sampling steps T. Flow-GRPO trains on few steps, and samples with more.
        num_sde_steps (`int`, *optional*):
            Number of stochastic steps n, which are trained on. All but the last one by default, as in Flow-GRPO.
        t_init (`int`, *optional*, defaults to `0`):
            Index of the first stochastic step, counted from the noise.

        > Parameters that control the training

        beta (`float`, *optional*, defaults to `0.004`):
            Weight of the KL divergence of each step from the reference. With 0 the reference is not evaluated.
        epsilon (`float`, *optional*, defaults to `1e-3`):
            Clip range of the ratio to the sampling policy: `[1 - epsilon, 1 + epsilon]`. The default is meant for
            log-probabilities averaged over the latent's dimensions (`logprob_reduction="mean"`), whose ratios stay
            close to 1.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            Standard deviation that advantages are divided by: that of the prompt's samples (`"group"`), that of all
            samples of a micro-step on all processes (`"batch"`), or none (`"none"`).

    > [!NOTE]
    > `num_inference_steps` defaults to `10` instead of the `20` of [`RolloutConfig`].
    """

    # Parameters whose default values are overridden from RolloutConfig
    num_inference_steps: int = option("Number of sampling steps T.", 10)

    # Parameters that control the rollout
    num_generations: int = option("Number of trajectories per prompt, the group of GRPO.", 8)
    num_sde_steps: int | None = option("Number of stochastic steps n. All but the last one by default.")
    t_init: int = option("Index of the first stochastic step.", 0)

    # Parameters that control the training
    beta: float = option("Weight of the KL divergence from the reference. 0 disables the reference.", 0.004)
    epsilon: float = option("Clip range of the ratio to the sampling policy: `[1 - epsilon, 1 + epsilon]`.", 1e-3)
    scale_rewards: str = option(
        "Standard deviation that advantages are divided by: of the prompt's samples (`group`), of all samples of a "
        "micro-step (`batch`), or none (`none`).",
        "group",
        choices=list(SCALE_REWARDS),
    )

    def __post_init__(self):
        super().__post_init__()

        if self.num_generations < 2:
            raise ValueError(f"`num_generations` must be at least 2 to compare, got {self.num_generations}.")
        self.check_not_negative("beta")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"`epsilon` must be in (0, 1), got {self.epsilon}.")
        if self.sync_ref_model and self.beta == 0:
            raise ValueError("`sync_ref_model=True` has no effect without a reference: set `beta` above 0.")
        self.check_choices(scale_rewards=SCALE_REWARDS)
        self.check_noise(self.step_indices)

    @property
    def step_indices(self) -> list[int]:
        """The stochastic steps W_T, see [`sde_step_indices`]."""
        num_sde_steps = self.num_inference_steps - 1 if self.num_sde_steps is None else self.num_sde_steps
        return sde_step_indices(self.num_inference_steps, num_sde_steps, self.t_init)
