# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass

from transformers.utils import logging

from ..field_types import option
from ..rewards.targets import VELOCITY_TARGETS
from ..rollouts import PAIRINGS, get_pairing
from ..runs.checks import check_without_effect
from ..schedulers import sde_step_indices
from .rollout_config import StochasticRolloutConfig


logger = logging.get_logger(__name__)


@dataclass
class TAPOConfig(StochasticRolloutConfig):
    r"""
    Configuration class for the [`TAPOTrainer`].

    This class includes only the parameters that are specific to TAPO training. For a full list of training arguments,
    please refer to the [`~transformers.TrainingArguments`] documentation. Note that default values in this class may
    differ from those in [`~transformers.TrainingArguments`]. The defaults are the paper's for SD3.5-medium (Table 5),
    except 3 epochs instead of 5 and bf16 instead of fp16. Pass the paper's LoRA of rank 64 as the trainer's
    `peft_config`. The recipe `recipes/sd35/tapo.yaml` sets all values of the paper. The parameters of all trainers
    with rollouts are those of [`RolloutConfig`] and [`StochasticRolloutConfig`].

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the rollout

        pairing (`str`, *optional*, defaults to `"tapo"`):
            How preference pairs are formed from the candidates, see [`~rollouts.pairing.get_pairing`]: `"tapo"`, the
            best of a winning and the worst of a losing trajectory (Eq. 12); `"spo"`, the best and the worst of one
            trajectory, which continues from a random candidate; `"lpo"`, the same with a threshold that grows with the
            noise; `"tapo_within"`, the best and the worst inside each of TAPO's two trajectories.
        continue_with (`str`, *optional*):
            Candidate from which the trajectory of `"spo"` and `"lpo"` continues: `"random"` (the default) or `"best"`.
        pair_threshold (`list[float]`, *optional*):
            Minimum difference between the probabilities of the two sides (a softmax of their rewards) for a pair to
            count: one number, or two for the least and the most noise. Defaults to 0.3 for `"spo"`, 0.35 and 0.5 for
            `"lpo"`, and none otherwise.
        consistent_pairs (`bool`, *optional*, defaults to `False`):
            Whether pairs of `"tapo"` count only if their ranking does not flip until the end: the chosen side scores higher
            at its own step, and so does the final sample of the winning trajectory. Costs two reward forwards per prompt.
        num_sde_steps (`int`, *optional*, defaults to `8`):
            Number of stochastic steps n at which candidates are drawn and scored (Eq. 10).
        num_candidates (`int`, *optional*, defaults to `4`):
            Number of candidates P per branch and stochastic step (Eq. 12).
        t_init (`int`, *optional*, defaults to `1`):
            Index of the first stochastic step, counted from the noise (Eq. 10).

        > Parameters that control the reward

        velocity_target (`str`, *optional*):
            Target of the SLRM's velocity while sampling, where the clean latent is unknown: `"parent"`, `"policy"`,
            `"reference"`, `"initial_noise"` or `"none"`, see [`~rewards.targets.velocity_target`]. The default matches
            the SLRM's training: `"reference"` and `"none"` stay the same, and `"parent"` replaces `"ground_truth"`.
        reward_min_sigma (`list[float]`, *optional*):
            Noise level from which on each of several reward models counts. Below it is not computed. 0 by default.
        reward_max_sigma (`list[float]`, *optional*):
            Noise level from which on each of several reward models counts no more, such as `[1.1, 0.4]` with
            `reward_min_sigma=[0.4, 0.0]`: the first above 0.4, the second below. Infinite by default.
        score_estimates (`bool`, *optional*, defaults to `False`):
            Whether latent reward models score the one-step estimate of each candidate's clean latent, at noise level 0, instead
            of the noisy candidate. Costs a forward of the policy per candidate, of which the next step uses again those of the
            candidates that are kept.

        > Parameters that control the training

        beta (`float`, *optional*):
            Strength of the regularisation towards the reference, Eq. 13. It fits log-probabilities that are averaged
            over the latent's dimensions (`logprob_reduction="mean"`). Defaults to what the authors of `pairing` use: 1000
            for `"tapo"` and `"tapo_within"`, 10 for `"spo"` and 500 for `"lpo"`.
        kl_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the KL divergence of each step from the reference, which is added to the loss. Eq. 13 contrasts
            the two sides of a pair and does not see changes that affect both alike; the KL divergence does. Needs no
            further forward pass.
        loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"` (Eq. 13), `"hinge"` or `"ipo"`.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Assumed probability that a preference label is flipped.
        ratio_clip (`float`, *optional*):
            Keeps the ratios of the policy to the reference in `[1 - ratio_clip, 1 + ratio_clip]`, as SPO's code does
            with 0.1. Off by default, as in Eq. 13.
        step_weighting (`str`, *optional*, defaults to `"none"`):
            `"none"`: equal weights for all steps (Eq. 13), which gives late steps a much larger gradient with respect
            to the predicted velocity. `"velocity"`: weights that equalise this gradient over the steps.
        train_cfg (`bool`, *optional*, defaults to `True`):
            Whether transitions are scored with the guidance they were sampled with. With `False`, policy and reference are
            compared without guidance, with one forward per latent in place of two: the loss is exactly ln 2 at the start and
            that of Eq. 13 for the policy without guidance, but transitions are those of the guided one, so that the
            log-ratios also see what guidance has added to the mean.
        beta_reference_dim (`int`, *optional*):
            Dimensions of the latents that `beta` is meant for, such as 65536 for SD3.5 at 512 x 512. With it, `beta` is scaled
            by sqrt(D / beta_reference_dim), so that a pair's logit has the same noise, see [`~losses.transferred_beta`]. By
            default, `beta` as it is.
        center_log_ratios (`bool`, *optional*, defaults to `False`):
            Whether the log-ratio of each side counts relative to its mean over the P candidates of the same parent. The sides of
            `"tapo"` have different parents, whose log-partition functions do not cancel in Eq. 13. Not for pairings with one
            parent, where it does cancel.
        pairs_per_update (`int`, *optional*):
            Number of pairs of each prompt that an optimiser step trains on, drawn at random anew for every step. The expected
            gradient is that of all pairs, see [`~rollouts.subset.draw_examples`]; it is noisier, and the update costs as much
            less. Pairs that do not count (ties, `pair_threshold`) are drawn only if there are too few others. By default, all
            pairs: n, or 2n for `"tapo_within"`. Evaluation uses all.
    """

    # Parameters that control the rollout
    pairing: str = option("How preference pairs are formed from the candidates.", "tapo", choices=list(PAIRINGS))
    continue_with: str | None = option(
        "Candidate from which the trajectory of `spo` and `lpo` continues. Random by default.",
        choices=["random", "best"],
    )
    pair_threshold: list[float] | None = option(
        "Minimum difference between the probabilities of the two sides for a pair to count: one number, or two for "
        "the least and the most noise. Defaults to that of `pairing`."
    )
    consistent_pairs: bool = option(
        "Whether to drop pairs of `tapo` whose ranking flips before the final samples.", False
    )
    num_sde_steps: int = option("Number of stochastic steps n, Eq. 10.", 8)
    num_candidates: int = option("Number of candidates P per branch and stochastic step, Eq. 12.", 4)
    t_init: int = option("Index of the first stochastic step, Eq. 10.", 1)

    # Parameters that control the reward
    velocity_target: str | None = option(
        "Target of the SLRM's velocity while sampling, where the clean latent is unknown. By default the one that "
        "matches the SLRM's training.",
        choices=list(VELOCITY_TARGETS),
    )

    # Parameters that control the training
    beta: float | None = option(
        "Strength of the regularisation to the reference. By default that of `pairing`: 1000 for `tapo` and "
        "`tapo_within`, 10 for `spo`, 500 for `lpo`."
    )
    kl_coef: float = option("Weight of the KL divergence from the reference, added to the loss.", 0.0)
    loss_type: str = option("Loss of a pair.", "sigmoid", choices=["sigmoid", "hinge", "ipo"])
    label_smoothing: float = option("Assumed probability that a preference label is flipped.", 0.0)
    ratio_clip: float | None = option("Clip range of the ratio to the reference: `[1 - ratio_clip, 1 + ratio_clip]`.")
    step_weighting: str = option(
        "`none`: equal weights for all steps. `velocity`: weights that equalise the gradient with respect to the "
        "velocity.",
        "none",
        choices=["none", "velocity"],
    )
    train_cfg: bool = option("Whether to train with the classifier-free guidance of the rollout.", True)
    beta_reference_dim: int | None = option(
        "Dimensions of the latents that `beta` is meant for: it is scaled by sqrt(D / beta_reference_dim). By default, "
        "`beta` as it is."
    )
    center_log_ratios: bool = option(
        "Whether the log-ratio of each side counts relative to its mean over the candidates of the same parent.", False
    )
    pairs_per_update: int | None = option(
        "Pairs of each prompt that an optimiser step trains on, drawn at random. All by default."
    )
    reward_min_sigma: list[float] | None = option(
        "Lowest noise level at which each of several reward models counts, inclusive. 0 by default."
    )
    reward_max_sigma: list[float] | None = option(
        "Upper bound of the noise levels at which each of several reward models counts, exclusive. None by default."
    )
    score_estimates: bool = option(
        "Whether latent reward models score one-step estimates of the candidates instead of the noisy candidates.",
        False,
    )

    def __post_init__(self):
        super().__post_init__()

        step_indices = sde_step_indices(self.num_inference_steps, self.num_sde_steps, self.t_init)
        pairing = get_pairing(self.pairing, self.continue_with, self.pair_threshold, self.consistent_pairs)
        if self.beta is None:
            self.beta = pairing.beta
        elif self.beta != pairing.beta != PAIRINGS["tapo"].beta:
            logger.warning(
                f"`beta={self.beta:g}` with `pairing={self.pairing!r}`, whose authors use {pairing.beta:g}: leave `beta` unset for "
                "that, if yours was chosen for another pairing."
            )
        if self.num_candidates < 2:
            raise ValueError(f"`num_candidates` must be at least 2 to have a choice, got {self.num_candidates}.")
        self.check_positive("beta")
        if self.score_estimates and self.velocity_target != "none":
            check_without_effect(
                self, ["velocity_target"], "with `score_estimates=True`: estimates are compared with nothing"
            )
        self.check_minimum(1, "beta_reference_dim", "pairs_per_update")
        pairing.check_number(self.pairs_per_update, len(step_indices))
        if self.logprob_reduction == "sum":
            check_without_effect(self, ["beta_reference_dim"], "with `logprob_reduction='sum'`: it is for means")
        self.check_not_negative("kl_coef")
        self.check_label_smoothing()
        if pairing.shared_parent:
            check_without_effect(
                self, ["center_log_ratios"], f"with `pairing={self.pairing!r}`, whose pairs share a parent"
            )
        if self.loss_type != "sigmoid":
            check_without_effect(self, ["label_smoothing"], f"with `loss_type={self.loss_type!r}`")
        if self.ratio_clip is not None and not 0 < self.ratio_clip < 1:
            raise ValueError(f"`ratio_clip` must be in (0, 1), got {self.ratio_clip}.")
        self.check_choices(
            loss_type=("sigmoid", "hinge", "ipo"),
            step_weighting=("none", "velocity"),
            velocity_target=(None, *VELOCITY_TARGETS),
        )
        self.check_noise(step_indices)
