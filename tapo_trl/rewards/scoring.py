# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Candidates of a stochastic step, and rewards of them, `candidates -> scores`: what they may look at, and their weighted sum."""

import functools
import inspect
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import FunctionType
from typing import Any

import torch

from ..policies import FlowPolicy, PromptEmbeddings
from .base import LatentRewardModel
from .pretrained.base import PretrainedReward
from .remote import RemoteReward
from .spm import SPMModel
from .targets import VelocityTarget, velocity_target


@dataclass
class Candidates:
    """
    Candidates x' of one stochastic step, flattened to one batch.

    Args:
        latents (`torch.Tensor` of shape `(num_candidates, *latent_shape)`):
            x', noisy latents, float32.
        sigma (`torch.Tensor` of shape `()`):
            sigma', the noise level of `latents`.
        clean_estimate (`torch.Tensor`, shaped as `latents`):
            \\( \\hat{x}_0 = x - \\sigma v(x) \\) of each candidate's parent x.
        initial_noise (`torch.Tensor`, shaped as `latents`):
            x_T of each candidate's trajectory.
        prompts (`list[str]`):
            Prompt of each candidate.
        prompt_embeds ([`PromptEmbeddings`]):
            Their embeddings.
        columns (`dict[str, list]`):
            The dataset's further columns, one value per candidate.
        predict_velocity (`Callable`):
            Returns v(x') of the current policy, with its guidance. Called at most once.
        predict_reference_velocity (`Callable`):
            Returns v(x') of the reference policy, without guidance. Called at most once.
    """

    latents: torch.Tensor
    sigma: torch.Tensor
    clean_estimate: torch.Tensor
    initial_noise: torch.Tensor
    prompts: list[str]
    prompt_embeds: PromptEmbeddings
    columns: dict[str, list[Any]]
    predict_velocity: Callable[[], torch.Tensor]
    predict_reference_velocity: Callable[[], torch.Tensor]

    def __len__(self) -> int:
        return len(self.latents)

    @cached_property
    def velocity(self) -> torch.Tensor:
        return self.predict_velocity()

    @cached_property
    def reference_velocity(self) -> torch.Tensor:
        return self.predict_reference_velocity()

    @property
    def has_velocity(self) -> bool:
        """Whether `velocity` was needed, and so costs nothing any more."""
        return "velocity" in self.__dict__

    @property
    def denoised(self) -> torch.Tensor:
        """One-step estimate of each candidate's own clean latent, \\( x' - \\sigma' v(x') \\)."""
        return self.latents - self.sigma * self.velocity


class CleanSamples(Candidates):
    """
    Final samples, as candidates at noise level 0: they are their own clean estimates, and no velocity is predicted. Arguments
    are those of [`Candidates`].
    """

    def __init__(
        self,
        latents: torch.Tensor,
        initial_noise: torch.Tensor,
        prompts: list[str],
        prompt_embeds: PromptEmbeddings,
        columns: dict[str, list[Any]],
    ):
        sigma = torch.zeros((), device=latents.device)
        of_prompts = (prompts, prompt_embeds, columns)
        super().__init__(latents, sigma, latents, initial_noise, *of_prompts, _no_velocity, _no_velocity)

    @property
    def denoised(self) -> torch.Tensor:
        return self.latents


def _no_velocity() -> torch.Tensor:
    raise RuntimeError("A clean sample has no noise whose velocity could be predicted.")


RewardFunction = Callable[..., torch.Tensor | Sequence[float]]
"""
`f(images, prompts, **columns) -> scores`: images are a float32 tensor `(N, 3, H, W)` in [0, 1]. A policy of videos calls
`f(videos, prompts, **columns)` with `(N, 3, F, H, W)`. It is called without gradients and outside of any autocast.
"""


def reward_name(function: RewardFunction) -> str:
    """What a reward function is called in logs and messages."""
    if isinstance(function, (PretrainedReward, RemoteReward)):
        return function.name
    return function.__name__ if isinstance(function, FunctionType) else type(function).__name__


