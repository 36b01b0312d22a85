# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The table of model families. A new one is a line here, a policy, and backbones for latent reward models on it."""

import pkgutil
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline

from .base import FlowPolicy


@dataclass(frozen=True)
class Family:
    """
    Class names of a model family.

    Args:
        pipeline (`str`): pipeline in diffusers.
        transformer (`str`): transformer in diffusers.
        policy (`str`): subclass of [`FlowPolicy`], as `"module:class"`.
        score (`str`, *optional*): the transformer with score tokens, for [`SLRMModel`].
        features (`str`, *optional*): its first blocks, for [`DiNaModel`] and [`LRMModel`].
    """

    pipeline: str
    transformer: str
    policy: str
    score: str | None = None
    features: str | None = None

    @property
    def policy_class(self) -> type[FlowPolicy]:
        return pkgutil.resolve_name(self.policy)

    def backbone_class(self, kind: str) -> type | None:
        """The reward backbone of this kind, `"score"` or `"features"`, if there is one."""
        name = getattr(self, kind)
        return None if name is None else pkgutil.resolve_name(name)


FAMILIES = [
    Family(
        pipeline="StableDiffusion3Pipeline",
        transformer="SD3Transformer2DModel",
        policy="tapo_trl.policies.sd3:SD3Policy",
        score="tapo_trl.rewards.backbones.sd3:SD3ScoreTransformer2DModel",
        features="tapo_trl.rewards.backbones.sd3:SD3FeatureTransformer2DModel",
    ),
    Family(
        pipeline="WanPipeline",
        transformer="WanTransformer3DModel",
        policy="tapo_trl.policies.wan:WanPolicy",
        score="tapo_trl.rewards.backbones.wan:WanScoreTransformer3DModel",
        features="tapo_trl.rewards.backbones.wan:WanFeatureTransformer3DModel",
    ),
]


def family_of(pipeline: DiffusionPipeline | str) -> Family | None:
    """The family of a pipeline, given as an object or by the name of its class."""
    names = [pipeline] if isinstance(pipeline, str) else [base.__name__ for base in type(pipeline).__mro__]
    return next((family for family in FAMILIES if family.pipeline in names), None)


def family_of_transformer(transformer_class: str) -> Family | None:
    """The family of a transformer, by the name of its class in diffusers."""
    return next((family for family in FAMILIES if family.transformer == transformer_class), None)


def known_pipelines() -> dict[str, tuple[str, dict[str, tuple[str, dict[str, Any]]]]]:
    """Pipeline class and `known_configs` of all released pipelines that the package knows, by repository."""
    return {
        repository: (family.pipeline, components)
        for family in FAMILIES
        for repository, components in family.policy_class.known_configs.items()
    }


def base_license(name: str) -> tuple[str, str | None] | None:
    """`license` and `license_name` of released weights, which a fine-tuning inherits, by the name of their repository."""
    for family in FAMILIES:
        for prefix, license in family.policy_class.licenses.items():
            if name.startswith(prefix):
                return license
    return None
