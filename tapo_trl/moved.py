# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Import paths of version 0.1. They work with a `DeprecationWarning` until version 0.3."""

import importlib
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


# Old module: the modules that now hold its names. All names are below `tapo_trl`
MOVED = {
    "cli.dpo": ("scripts.dpo",),
    "cli.grpo": ("scripts.grpo",),
    "cli.online_dpo": ("scripts.online_dpo",),
    "cli.slrm": ("scripts.slrm",),
    "cli.tapo": ("scripts.tapo",),
    "rewards.backbone": ("rewards.backbones.base", "networks.sharing"),
    "rewards.dina_head": ("rewards.dina",),
    "rewards.features": ("rewards.backbones.features",),
    "rewards.features_sd3": ("rewards.backbones.sd3",),
    "rewards.features_wan": ("rewards.backbones.wan",),
    "rewards.score_stream": ("rewards.backbones.score_stream",),
    "rewards.sharing": ("networks.sharing",),
    "rewards.slrm_sd3": ("rewards.backbones.sd3",),
    "rewards.slrm_wan": ("rewards.backbones.wan",),
    "rewards.velocity_targets": ("rewards.targets",),
    "rollouts.rollout": ("rollouts.base",),
    "rollouts.sampler": ("rollouts.base",),
    "rollouts.tapo": ("rollouts.pairs",),
    "rollouts.trajectory": ("rollouts.pairs",),
    "trainer.callbacks": ("callbacks", "callbacks.reward_guard"),
    "trainer.checkpoints": ("runs.checkpoints",),
    "trainer.generation": ("policies.sampling",),
    "trainer.gradient_share": ("callbacks.gradient_share",),
    "trainer.hub": ("runs.hub",),
    "trainer.image_grid": ("media.pictures",),
    "trainer.interruption": ("runs.interruption",),
    "trainer.launch_checks": ("runs.launch_checks",),
    "trainer.lora_checks": ("policies.lora",),
    "trainer.model_card": ("runs.model_card",),
    "trainer.noise_levels": ("schedulers.noise_levels",),
    "trainer.nonfinite": ("runs.nonfinite",),
    "trainer.option_checks": ("runs.option_checks",),
    "trainer.reward_curve": ("callbacks.reward_curve",),
    "trainer.rollout_metrics": ("rollouts.metrics",),
    "trainer.rollout_reuse": ("rollouts.reuse",),
    "trainer.speed": ("networks.speed",),
    "trainer.tracking": ("media.tracking",),
}


class MovedModules(MetaPathFinder, Loader):
    """Finds the old modules. Install it with `sys.meta_path.append(MovedModules(__name__))` in the package."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == self.package and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        modules = [f"{self.package}.{name}" for name in MOVED[module.__name__.partition(".")[2]]]
        message = f"`{module.__name__}` is now {' and '.join(f'`{name}`' for name in modules)}; the old name goes with version 0.3."
        warnings.warn(message, DeprecationWarning, stacklevel=2)

        def find(name: str):
            for new in map(importlib.import_module, modules):
                if hasattr(new, name):
                    return getattr(new, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = find