def check_reward_function(function: RewardFunction, columns: Iterable[str] = (), media: str = "images") -> None:
    """
    Check that a reward function takes what it is going to be called with, without calling it.

    Args:
        function (`Callable`): see [`RewardFunction`].
        columns (`Iterable[str]`, *optional*): columns of the dataset beside `prompt`.
        media (`str`, *optional*, defaults to `"images"`): what it scores, for the message.

    Raises:
        ValueError: if it is a class, `async` or a generator, if it needs other arguments, if it does not take one of the
            columns, or if a column has the name of one of its first two arguments.
    """
    columns = list(columns)
    if inspect.isclass(function):
        raise ValueError(f"The reward function `{function.__name__}` is a class: pass an instance of it.")
    name = reward_name(function)
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise ValueError(f"The reward function `{name}` is `async` or a generator: let it return the scores.")
    takes = f"It is called as `{name}({', '.join([media, 'prompts', *(f'{column}=...' for column in columns)])})`"
    is_method = not isinstance(function, (FunctionType, functools.partial))
    try:
        signature = inspect.signature(function.forward if isinstance(function, torch.nn.Module) else function)
    except (TypeError, ValueError):  # some callables written in C have none
        return
    taken = [parameter.name for parameter in signature.parameters.values() if parameter.kind in _POSITIONAL][:2]
    clashes = [column for column in columns if column in taken or (column == "self" and is_method)]
    if clashes:
        raise ValueError(
            f"The dataset has columns that are called as arguments of the reward function `{name}`: {clashes}. {takes}. Rename "
            "them (`dataset.rename_column`), or leave them out (`dataset.remove_columns`)."
        )
    try:
        signature.bind(None, None, **dict.fromkeys(columns))
    except TypeError as error:
        raise ValueError(
            f"The reward function `{name}{signature}` cannot be called: {error}. {takes}: let it take `{media}`, `prompts` and "
            "`**columns`."
        ) from error


