# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass

from ..field_types import option
from ..runs.checks import check_without_effect
from ..schedulers import sde_step_indices
from .group_rewards import SCALE_REWARDS
from .rollout_config import StochasticRolloutConfig


LOSS_TYPES = ("flow_grpo", "grpo_guard", "flow_dppo")
WINDOW_STRATEGIES = ("progressive", "cyclic", "random")


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
        window_size (`int`, *optional*):
            Number of steps that are stochastic and trained on at a time, as in MixGRPO: a window that slides over the stochastic
            steps, while the others follow the ODE. All of them by default. Evaluations use the first window.
        window_interval (`int`, *optional*, defaults to `25`):
            Rollouts between two moves of the window.
        window_stride (`int`, *optional*, defaults to `1`):
            Stochastic steps that the window moves by.
        window_strategy (`str`, *optional*, defaults to `"progressive"`):
            What comes after the last window: it stays (`"progressive"`), or the first one (`"cyclic"`). `"random"` draws a window
            for every rollout.

        > Parameters that control the training

        loss_type (`str`, *optional*, defaults to `"flow_grpo"`):
            - `"flow_grpo"`: ratios are clipped.
            - `"grpo_guard"`: normalised ratios are clipped, and the loss of a step is divided by its size, as in GRPO-Guard.
            - `"flow_dppo"`: no clipping; steps that have moved too far do not move further, as in Flow-DPPO.
        beta (`float`, *optional*, defaults to `0.004`):
            Weight of the KL divergence of each step from the reference. With 0 the reference is not evaluated.
        epsilon (`float`, *optional*, defaults to `1e-3`):
            Clip range of the ratio to the sampling policy: `[1 - epsilon, 1 + epsilon]`. The default is meant for
            log-probabilities averaged over the latent's dimensions (`logprob_reduction="mean"`), whose ratios stay
            close to 1.
        divergence_threshold (`float`, *optional*, defaults to `1e-5`):
            Divergence from the sampling policy above which a step may not move further, for `loss_type="flow_dppo"`.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            Standard deviation that advantages are divided by: that of the prompt's samples (`"group"`), that of all
            samples of a micro-step on all processes (`"batch"`), or none (`"none"`).
        train_cfg (`bool`, *optional*, defaults to `True`):
            Whether training uses the guidance of the rollout. With `False`, only the conditional velocity is trained, with one
            forward per latent in place of two, and what guidance adds to the mean of a step counts as a constant: ratios to the
            policy that sampled are exact, and 1 at the start, but the gradient is not that of the guided policy, as it leaves
            out how that constant depends on the weights. The KL divergence is that of the steps without guidance. Takes one
            more forward of every stochastic step in the rollout.
        shared_noise (`bool`, *optional*, defaults to `False`):
            Whether all trajectories of a prompt start from the same noise, as in DanceGRPO. They are one up to the first stochastic
            step, and are computed once up to there. With `window_size=1`, a group then differs in one step alone, which gets all the
            credit, as in the branching of TempFlow-GRPO.

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
    loss_type: str = option(
        "Clipped ratios (`flow_grpo`), clipped normalised ratios (`grpo_guard`), or a mask by divergence (`flow_dppo`).",
        "flow_grpo",
        choices=list(LOSS_TYPES),
    )
    divergence_threshold: float = option(
        "Divergence from the sampling policy above which a step may not move further, for `flow_dppo`.", 1e-5
    )

    # Parameters that control the window
    window_size: int | None = option(
        "Steps that are stochastic and trained on at a time, in a sliding window (MixGRPO). All by default."
    )
    window_interval: int = option("Rollouts between two moves of the window.", 25)
    window_stride: int = option("Stochastic steps that the window moves by.", 1)
    window_strategy: str = option(
        "What comes after the last window: it stays (`progressive`), or the first one (`cyclic`); or a random one each time.",
        "progressive",
        choices=list(WINDOW_STRATEGIES),
    )

    # Further parameters that control the training
    train_cfg: bool = option("Whether to train with the classifier-free guidance of the rollout.", True)
    shared_noise: bool = option("Whether all trajectories of a prompt start from the same noise.", False)

    def __post_init__(self):
        super().__post_init__()

        if self.num_generations < 2:
            raise ValueError(f"`num_generations` must be at least 2 to compare, got {self.num_generations}.")
        self.check_not_negative("beta")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"`epsilon` must be in (0, 1), got {self.epsilon}.")
        if self.sync_ref_model and self.beta == 0:
            raise ValueError("`sync_ref_model=True` has no effect without a reference: set `beta` above 0.")
        self.check_choices(scale_rewards=SCALE_REWARDS, loss_type=LOSS_TYPES, window_strategy=WINDOW_STRATEGIES)
        self.check_noise(self.step_indices)
        self.check_positive("divergence_threshold")
        self.check_minimum(1, "window_size", "window_interval", "window_stride")
        if self.window_size is None:
            names = ["window_interval", "window_stride", "window_strategy"]
            check_without_effect(self, names, "without `window_size`")
        elif self.window_size > len(self.step_indices):
            raise ValueError(
                f"`window_size={self.window_size}` is more than the {len(self.step_indices)} stochastic steps: lower it."
            )
        elif self.window_strategy == "random":
            check_without_effect(self, ["window_interval", "window_stride"], "with `window_strategy='random'`")
        unused = "epsilon" if self.loss_type == "flow_dppo" else "divergence_threshold"
        check_without_effect(self, [unused], f"with `loss_type={self.loss_type!r}`")

    @property
    def step_indices(self) -> list[int]:
        """The stochastic steps W_T, see [`sde_step_indices`]."""
        num_sde_steps = self.num_inference_steps - 1 if self.num_sde_steps is None else self.num_sde_steps
        return sde_step_indices(self.num_inference_steps, num_sde_steps, self.t_init)
