# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_args

from trl import RewardConfig

from ..field_types import option
from ..metrics.pair_scores import ACCURACY_RULES
from ..rewards import REWARD_MODELS
from ..rewards.dina import DEFAULT_NUM_QUERIES
from ..rewards.lrm import DEFAULT_GUIDANCE_SCALE
from ..rewards.slrm import (
    DEFAULT_ENHANCEMENT,
    DEFAULT_NUM_TASK_TOKENS,
    DEFAULT_RESOLUTION,
    DEFAULT_RHO,
    DEFAULT_SCORE_LINK,
    DEFAULT_VELOCITY_TARGET,
    Enhancement,
    ScoreLink,
    TrainingVelocityTarget,
)
from ..rewards.spm import DEFAULT_CLIP_MODEL
from ..runs.checks import check_without_effect
from ..schedulers.noise_levels import REWARD_TIMESTEP_SAMPLINGS
from .preference_config import PreferenceDataConfig


# Fields of `RewardConfig` that mean something to a language model only.
_TEXT_FIELDS = (
    "chat_template_path",
    "dataset_num_proc",
    "eos_token",
    "max_length",
    "pad_token",
    "pad_to_multiple_of",
    "trust_remote_code",
)

# Fields that mean something to one kind of reward model only: those of the model itself, and others.
MODEL_FIELDS = {
    "slrm": {"num_task_tokens": "num_task_tokens", "task_projection_rank": "task_projection_rank"},
    "lrm": {"lrm_layer": "layer", "lrm_guidance_scale": "guidance_scale"},
    "dina": {"dina_layers": "layers", "dina_num_queries": "num_queries"},
    "spm": {"spm_clip_model": "clip_model_name_or_path"},
}
_RECORDED = (
    *("rho", "score_link", "enhancement", "velocity_target"),
    *("max_sequence_length", "resolution", "height", "width", "num_frames"),
)
_DEFAULTS = {
    "rho": DEFAULT_RHO,
    "score_link": DEFAULT_SCORE_LINK,
    "enhancement": DEFAULT_ENHANCEMENT,
    "velocity_target": DEFAULT_VELOCITY_TARGET,
    "resolution": DEFAULT_RESOLUTION,
}
SLRM_FIELDS = ("score_link", "rho", "enhancement", "velocity_target", "detach_score", "score_preservation_coef")

LOSS_TYPES = ("bradley_terry", "thurstone")