def call_reward_function(
    function: RewardFunction,
    pixels: torch.Tensor,
    prompts: list[str],
    columns: dict[str, list[Any]] | None = None,
    noun: str = "candidate",
    with_gradient: bool = False,
) -> torch.Tensor:
    """
    Scores of a reward function, which computes in its own precision: outside of the trainer's autocast.

    Args:
        function (`Callable`): see [`RewardFunction`].
        pixels (`torch.Tensor` of shape `(N, 3, H, W)` or `(N, 3, F, H, W)`): images or videos in [0, 1].
        prompts (`list[str]`): one per image.
        columns (`dict[str, list]`, *optional*): further columns of the dataset, one value per image.
        noun (`str`, *optional*, defaults to `"candidate"`): what is scored, for the message.
        with_gradient (`bool`, *optional*, defaults to `False`): whether gradients flow back to the pixels.

    Returns:
        `torch.Tensor` of shape `(N,)`: float32, on the device of `pixels`.

    Raises:
        ValueError: if it returns anything else than one score per image, or scores without the gradient that is asked for.
    """
    with torch.autocast(pixels.device.type, enabled=False), torch.set_grad_enabled(with_gradient):
        returned = function(pixels.float(), prompts, **(columns or {}))
    problem = (
        f"The reward function `{reward_name(function)}` must return one score per {noun}, {len(prompts)}, but returned"
    )
    try:
        scores = torch.as_tensor(returned, dtype=torch.float32, device=pixels.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{problem} {_describe(returned)}, which are no numbers.") from error
    if scores.shape != (len(prompts),):
        raise ValueError(f"{problem} shape {tuple(scores.shape)}.")
    if with_gradient and not scores.requires_grad:
        raise ValueError(
            f"The reward function `{reward_name(function)}` returned scores without a gradient to the {noun}s: let it compute "
            "them with differentiable operations of PyTorch, not under `torch.no_grad()`."
        )
    return scores


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _describe(returned: Any) -> str:
    if not isinstance(returned, (list, tuple)):
        return f"`{type(returned).__name__}`"
    kinds = dict.fromkeys(type(part).__name__ for part in returned)
    return f"a `{type(returned).__name__}` of {', '.join(f'`{kind}`' for kind in kinds)}"


def _chunks(length: int, size: int | None) -> list[slice]:
    size = size or length
    return [slice(start, start + size) for start in range(0, length, size)]


def _decode(policy: FlowPolicy, latents: torch.Tensor) -> torch.Tensor:
    return policy.decode(latents, with_gradient=True) if torch.is_grad_enabled() else policy.decode(latents)


class CandidateReward(ABC):
    """A frozen reward of candidates."""

    __name__: str

    @abstractmethod
    def score(self, candidates: Candidates) -> torch.Tensor:
        """Scores of shape `(num_candidates,)`, float32. Gradients flow back to the latents unless you disable them."""

    @torch.no_grad()
    def __call__(self, candidates: Candidates) -> torch.Tensor:
        return self.score(candidates)


class LatentReward(CandidateReward):
    r"""
    The score of a latent reward model at each candidate's own noise level (log S_hat of an SLRM, Eq. 8 and 12), or of its one-step
    estimate \( \hat{x}_0 = x' - \sigma' v(x') \) at noise level 0.

    Args:
        model ([`LatentRewardModel`]): frozen reward model.
        velocity_target (`str`): see [`velocity_target`].
        batch_size (`int`, *optional*): candidates per forward. All at once by default.
        of_estimates (`bool`, *optional*, defaults to `False`): score one-step estimates, without a target.
    """

    def __init__(
        self,
        model: LatentRewardModel,
        velocity_target: VelocityTarget,
        batch_size: int | None = None,
        of_estimates: bool = False,
    ):
        self.model = model
        self.velocity_target = "none" if of_estimates else velocity_target
        self.batch_size = batch_size
        self.of_estimates = of_estimates
        self.__name__ = model.kind

    def score(self, candidates: Candidates) -> torch.Tensor:
        target = velocity_target(candidates, self.velocity_target)
        latents, sigma = candidates.latents, candidates.sigma
        if self.of_estimates:
            latents, sigma = candidates.denoised, torch.zeros_like(sigma)
        scores = [
            self.model.score(
                latents[chunk],
                sigma,
                velocity_target=None if target is None else target[chunk],
                **candidates.prompt_embeds[chunk].tensors,
            )
            for chunk in _chunks(len(candidates), self.batch_size)
        ]
        return torch.cat(scores)


class PixelReward(CandidateReward):
    r"""
    A reward of images or videos, applied to the decoded one-step estimate \( \hat{x}_0 = x' - \sigma' v(x') \) of each
    candidate, or to the samples themselves if they are clean.

    Args:
        function (`Callable`): `f(images, prompts, **columns) -> scores`, see [`RewardFunction`].
        policy ([`FlowPolicy`]): decodes.
        batch_size (`int`, *optional*): candidates per decoding. All at once by default.
    """

    def __init__(self, function: RewardFunction, policy: FlowPolicy, batch_size: int | None = None):
        self.function = function
        self.policy = policy
        self.batch_size = batch_size
        self.__name__ = reward_name(function)

    def score(self, candidates: Candidates) -> torch.Tensor:
        with_gradient, function = torch.is_grad_enabled(), self.function
        chunks = candidates.denoised.split(self.batch_size or len(candidates))
        pixels = torch.cat([_decode(self.policy, chunk) for chunk in chunks])
        if with_gradient and isinstance(function, PretrainedReward):
            function = function.to(pixels.device).score
        return call_reward_function(
            function, pixels, candidates.prompts, candidates.columns, with_gradient=with_gradient
        )


class EstimateReward(CandidateReward):
    r"""
    The score of a reward model that reads the decoded one-step estimate \( \hat{x}_0 = x' - \sigma' v(x') \) of each
    candidate and its prompt, at the candidate's own noise level: an SPM. The next step uses the velocity again.

    Args:
        model ([`SPMModel`]): frozen reward model.
        policy ([`FlowPolicy`]): decodes.
        batch_size (`int`, *optional*): candidates per decoding and forward. All at once by default.
    """

    def __init__(self, model: SPMModel, policy: FlowPolicy, batch_size: int | None = None):
        self.model = model
        self.policy = policy
        self.batch_size = batch_size
        self.__name__ = model.kind
        self._text_features: dict[str, torch.Tensor] = {}  # the model is frozen: each prompt once

    def score(self, candidates: Candidates) -> torch.Tensor:
        estimate = candidates.denoised
        text, scores = self._encode(candidates.prompts, estimate.device), []
        for chunk in _chunks(len(candidates), self.batch_size):
            pixel_values = self.model.pixel_values(_decode(self.policy, estimate[chunk]))
            features = self.model.image_features(pixel_values, candidates.sigma)
            scores.append(self.model.similarity(features, text[chunk]))
        return torch.cat(scores)

    def _encode(self, prompts: list[str], device: torch.device) -> torch.Tensor:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._text_features]
        if new:
            features = self.model.text_features(self.model.tokenize(new).to(device))
            self._text_features |= dict(zip(new, features, strict=True))
        return torch.stack([self._text_features[prompt] for prompt in prompts])


