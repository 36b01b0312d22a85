# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Score-based Latent Reward Model (SLRM): a diffusion transformer that rates noisy latents (section 3.2 of the paper)."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config

from ..method_card import MethodCard
from ..policies import PromptEmbeddings
from .backbones.score_stream import ScoreTransformerMixin
from .base import LatentRewardModel
from .step_reward import DEFAULT_MAX_SEQUENCE_LENGTH, DEFAULT_RESOLUTION, RewardOutput
from .targets import MIN_SIGMA, ROLLOUT_TARGETS, TrainingVelocityTarget


ScoreLink = Literal["exp", "softplus"]
Enhancement = Literal["multiplicative", "additive"]

DEFAULT_NUM_TASK_TOKENS = 8
DEFAULT_RHO = math.log(4)
DEFAULT_SCORE_LINK: ScoreLink = "exp"
DEFAULT_ENHANCEMENT: Enhancement = "multiplicative"
DEFAULT_VELOCITY_TARGET: TrainingVelocityTarget = "reference"


@dataclass
class SLRMOutput(RewardOutput):
    """
    Output of [`SLRMModel`].

    Args:
        logits (`torch.Tensor` of shape `(batch_size,)`):
            What the score head says, float32. log S(x_t, c) if `score_link="exp"`.
        velocity (`torch.Tensor` of shape `(batch_size, *latent_shape)`):
            The model's own velocity v(x_t, t, c, s), float32.
    """

    velocity: torch.Tensor | None = None  # never `None`; the default lets `BaseOutput` rebuild itself from a mapping


def score_distance(velocity: torch.Tensor, velocity_target: torch.Tensor) -> torch.Tensor:
    """The squared norm of Eq. 7 as a mean: d = mean over all but the batch of (v - v_target)^2, shape `(batch_size,)`."""
    return (velocity - velocity_target).square().flatten(1).mean(dim=1)


def log_score(logits: torch.Tensor, score_link: ScoreLink) -> torch.Tensor:
    """log S for S = exp(logit) or S = softplus(logit), elementwise."""
    if score_link == "exp":
        return logits
    if score_link == "softplus":
        # log(softplus(z)) tends to z: below -15 the difference is under 2e-7, and the logarithm would underflow.
        bounded = logits.clamp(min=-15.0)
        return F.softplus(bounded).log() + (logits - bounded)
    raise ValueError(f"`score_link` must be 'exp' or 'softplus', got {score_link!r}.")


def enhanced_log_score(
    logits: torch.Tensor,
    distance: torch.Tensor,
    sigma: torch.Tensor,
    rho: float = DEFAULT_RHO,
    score_link: ScoreLink = DEFAULT_SCORE_LINK,
    enhancement: Enhancement = DEFAULT_ENHANCEMENT,
) -> torch.Tensor:
    r"""
    Eq. 7 and 8 in the log domain: \\( \log \hat{S} = \log S - \rho d \\), and log S alone where `sigma < 0.01`. With an
    additive enhancement, \\( \log \hat{S} = \log (S + e^{-\rho d}) \\).

    Args:
        logits (`torch.Tensor` of shape `(batch_size,)`): see [`SLRMOutput`].
        distance (`torch.Tensor` of shape `(batch_size,)`): see [`score_distance`].
        sigma (`torch.Tensor` of shape `(batch_size,)`): noise levels in [0, 1].
        rho (`float`, *optional*, defaults to `ln 4`): scale of the distance.
        score_link (`str`, *optional*, defaults to `"exp"`): how a logit becomes a positive score.
        enhancement (`str`, *optional*, defaults to `"multiplicative"`):
            how the score is combined with \\( e^{-\rho d} \\): `"multiplicative"`, as in the paper, or `"additive"`.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`
    """
    log_scores = log_score(logits, score_link)
    if enhancement == "multiplicative":
        enhanced = log_scores - rho * distance
    elif enhancement == "additive":
        # Where nothing is enhanced the distance may be infinite, whose gradient here would be NaN
        enhanced = torch.logaddexp(log_scores, -rho * torch.where(sigma >= MIN_SIGMA, distance, 0.0))
    else:
        raise ValueError(f"`enhancement` must be 'multiplicative' or 'additive', got {enhancement!r}.")
    return torch.where(sigma >= MIN_SIGMA, enhanced, log_scores)


