# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Import paths of version 0.1. They work with a `DeprecationWarning` until version 0.3."""

import importlib
import sys
import warnings
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


# Old module: the modules that now hold its names. All names are below `tapo_trl`
MOVED = {
    "cli.bench_arguments": ("cli.arguments",),
    "cli.builders": ("data.loading", "scripts.utils"),
    "cli.dpo": ("scripts.dpo",),
    "cli.evaluation_arguments": ("cli.arguments",),
    "cli.grpo": ("scripts.grpo",),
    "cli.model_arguments": ("trainer.model_config",),
    "cli.online_dpo": ("scripts.online_dpo",),
    "cli.script_arguments": ("data.loading", "scripts.utils"),
    "cli.slrm": ("scripts.slrm",),
    "cli.tapo": ("scripts.tapo",),
    "field_types": ("files",),
    "rewards.backbone": ("rewards.backbones.base", "networks.sharing"),
    "rewards.candidates": ("rewards.scoring",),
    "rewards.clip_modulation": ("rewards.pretrained.preprocessing",),
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
    "trainer.base": ("runs.checks", "trainer.policy_setup"),
    "trainer.callbacks": ("callbacks", "callbacks.reward_guard"),
    "trainer.checkpoints": ("runs.checkpoints",),
    "trainer.generation": ("policies.sampling", "trainer.policy_setup"),
    "trainer.gradient_share": ("callbacks.gradient_share",),
    "trainer.hub": ("runs.hub",),
    "trainer.image_grid": ("media.pictures",),
    "trainer.interruption": ("runs.stopping",),
    "trainer.launch_checks": ("runs.checks",),
    "trainer.lora_checks": ("trainer.policy_setup",),
    "trainer.model_card": ("runs.model_card",),
    "trainer.noise_levels": ("schedulers.noise_levels",),
    "trainer.nonfinite": ("runs.stopping",),
    "trainer.option_checks": ("runs.checks",),
    "trainer.policy_trainer": ("trainer.base", "trainer.policy_setup", "policies.saving"),
    "trainer.preference_data": ("trainer.preference_trainer",),
    "trainer.reward_curve": ("callbacks.reward_curve",),
    "trainer.reward_loading": ("trainer.reward_setup",),
    "trainer.rollout_metrics": ("rollouts.base", "rollouts.groups"),
    "trainer.rollout_reuse": ("rollouts.base", "trainer.rollout_trainer"),
    "trainer.slrm_trainer": ("trainer.slrm_loading",),
    "trainer.speed": (
        "networks.attention",
        "networks.compilation",
        "networks.float8",
        "runs.checks",
        "trainer.policy_setup",
    ),
    "trainer.tapo_metrics": ("rollouts.pairs",),
    "trainer.tracking": ("media.tracking", "trainer.policy_setup"),
}


# Old names of what is called otherwise now
RENAMED = {
    "DiffusionTrainerMixin": "DiffusionTrainer",
    "HubPushMixin": "HubUploads",
    "PolicyTrainerMixin": "DiffusionTrainer",
    "PreferenceDataMixin": "PreferenceTrainer",
    "SealCallback": "Checkpoints",
    "SealedCheckpointsMixin": "Checkpoints",
    "TieCallback": "ShareCallback",
    "place_reward": "move_reward",
    "place_rewards": "move_rewards",
    "rollout_metrics": "pair_metrics",
    "shrink_and_speed_up": "apply_memory_options",
    "tie": "share_parameters",
    "tie_rewards": "share_with_rewards",
}


def moved_names(module: str) -> Callable[[str], Any]:
    """
    The `__getattr__` of a module all or some of whose names are elsewhere now.

    Args:
        module (`str`): its `__name__`.
    """
    package, _, old_name = module.partition(".")

    def find(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {attribute!r}")
        names = [name for name in (attribute, RENAMED.get(attribute)) if name is not None]
        own = vars(sys.modules[module])
        for name in names:
            if name in own:
                return own[name]
        for new in MOVED[old_name]:
            for name in names:
                if hasattr(importlib.import_module(f"{package}.{new}"), name):
                    return getattr(importlib.import_module(f"{package}.{new}"), name)
        raise AttributeError(f"module {module!r} has no attribute {attribute!r}")

    return find


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

        module.__getattr__ = moved_names(module.__name__)
