# Copyright 2026 The tapo_trl authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_args

from trl import RewardConfig

from ..data.dimensions import check_dimension_weights
from ..data.preferences import DEFAULT_FPS
from ..metrics.preference_accuracy import ACCURACY_RULES
from ..rewards.slrm import (
    DEFAULT_NUM_TASK_TOKENS,
    DEFAULT_RESOLUTION,
    DEFAULT_RHO,
    DEFAULT_SCORE_LINK,
    DEFAULT_VELOCITY_TARGET,
    ScoreLink,
    TrainingVelocityTarget,
)


# Fields of `RewardConfig` that mean something to a language model only.
_TEXT_FIELDS = ("chat_template_path", "eos_token", "max_length", "pad_token", "pad_to_multiple_of")


@dataclass
class SLRMConfig(RewardConfig):
    r"""
    Configuration class for the [`SLRMTrainer`].

    This class includes only the parameters that are specific to SLRM training. For a full list of training arguments,
    please refer to the [`~transformers.TrainingArguments`] documentation. Note that default values in this class may
    differ from those in [`~transformers.TrainingArguments`]. The defaults are the paper's for SD3.5-medium (Table 5),
    where it gives them.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~diffusers.DiffusionPipeline.from_pretrained`], used when the `model` argument of
            the [`SLRMTrainer`] is a string, for example `{"torch_dtype": "bfloat16", "revision": "main"}`.
        num_task_tokens (`int`, *optional*, defaults to `8`):
            Number of score tokens n_s (Eq. 5). Ignored if `model` is an SLRM already.
        task_projection_rank (`int`, *optional*):
            If set, the score tokens' projections P^S are updates of this rank of the text stream's, instead of full
            matrices. Ignored if `model` is an SLRM already.
        score_link (`str`, *optional*, defaults to `"exp"`):
            How the logit becomes a positive score S: `"exp"` or `"softplus"`.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout in the model (LoRA dropout included).

        > Parameters that control the data preprocessing

        resolution (`int`, *optional*, defaults to `512`):
            Height and width in pixels to which images and videos are cropped and resized. `height` and `width` take
            precedence.
        height (`int`, *optional*):
            Height in pixels.
        width (`int`, *optional*):
            Width in pixels.
        num_frames (`int`, *optional*):
            Number of frames, for policies that make videos: one more than a multiple of 4 for Wan2.1. They are taken
            from the start of each video.
        fps (`int`, *optional*, defaults to `16`):
            Frames per second at which videos are sampled.
        dimension_weights (`dict[str, float]`, *optional*):
            Weights of the columns `label_<dimension>`, such as `{"visual_quality": 1.0, "motion_consistency": 1.0,
            "text_alignment": 1.0}`, whose weighted sum then says which side is preferred. Without it, that is `chosen`.
        skip_bad_files (`bool`, *optional*, defaults to `False`):
            Whether to leave out pairs with a file that is unreadable, damaged or too short, and log which. Otherwise
            that is an error, which lists them.
        max_sequence_length (`int`, *optional*):
            Number of tokens of the T5 (or UMT5) text encoder. Defaults to the model family's: 256 for SD3.5 and 512 for
            Wan2.1.
        cache_latents (`bool`, *optional*, defaults to `True`):
            Whether to encode all images or videos before training, into a file that later runs re-use. Otherwise they
            are read and encoded batch by batch.
        vae_tiling (`bool`, *optional*, defaults to `False`):
            Whether to encode large images or videos in overlapping tiles, which needs less memory and changes them a
            little.
        vae_slicing (`bool`, *optional*, defaults to `False`):
            Whether to encode the images or videos of a batch one at a time. Videos are, when their latents are cached.
        cache_dir (`str`, *optional*):
            Where latents and prompt embeddings are kept. Defaults to `tapo_trl` in the Hugging Face home.

        > Parameters that control the training

        rho (`float`, *optional*, defaults to `ln 4`):
            Weight of the distance between the model's velocity and its target in the score (Eq. 7).
        eta (`float`, *optional*, defaults to `1.0`):
            Exponent of the scores in the Bradley-Terry loss (Eq. 9).
        velocity_target (`str`, *optional*, defaults to `"reference"`):
            What the model's velocity is compared to in training: `"ground_truth"`, x1 - x0, as in the paper;
            `"reference"`, the velocity of the frozen base model at x_t, which holds nothing of the clean latent; or
            `"none"`, the logit alone.
        detach_score (`bool`, *optional*, defaults to `False`):
            Whether to stop the gradient of the preference loss through the distance.
        score_preservation_coef (`float`, *optional*, defaults to `1.0`):
            Weight of a flow-matching loss on the chosen latents, which keeps the model's velocity a velocity. 0 is the
            paper's loss.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Probability that a label is flipped. Ties (label 0.5) always count as one half.
        center_rewards_coefficient (`float`, *optional*):
            Coefficient to incentivize the reward model to output mean-zero rewards (proposed by [this
            paper](https://huggingface.co/papers/2312.09244), Eq. 2). Recommended value: `0.01`.
        shared_noise (`bool`, *optional*, defaults to `True`):
            Whether the two sides of a pair get the same noise x1. They always get the same noise level.
        timestep_sampling (`str`, *optional*, defaults to `"uniform"`):
            Distribution of the noise level in (0, 1): `"uniform"`, as in the paper, or `"logit_normal"`, as in the
            training of SD3.

        > Parameters that control the evaluation

        eval_sigmas (`list[float]`, *optional*, defaults to `[0.1, 0.3, 0.5, 0.7, 0.9]`):
            Noise levels at which the accuracy is measured; the evaluation loss is the mean over them.
        eval_rules (`list[str]`, *optional*):
            Velocity targets under which the accuracy is measured, side by side: `"ground_truth"`, `"reference"`,
            `"none"`. Defaults to `"ground_truth"`, the paper's rule, and one that a rollout can use: `"none"` if
            `velocity_target="none"`, else `"reference"`.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `activation_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `1e-5` instead of `5e-5`.
    > - `weight_decay`: Defaults to `0.01` instead of `0.0`.
    >
    > `chat_template_path`, `eos_token`, `max_length`, `pad_token` and `pad_to_multiple_of`, which come from
    > [`~trl.RewardConfig`], mean nothing here and must not be set.
    """

    _VALID_DICT_FIELDS = RewardConfig._VALID_DICT_FIELDS + ["dimension_weights"]

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
    num_task_tokens: int = field(
        default=DEFAULT_NUM_TASK_TOKENS, metadata={"help": "Number of score tokens n_s (Eq. 5)."}
    )
    task_projection_rank: int | None = field(
        default=None, metadata={"help": "Rank of the score tokens' projections P^S. Full matrices by default."}
    )
    score_link: str = field(
        default=DEFAULT_SCORE_LINK,
        metadata={"help": "How the logit becomes a positive score.", "choices": list(get_args(ScoreLink))},
    )

    # Parameters that control the data preprocessing
    resolution: int = field(
        default=DEFAULT_RESOLUTION,
        metadata={"help": "Height and width in pixels to which images and videos are cropped and resized."},
    )
    height: int | None = field(default=None, metadata={"help": "Height in pixels. Overrides `resolution`."})
    width: int | None = field(default=None, metadata={"help": "Width in pixels. Overrides `resolution`."})
    num_frames: int | None = field(
        default=None, metadata={"help": "Number of frames from the start of each video, for video policies."}
    )
    fps: int = field(default=DEFAULT_FPS, metadata={"help": "Frames per second at which videos are sampled."})
    dimension_weights: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": "Weights of the columns `label_<dimension>`, which then say which side is preferred."},
    )
    skip_bad_files: bool = field(
        default=False,
        metadata={"help": "Whether to leave out pairs with a file that is unreadable, damaged or too short."},
    )
    max_sequence_length: int | None = field(
        default=None,
        metadata={
            "help": "Number of tokens of the T5 (or UMT5) text encoder. By default the model family's: 256 for SD3.5, 512 "
            "for Wan2.1."
        },
    )
    cache_latents: bool = field(
        default=True, metadata={"help": "Whether to encode all images or videos before training, into a file."}
    )
    vae_tiling: bool = field(
        default=False, metadata={"help": "Whether to encode large images or videos in overlapping tiles."}
    )
    vae_slicing: bool = field(
        default=False, metadata={"help": "Whether to encode the images or videos of a batch one at a time."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where latents and prompt embeddings are kept."})

    # Parameters that control the training
    rho: float = field(default=DEFAULT_RHO, metadata={"help": "Weight of the distance in the score (Eq. 7)."})
    eta: float = field(default=1.0, metadata={"help": "Exponent of the scores in the Bradley-Terry loss (Eq. 9)."})
    velocity_target: str = field(
        default=DEFAULT_VELOCITY_TARGET,
        metadata={
            "help": "What the model's velocity is compared to in training.",
            "choices": list(get_args(TrainingVelocityTarget)),
        },
    )
    detach_score: bool = field(
        default=False, metadata={"help": "Whether to stop the gradient of the preference loss through the distance."}
    )
    score_preservation_coef: float = field(
        default=1.0, metadata={"help": "Weight of a flow-matching loss on the chosen latents."}
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "Probability that a label is flipped."})
    shared_noise: bool = field(default=True, metadata={"help": "Whether the two sides of a pair get the same noise."})
    timestep_sampling: str = field(
        default="uniform",
        metadata={"help": "Distribution of the noise level in (0, 1).", "choices": ["uniform", "logit_normal"]},
    )

    # Parameters that control the evaluation
    eval_sigmas: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9],
        metadata={"help": "Noise levels at which the accuracy is measured."},
    )
    eval_rules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Velocity targets under which the accuracy is measured. Defaults to the paper's, `ground_truth`, "
            "and one that a rollout can use."
        },
    )

    def __post_init__(self):
        for inherited in fields(RewardConfig):
            if inherited.name in _TEXT_FIELDS and inherited.default is not MISSING:
                if getattr(self, inherited.name) not in (inherited.default, None):
                    raise ValueError(
                        f"`{inherited.name}` is for language models and means nothing to an SLRM: leave it unset. The "
                        "length of prompts is `max_sequence_length`."
                    )
        if self.gradient_checkpointing is not None:
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()

        choices = {
            "score_link": get_args(ScoreLink),
            "velocity_target": get_args(TrainingVelocityTarget),
            "timestep_sampling": ("uniform", "logit_normal"),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` must be one of {values}, got {getattr(self, name)!r}.")
        positive = ("num_task_tokens", "task_projection_rank", "max_sequence_length")
        for name in (*positive, "resolution", "height", "width", "num_frames", "fps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.dimension_weights is not None:
            check_dimension_weights(self.dimension_weights)
        for name in ("rho", "score_preservation_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.eta <= 0:
            raise ValueError(f"`eta` must be positive, got {self.eta}.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"`label_smoothing` must be in [0, 0.5), got {self.label_smoothing}.")
        if not self.eval_sigmas or not all(0 <= sigma <= 1 for sigma in self.eval_sigmas):
            raise ValueError(f"`eval_sigmas` must be noise levels in [0, 1], at least one, got {self.eval_sigmas}.")
        if self.eval_rules is None:
            self.eval_rules = ["ground_truth", "none" if self.velocity_target == "none" else "reference"]
        unknown = [rule for rule in self.eval_rules if rule not in ACCURACY_RULES]
        if unknown:
            raise ValueError(f"`eval_rules` must be among {ACCURACY_RULES}, got {unknown}.")