class WeightedReward:
    """
    Weighted sum of rewards. Those of the last call are kept for logging in `last_scores`, by name, and `last_sum`. Values that are
    not finite are passed on: a rollout goes on with them, so that all processes make the same forwards, and
    [`TAPOTrainer`] skips its update.

    Args:
        rewards (`list[CandidateReward]`): [`LatentReward`], [`EstimateReward`] and [`PixelReward`].
        weights (`list`, *optional*):
            one per reward, all 1 by default: a number, or a function of the candidates' noise level such as [`RangeWeight`]. Where
            such a function is 0 the reward is not computed, and its `last_scores` are NaN.
        standardize (`bool`, *optional*, defaults to `False`):
            whether to bring each reward to mean 0 and standard deviation 1 over the candidates of a prompt before the sum, so
            that the weights compare. `last_scores` and `last_sum` stay as they are.
    """

    def __init__(
        self,
        rewards: Sequence[CandidateReward],
        weights: Sequence[float | Callable[[float], float]] | None = None,
        standardize: bool = False,
    ):
        weights = [1.0] * len(rewards) if weights is None else list(weights)
        if len(weights) != len(rewards):
            raise ValueError(f"`reward_weights` has {len(weights)} entries for {len(rewards)} reward models.")
        self.rewards = list(rewards)
        self.weights = weights
        self.standardize = standardize
        self.names = _unique([reward.__name__ for reward in rewards])
        self.last_scores: dict[str, torch.Tensor] = {}

    def __call__(self, candidates: Candidates) -> torch.Tensor:
        return self._sum(candidates, [reward if needed else None for reward, needed, _ in self._parts(candidates)])

    def score(self, candidates: Candidates) -> torch.Tensor:
        """The same with gradients to the latents, see [`CandidateReward`]. A reward whose weight is 0 needs none."""
        parts = self._parts(candidates)
        return self._sum(
            candidates,
            [(reward.score if weight else reward) if needed else None for reward, needed, weight in parts],
        )

    def weights_at(self, sigma: float) -> list[float]:
        """The weights of candidates at this noise level."""
        return [weight(sigma) if callable(weight) else weight for weight in self.weights]

    def _parts(self, candidates: Candidates) -> list[tuple[CandidateReward, bool, float]]:
        """Each reward, whether it is computed, and its weight."""
        weights = self._weights(candidates)
        needed = [bool(weight) or not callable(own) for own, weight in zip(self.weights, weights, strict=True)]
        return list(zip(self.rewards, needed, weights, strict=True))

    def _weights(self, candidates: Candidates) -> list[float]:
        return self.weights_at(candidates.sigma.item()) if any(map(callable, self.weights)) else self.weights

    def _sum(self, candidates: Candidates, scorers: list[Callable[[Candidates], torch.Tensor] | None]) -> torch.Tensor:
        scores = [None if scorer is None else scorer(candidates) for scorer in scorers]
        if all(values is None for values in scores):
            raise ValueError(
                f"No reward counts at the noise level {candidates.sigma.item():.3g}: change their weights."
            )
        missing = candidates.latents.new_full((len(candidates),), math.nan)
        self.last_scores = {
            name: missing if values is None else values.detach()
            for name, values in zip(self.names, scores, strict=True)
        }
        pairs = [pair for pair in zip(self._weights(candidates), scores, strict=True) if pair[1] is not None]
        total = sum(weight * values for weight, values in pairs)
        self.last_sum = total.detach()
        if self.standardize:
            total = sum(weight * standardize_groups(values, candidates.prompts) for weight, values in pairs)
        return total


def standardize_groups(scores: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """
    Scores minus the mean of those of the same prompt, divided by their standard deviation. All 0 where they are equal.

    Args:
        scores (`torch.Tensor` of shape `(N,)`): scores.
        prompts (`Sequence[str]`): one per score.
    """
    standardized = scores.clone()
    for prompt in dict.fromkeys(prompts):
        rows = [row for row, other in enumerate(prompts) if other == prompt]
        group = scores[rows] - scores[rows].mean()
        std = group.square().mean().sqrt()
        standardized[rows] = group / std.where(std != 0, 1.0)
    return standardized


def _unique(names: list[str]) -> list[str]:
    """`names`, with numbers behind those that come more than once."""
    taken = {name for name in names if names.count(name) == 1}
    unique = []
    for name in names:
        if name not in taken:
            name = next(
                new for new in (f"{name}_{index}" for index in itertools.count()) if new not in {*taken, *unique}
            )
        unique.append(name)
    return unique
