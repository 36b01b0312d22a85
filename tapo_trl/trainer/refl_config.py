# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass, fields

from ..field_types import option
from ..runs.checks import check_without_effect
from .rollout_config import RolloutConfig


@dataclass
class ReFLConfig(RolloutConfig):
    r"""
    Configuration class for the [`ReFLTrainer`].

    This class includes only the parameters that are specific to ReFL training. For a full list of training arguments, please
    refer to the [`~transformers.TrainingArguments`] documentation. Note that default values in this class may differ from
    those in [`~transformers.TrainingArguments`]. The parameters of all online trainers are those of [`RolloutConfig`].

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        num_grad_steps (`int`, *optional*, defaults to `1`):
            Number K of last sampling steps that the gradient of the reward is backpropagated through. Memory grows
            with K.
        estimate_range (`list[int]`, *optional*):
            First and last index of a range of sampling steps. Each update draws a step of the range at random and
            rewards its one-step prediction of the clean latent, as in ReFL. By default final samples are rewarded, as
            in DRaFT-K and AlignProp.
        beta (`float`, *optional*, defaults to `0.0`):
            Weight of the mean squared difference of the velocities of policy and reference at the steps with gradient. At 0
            the reference is not evaluated.
    """

    num_grad_steps: int = option(
        "Number K of last sampling steps that the gradient of the reward is backpropagated through.", 1
    )
    estimate_range: list[int] | None = option(
        "First and last sampling step of a range. Each update rewards the one-step prediction at a random step of it. By "
        "default final samples are rewarded."
    )
    beta: float = option(
        "Weight of the squared difference of velocities from the reference. 0 disables the reference.", 0.0
    )

    def __post_init__(self):
        super().__post_init__()
        steps, bounds = self.num_inference_steps, self.estimate_range
        if not 1 <= self.num_grad_steps <= steps:
            raise ValueError(
                f"`num_grad_steps` must be in [1, num_inference_steps={steps}], got {self.num_grad_steps}."
            )
        if bounds is not None:
            if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] < steps:
                raise ValueError(
                    f"`estimate_range` must be the first and the last of the sampling steps 0 to {steps - 1}, got {bounds}."
                )
            check_without_effect(self, ["num_grad_steps"], "with `estimate_range`: an estimate is one step")
        self.check_not_negative("beta")
        if self.reward_weights is not None and not any(self.reward_weights):
            raise ValueError(
                "`reward_weights` are all 0, so that there is no gradient: give one of them another weight."
            )
        if self.beta == 0:
            check_without_effect(self, ["sync_ref_model"], "without a reference (`beta=0`)")
        unusable = {
            "num_iterations": "the rewards of a rollout are those of the policy that is trained",
            "standardize_rewards": "each prompt has one sample",
            "reward_layerwise_casting": "the gradient goes through the reward model",
            "reward_group_offload": "the gradient goes through the reward model",
        }
        defaults = {own.name: own.default for own in fields(self)}
        for name, reason in unusable.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` does not work with ReFL: {reason}. Leave it unset."
                )