@dataclass
class SLRMConfig(PreferenceDataConfig, RewardConfig):
    r"""
    Configuration class for the [`SLRMTrainer`], which trains SLRMs and related reward models.

    This class includes only the parameters that are specific to SLRM training. For a full list of training arguments,
    please refer to the [`~transformers.TrainingArguments`] documentation. Note that default values in this class may
    differ from those in [`~transformers.TrainingArguments`]. The defaults are the paper's for SD3.5-medium (Table 5),
    except the number of epochs (3 instead of 5), the batch size (32 pairs in the paper), `velocity_target`
    (`"ground_truth"`) and `score_preservation_coef` (0). The recipe `recipes/sd35/slrm.yaml` sets all values of the
    paper but the last one. Further parameters are those of [`PreferenceDataConfig`] and
    [`DiffusionConfig`].

    When you continue the training of a reward model, `rho`, `score_link`, `velocity_target`, the size (`resolution`,
    `height`, `width`, `num_frames`) and `max_sequence_length` are read from the saved model. Other values raise an
    error.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the model

        reward_model_type (`str`, *optional*, defaults to `"slrm"`):
            Which reward model to train: `"slrm"`, the paper's; `"lrm"`, LPO's; `"dina"`, DiNa-LRM; or `"spm"`, SPO's, which
            reads decoded images. Must be the kind of `model`, if that is a reward model already.
        freeze_backbone (`bool`, *optional*, defaults to `False`):
            Whether to train only the parts added to the backbone: the score stream of an SLRM, the head of an LRM or
            DiNa-LRM, or the modulation of an SPM.

        > Parameters that control the model, if `reward_model_type="slrm"`

        num_task_tokens (`int`, *optional*, defaults to `8`):
            Number of score tokens n_s (Eq. 5). 0 scores the image-text similarity of Eq. 4 instead, on SD3 and SD3.5: the
            ablation "w/o Task Tokens" of Table 3. Ignored if `model` is an SLRM already.
        task_projection_rank (`int`, *optional*):
            If set, the score tokens' projections P^S are updates of this rank of the text stream's, instead of full
            matrices. Ignored if `model` is an SLRM already.
        score_link (`str`, *optional*):
            How the logit becomes a positive score S: `"exp"` or `"softplus"`. Defaults to that of `model`, if it is a reward
            model already, else to `"exp"`.

        > Parameters that control the model, if `reward_model_type="lrm"`

        lrm_layer (`int`, *optional*):
            The joint block whose image tokens are read, counted from 1; those behind it are left out. Defaults to that at
            three quarters of the depth, 18 of SD3's 24. Ignored if `model` is an LRM already.
        lrm_guidance_scale (`float`, *optional*, defaults to `7.5`):
            Scale of the visual feature enhancement, classifier-free guidance of the image's feature. 1 turns it off, which
            halves the cost. Ignored if `model` is an LRM already.

        > Parameters that control the model, if `reward_model_type="dina"`

        dina_layers (`list[int]`, *optional*):
            The blocks that the head reads, counted from 1; those behind the last are left out. Defaults to those at a sixth,
            a third and a half of the depth, 4, 8 and 12 of SD3's 24. Ignored if `model` is a DiNa-LRM already.
        dina_num_queries (`int`, *optional*, defaults to `4`):
            Number of learned queries of the head. Ignored if `model` is a DiNa-LRM already.

        > Parameters that control the model, if `reward_model_type="spm"`

        spm_clip_model (`str`, *optional*, defaults to `"yuvalkirstain/PickScore_v1"`):
            Hub id or folder of the CLIP that it starts from, with tokenizer and image processor. Ignored if `model` is an SPM
            already.

        > Parameters that control the training

        loss_type (`str`, *optional*):
            Loss of a pair: `"bradley_terry"` (Eq. 9) or `"thurstone"`, DiNa-LRM's, which asks for less certainty the noisier
            the latents are. Defaults to `"thurstone"` for DiNa-LRM and to `"bradley_terry"` for the others.
        rho (`float`, *optional*):
            Weight of the distance between the model's velocity and its target in the score (Eq. 7). SLRM only, as are
            `velocity_target`, `detach_score` and `score_preservation_coef`. Defaults to that of `model`, if it is a reward model
            already, else to the paper's `ln 4`.
        eta (`float`, *optional*, defaults to `1.0`):
            Exponent of the scores in the Bradley-Terry loss (Eq. 9).
        velocity_target (`str`, *optional*):
            Target of the model's velocity in training: `"ground_truth"`, x1 - x0, as in the paper; `"reference"`, the
            velocity of the frozen base model at x_t, which does not depend on the clean latent; or `"none"`, the logit
            alone. Defaults to that of `model`, if it is a reward model already, else to `"reference"`.
        detach_score (`bool`, *optional*, defaults to `False`):
            Whether to stop the gradient of the preference loss through the distance.
        score_preservation_coef (`float`, *optional*, defaults to `1.0`):
            Weight of a flow-matching loss on the chosen latents, which keeps the velocity prediction accurate. 0 gives
            the paper's loss.
        center_rewards_coefficient (`float`, *optional*):
            Coefficient to incentivize the reward model to output mean-zero rewards (proposed by [this
            paper](https://huggingface.co/papers/2312.09244), Eq. 2). Recommended value: `0.01`.
        shared_noise (`bool`, *optional*, defaults to `True`):
            Whether the two sides of a pair get the same noise x1. They always get the same noise level.
        timestep_sampling (`str`, *optional*, defaults to `"uniform"`):
            Distribution of the noise level in (0, 1): `"uniform"`, as in the paper; `"logit_normal"`, as in the training of
            SD3; or `"clean"`, no noise at all, the ablation of Figure 15.
        enhancement (`str`, *optional*):
            How the distance enters the score: `"multiplicative"`, S exp(-rho d), as in the paper (Eq. 8), or `"additive"`,
            S + exp(-rho d). Defaults to that of `model`, if it is a reward model already, else to `"multiplicative"`.

        > Parameters that control the evaluation

        eval_rules (`list[str]`, *optional*):
            Velocity targets for which the accuracy is measured: `"ground_truth"`, `"reference"`, `"none"`. Defaults to
            `"ground_truth"` (the paper's) and one that is known at inference time: `"none"` if
            `velocity_target="none"`, else `"reference"`. Reward models other than SLRM support only `"none"`.

    > [!NOTE]
    > `chat_template_path`, `dataset_num_proc`, `eos_token`, `max_length`, `pad_token`, `pad_to_multiple_of` and
    > `trust_remote_code`, which come from [`~trl.RewardConfig`], mean nothing here and must not be set.
    """

    _VALID_DICT_FIELDS = RewardConfig._VALID_DICT_FIELDS + ["dimension_weights"]

    # Parameters that control the model
    reward_model_type: str = option("Which reward model to train.", "slrm", choices=list(REWARD_MODELS))
    freeze_backbone: bool = option(
        "Whether to train only the parts added to the backbone: score stream, head or modulation.", False
    )
    num_task_tokens: int = option(
        "Number of score tokens n_s (Eq. 5). 0 for the image-text similarity in their place (SD3).",
        DEFAULT_NUM_TASK_TOKENS,
    )
    task_projection_rank: int | None = option("Rank of the score tokens' projections P^S. Full matrices by default.")
    score_link: str | None = option(
        "How the logit becomes a positive score. Defaults to the value of the loaded reward model, else `exp`.",
        choices=list(get_args(ScoreLink)),
    )
    lrm_layer: int | None = option(
        "LRM: the block that is read, counted from 1. By default 18 of 24, or in proportion."
    )
    lrm_guidance_scale: float = option(
        "LRM: scale of the visual feature enhancement. 1 turns it off, which halves the cost.", DEFAULT_GUIDANCE_SCALE
    )
    dina_layers: list[int] | None = option(
        "DiNa-LRM: the blocks that are read, counted from 1. By default 4, 8 and 12 of 24, or in proportion."
    )
    dina_num_queries: int = option("DiNa-LRM: number of learned queries of the head.", DEFAULT_NUM_QUERIES)
    spm_clip_model: str = option("SPM: Hub id or folder of the CLIP that it starts from.", DEFAULT_CLIP_MODEL)

    # Parameters that control the training
    loss_type: str | None = option(
        "Loss of a pair. By default `thurstone` for DiNa-LRM, else `bradley_terry`.", choices=list(LOSS_TYPES)
    )
    rho: float | None = option(
        "Weight of the distance in the score (Eq. 7). Defaults to the value of the loaded SLRM, else ln 4."
    )
    eta: float = option("Exponent of the scores in the Bradley-Terry loss (Eq. 9).", 1.0)
    velocity_target: str | None = option(
        "Target of the model's velocity in training. Defaults to the value of the loaded SLRM, else `reference`.",
        choices=list(get_args(TrainingVelocityTarget)),
    )
    detach_score: bool = option("Whether to stop the gradient of the preference loss through the distance.", False)
    score_preservation_coef: float = option("Weight of a flow-matching loss on the chosen latents.", 1.0)
    shared_noise: bool = option("Whether the two sides of a pair get the same noise.", True)
    timestep_sampling: str = option(
        "Distribution of the noise level in (0, 1). `clean` is no noise.",
        "uniform",
        choices=list(REWARD_TIMESTEP_SAMPLINGS),
    )

    # Parameters that control the data
    resolution: int | None = option(
        "Height and width in pixels to which images and videos are cropped and resized. Defaults to the value of the loaded "
        "reward model, else 512."
    )

    # Parameters that control the evaluation
    eval_rules: list[str] | None = option(
        "Velocity targets for the accuracy. Defaults to `ground_truth` and one target that is known at inference time."
    )

    enhancement: str | None = option(
        "How the distance enters the score. Defaults to the value of the loaded SLRM, else `multiplicative`, as in the paper.",
        choices=list(get_args(Enhancement)),
    )

    def __post_init__(self):
        for inherited in fields(RewardConfig):
            if inherited.name in _TEXT_FIELDS and inherited.default is not MISSING:
                if getattr(self, inherited.name) not in (inherited.default, None):
                    raise ValueError(
                        f"`{inherited.name}` is for language models and means nothing to an SLRM: leave it unset. The "
                        "length of prompts is `max_sequence_length`."
                    )
        super().__post_init__()

        if self.loss_type is None:
            self.loss_type = "thurstone" if self.reward_model_type == "dina" else "bradley_terry"
        self.check_choices(
            reward_model_type=tuple(REWARD_MODELS),
            loss_type=LOSS_TYPES,
            score_link=(None, *get_args(ScoreLink)),
            enhancement=(None, *get_args(Enhancement)),
            velocity_target=(None, *get_args(TrainingVelocityTarget)),
            timestep_sampling=REWARD_TIMESTEP_SAMPLINGS,
        )
        self._check_fields_of_kind()
        self.check_minimum(0, "num_task_tokens")
        self.check_minimum(1, "task_projection_rank", "lrm_layer", "dina_num_queries")
        if self.dina_layers is not None and (
            not self.dina_layers or self.dina_layers != sorted(set(self.dina_layers))
        ):
            raise ValueError(f"`dina_layers` must be numbers of blocks in ascending order, got {self.dina_layers}.")
        self.check_not_negative("rho", "score_preservation_coef")
        if self.num_task_tokens == 0:
            check_without_effect(self, ["task_projection_rank"], "with `num_task_tokens=0`")
        if self.velocity_target == "none":
            check_without_effect(self, ["rho", "enhancement", "detach_score"], 'with `velocity_target="none"`')
        if self.timestep_sampling == "clean":  # the score has a distance from sigma = 0.01 on
            check_without_effect(self, ["detach_score"], 'with `timestep_sampling="clean"`')
        if self.rho == 0:
            check_without_effect(self, ["detach_score"], "with `rho=0`")
        self.check_positive("eta")
        if self.eta != 1 and self.loss_type == "thurstone":
            raise ValueError('`eta` is for `loss_type="bradley_terry"`: leave it at 1 with `"thurstone"`.')
        self._chooses_eval_rules = self.eval_rules is None
        if self._chooses_eval_rules:
            self.eval_rules = self._default_eval_rules()
        unknown = [rule for rule in self.eval_rules if rule not in ACCURACY_RULES]
        if unknown:
            raise ValueError(f"`eval_rules` must be among {ACCURACY_RULES}, got {unknown}.")
        if self.reward_model_type != "slrm" and set(self.eval_rules) != {"none"}:
            raise ValueError(
                f"`eval_rules={self.eval_rules}` names velocity targets, but only SLRM has a velocity: leave it unset with "
                f"`reward_model_type={self.reward_model_type!r}`."
            )

    def _check_fields_of_kind(self) -> None:
        only = {name: kind for kind, names in MODEL_FIELDS.items() for name in names} | dict.fromkeys(
            SLRM_FIELDS, "slrm"
        )
        defaults = {own.name: own.default for own in fields(self)}
        for name, kind in only.items():
            allowed = (defaults[name], _DEFAULTS.get(name, defaults[name]))
            if kind != self.reward_model_type and getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` is for `reward_model_type={kind!r}`, but `reward_model_type={self.reward_model_type!r}`: leave "
                    "it unset, or change the type."
                )

    def _default_eval_rules(self) -> list[str]:
        if self.reward_model_type != "slrm":
            return ["none"]
        return ["ground_truth", "none" if self.velocity_target == "none" else "reference"]

    def fill_in(self, recorded: Mapping[str, Any] | None = None) -> None:
        """
        Put into the fields that are left open what a reward model was trained with, else the defaults.

        Args:
            recorded (`Mapping[str, Any]`, *optional*): configuration of the reward model, if there is one already.

        Raises:
            ValueError: if a field says something else than the training that goes on.
        """
        recorded = {name: recorded[name] for name in (*_RECORDED, "trained") if name in (recorded or {})}
        sizes = {name: recorded.get(name) or recorded.get("resolution") for name in ("height", "width")}
        if recorded.get("trained"):
            asked = {name: getattr(self, name) for name in recorded if name not in ("trained", "resolution")}
            asked |= {name: asked[name] or self.resolution for name in sizes}
            for name, value in (recorded | sizes).items():
                if asked.get(name) not in (None, value):
                    field_name = "resolution" if name in sizes and getattr(self, name) is None else name
                    raise ValueError(
                        f"`{field_name}={asked[name]!r}` is not what the reward model in `model` was trained with, "
                        f"`{name}={value!r}`: leave it unset to go on with that training, or start from a pipeline."
                    )
                setattr(self, name, value)
        for name, default in _DEFAULTS.items():
            if getattr(self, name) is None and (self.reward_model_type == "slrm" or name not in SLRM_FIELDS):
                setattr(self, name, recorded.get(name, default))
        if self._chooses_eval_rules:
            self.eval_rules = self._default_eval_rules()

    def model_config(self) -> dict[str, Any]:
        """Fields of the reward model's own configuration, by the names that they have there."""
        return {name: getattr(self, own) for own, name in MODEL_FIELDS[self.reward_model_type].items()}