class SLRMModel(LatentRewardModel):
    """
    Score-based Latent Reward Model: a pretrained diffusion transformer with learnable score tokens. The last hidden
    states of these tokens give a logit. The score also depends on the distance of the model's velocity prediction to a
    target (Eq. 7).

    Create one with [`~SLRMModel.from_policy`] or [`~SLRMModel.from_pretrained`], train it with [`SLRMTrainer`], and
    score latents with [`~SLRMModel.score`].

    Args:
        num_task_tokens (`int`, *optional*, defaults to `8`):
            number of score tokens n_s. 0 for the image-text similarity of Eq. 4 in their place, on SD3 and SD3.5.
        task_projection_rank (`int`, *optional*):
            if set, the projections P^S of Eq. 5 are low-rank updates of the backbone's, else full matrices.
        score_link (`str`, *optional*, defaults to `"exp"`): `"exp"` or `"softplus"`, how a logit becomes S > 0.
        rho (`float`, *optional*, defaults to `ln 4`): weight of the distance in Eq. 7.
        velocity_target (`str`, *optional*, defaults to `"reference"`): v_target in training, kept as a record.
        enhancement (`str`, *optional*, defaults to `"multiplicative"`): see [`~rewards.slrm.enhanced_log_score`].

    The others are those of [`LatentRewardModel`].
    """

    kind = "slrm"
    label = "SLRM"
    trained_part = "score stream"
    uses_velocity_target = True
    backbone_kind = "score"
    unsupported = "SLRM has no score stream for `{}`"
    card = MethodCard(
        name=label,
        tags=(kind,),
        paper="xian2026consistent",
        title="score-based latent reward model (SLRM)",
        text="The base model's transformer reads the noisy latent, the prompt and a few score tokens, from which a linear layer "
        "reads the score; the distance between the model's own velocity and a target enters the score, too "
        '(`velocity_target`).\n\nWith `velocity_target="ground_truth"` (the paper\'s rule) the distance contains the clean '
        "sample, which is known in training and in evaluation but not while sampling: compare the accuracy under this rule "
        "with that under another rule only with this in mind.",
    )

    @register_to_config
    def __init__(
        self,
        transformer_class: str,
        transformer_config: dict[str, Any],
        base_model_name_or_path: str = "",
        vae_fingerprint: str = "",
        num_task_tokens: int = DEFAULT_NUM_TASK_TOKENS,
        task_projection_rank: int | None = None,
        score_link: ScoreLink = DEFAULT_SCORE_LINK,
        rho: float = DEFAULT_RHO,
        velocity_target: TrainingVelocityTarget = DEFAULT_VELOCITY_TARGET,
        max_sequence_length: int = DEFAULT_MAX_SEQUENCE_LENGTH,
        resolution: int = DEFAULT_RESOLUTION,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        lora: bool = False,
        base_revision: str | None = None,
        base_variant: str | None = None,
        base_fingerprint: str = "",
        trained: bool = True,
        base_subfolder: str = "transformer",
        enhancement: Enhancement = DEFAULT_ENHANCEMENT,
    ):
        super().__init__()
        score_class = self.backbone_class(transformer_class)
        if num_task_tokens == 0:
            score_class = self._without_tokens(score_class, transformer_class)
        self.transformer = score_class(num_task_tokens, task_projection_rank, **transformer_config)
        self._no_split_modules = score_class._no_split_modules

    @staticmethod
    def _without_tokens(score_class: type[ScoreTransformerMixin], name: str) -> type[ScoreTransformerMixin]:
        if score_class.without_tokens is None:
            raise ValueError(
                f"`num_task_tokens=0` compares image tokens with pooled prompt embeddings and is written for SD3 and SD3.5 alone, "
                f"not for a `{name}`: use score tokens, or another kind of reward model."
            )
        return score_class.without_tokens

    def _attach_base(self, transformer: ModelMixin, share: bool = False) -> None:
        self.transformer = type(self.transformer).from_base(
            transformer, self.config.num_task_tokens, self.config.task_projection_rank, share
        )

    def trained_in_full(self) -> dict[str, torch.Tensor]:
        return self.transformer.score_parameters()

    def rollout_target(self, velocity_target: str | None) -> str:
        return velocity_target or ROLLOUT_TARGETS[self.config.velocity_target]

    def forward(
        self,
        latents: torch.Tensor,
        sigma: float | torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor | None = None,
        mask_task_tokens: bool = False,
        **prompts: torch.Tensor,
    ) -> SLRMOutput:
        """
        Args:
            mask_task_tokens (`bool`, *optional*, defaults to `False`):
                hide the score tokens from the image and the text: the velocity is then that of the backbone alone.

        The others are those of [`~LatentRewardModel.score`].

        Returns:
            [`SLRMOutput`]
        """
        prompts = PromptEmbeddings(prompt_embeds, pooled_prompt_embeds, **prompts)
        with self._mixed_precision(latents.device, self.transformer.backbone_dtype):
            output, logits = self._run_backbone(latents, sigma, prompts, mask_task_tokens=mask_task_tokens)
        velocity = self.policy_class.velocity_of(self.transformer.config, output, latents)
        return SLRMOutput(logits=logits.float(), velocity=velocity.float())

    def _mixed_precision(self, device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
        """Autocast where float32 weights in training meet a backbone in half precision outside of a trainer."""
        added = next(iter(self.trained_in_full().values()))
        if added.dtype == dtype or torch.is_autocast_enabled(device.type):
            return nullcontext()
        return torch.autocast(device.type, dtype=dtype)

    def score_output(
        self, output: SLRMOutput, sigma: torch.Tensor, velocity_target: torch.Tensor | None = None
    ) -> torch.Tensor:
        r"""Eq. 8 in the log domain, see [`enhanced_log_score`], or log S alone without a target and where `sigma < 0.01`."""
        if velocity_target is None:
            return log_score(output.logits, self.config.score_link)
        distance = score_distance(output.velocity, velocity_target.float())
        how = (self.config.rho, self.config.score_link, self.config.enhancement)
        return enhanced_log_score(output.logits, distance, sigma, *how)


score_transformer_class = SLRMModel.backbone_class
