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

"""Rewards as callables `candidates -> scores`: latent ones, those of one-step estimates, and their weighted sum."""

from collections.abc import Callable, Sequence

import torch

from ..policies import FlowPolicy
from .base import LatentRewardModel
from .candidates import Candidates
from .spm import SPMModel
from .velocity_targets import VelocityTarget, velocity_target


RewardFunction = Callable[..., torch.Tensor | Sequence[float]]
"""
`f(images, prompts, **columns) -> scores`: images are a float tensor `(N, 3, H, W)` in [0, 1]. A policy of videos calls
`f(videos, prompts, **columns)` with `(N, 3, F, H, W)`.
"""


class LatentReward:
    """
    The score of a latent reward model at each candidate's own noise level (log S_hat of an SLRM, Eq. 8 and 12).

    Args:
        model ([`LatentRewardModel`]): frozen reward model.
        velocity_target (`str`): see [`velocity_target`].
        batch_size (`int`, *optional*): candidates per forward. All at once by default.
    """

    def __init__(self, model: LatentRewardModel, velocity_target: VelocityTarget, batch_size: int | None = None):
        self.model = model
        self.velocity_target = velocity_target
        self.batch_size = batch_size
        self.__name__ = model.kind

    @torch.no_grad()
    def __call__(self, candidates: Candidates) -> torch.Tensor:
        target = velocity_target(candidates, self.velocity_target)
        batch_size = self.batch_size or len(candidates)
        scores = []
        for start in range(0, len(candidates), batch_size):
            chunk = slice(start, start + batch_size)
            embeds = candidates.prompt_embeds[chunk]
            scores.append(
                self.model.score(
                    candidates.latents[chunk],
                    candidates.sigma,
                    embeds.prompt_embeds,
                    embeds.pooled_prompt_embeds,
                    velocity_target=None if target is None else target[chunk],
                )
            )
        return torch.cat(scores)


class PixelReward:
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
        self.__name__ = function.__name__ if isinstance(function, type(lambda: 0)) else type(function).__name__

    @torch.no_grad()
    def __call__(self, candidates: Candidates) -> torch.Tensor:
        chunks = candidates.denoised.split(self.batch_size or len(candidates))
        pixels = torch.cat([self.policy.decode(chunk) for chunk in chunks])
        scores = self.function(pixels, candidates.prompts, **candidates.columns)
        scores = torch.as_tensor(scores, dtype=torch.float32, device=candidates.latents.device)
        if scores.shape != (len(candidates),):
            raise ValueError(
                f"The reward function `{self.__name__}` must return one score per candidate, {len(candidates)}, but "
                f"returned shape {tuple(scores.shape)}."
            )
        return scores


class EstimateReward:
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

    @torch.no_grad()
    def __call__(self, candidates: Candidates) -> torch.Tensor:
        estimate = candidates.denoised
        text = self._encode(candidates.prompts, estimate.device)
        batch_size = self.batch_size or len(candidates)
        scores = []
        for start in range(0, len(candidates), batch_size):
            chunk = slice(start, start + batch_size)
            pixel_values = self.model.pixel_values(self.policy.decode(estimate[chunk]))
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
    Weighted sum of rewards. The rewards of the last call are kept in `last_scores`, by name, for logging. Values that are
    not finite are passed on: a rollout goes on with them, so that all processes make the same forwards, and
    [`TAPOTrainer`] skips its update.

    Args:
        rewards (`list`): [`LatentReward`], [`EstimateReward`] and [`PixelReward`].
        weights (`list[float]`, *optional*): one per reward, all 1 by default.
    """

    def __init__(
        self, rewards: Sequence[LatentReward | EstimateReward | PixelReward], weights: Sequence[float] | None = None
    ):
        weights = [1.0] * len(rewards) if weights is None else list(weights)
        if len(weights) != len(rewards):
            raise ValueError(f"`reward_weights` has {len(weights)} entries for {len(rewards)} reward models.")
        self.rewards = list(rewards)
        self.weights = weights
        names = [reward.__name__ for reward in rewards]
        self.names = [
            name if names.count(name) == 1 else f"{name}_{names[:index].count(name)}"
            for index, name in enumerate(names)
        ]
        self.last_scores: dict[str, torch.Tensor] = {}

    def __call__(self, candidates: Candidates) -> torch.Tensor:
        self.last_scores = {name: reward(candidates) for name, reward in zip(self.names, self.rewards, strict=True)}
        return sum(weight * self.last_scores[name] for name, weight in zip(self.names, self.weights, strict=True))
