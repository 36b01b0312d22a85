# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import sys
from typing import TYPE_CHECKING

from .lazy import lazy_exports
from .moved import MovedModules
from .version import __version__


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".data": ("PAIR_PRESETS", "to_preference_pairs"),
        ".policies": ("FlowPolicy", "load_policy"),
        ".rewards": (
            "DiNaModel",
            "LRMModel",
            "RemoteReward",
            "SLRMModel",
            "SPMModel",
            "get_reward",
            "load_reward_model",
        ),
        ".schedulers": ("FlowMatchSDEScheduler",),
        ".callbacks": (
            "EMACallback",
            "GradientShareCallback",
            "PolicyCallback",
            "RewardHackingGuardCallback",
            "SampleGridCallback",
            "TAPOCallback",
        ),
        ".trainer.diffusion_dpo_config": ("DiffusionDPOConfig",),
        ".trainer.diffusion_dpo_trainer": ("DiffusionDPOTrainer",),
        ".trainer.flow_grpo_config": ("FlowGRPOConfig",),
        ".trainer.flow_grpo_trainer": ("FlowGRPOTrainer",),
        ".trainer.nft_config": ("DiffusionNFTConfig",),
        ".trainer.nft_trainer": ("DiffusionNFTTrainer",),
        ".trainer.online_dpo_config": ("OnlineDiffusionDPOConfig",),
        ".trainer.online_dpo_trainer": ("OnlineDiffusionDPOTrainer",),
        ".trainer.refl_config": ("ReFLConfig",),
        ".trainer.refl_trainer": ("ReFLTrainer",),
        ".trainer.sft_config": ("DiffusionSFTConfig",),
        ".trainer.sft_trainer": ("DiffusionSFTTrainer",),
        ".trainer.slrm_config": ("SLRMConfig",),
        ".trainer.slrm_trainer": ("SLRMTrainer",),
        ".trainer.tapo_config": ("TAPOConfig",),
        ".trainer.tapo_trainer": ("TAPOTrainer",),
        ".version": ("__version__",),
    },
)

sys.meta_path.append(MovedModules(__name__))

if TYPE_CHECKING:
    from .callbacks import (
        EMACallback,
        GradientShareCallback,
        PolicyCallback,
        RewardHackingGuardCallback,
        SampleGridCallback,
        TAPOCallback,
    )
    from .data import PAIR_PRESETS, to_preference_pairs
    from .policies import FlowPolicy, load_policy
    from .rewards import DiNaModel, LRMModel, RemoteReward, SLRMModel, SPMModel, get_reward, load_reward_model
    from .schedulers import FlowMatchSDEScheduler
    from .trainer.diffusion_dpo_config import DiffusionDPOConfig
    from .trainer.diffusion_dpo_trainer import DiffusionDPOTrainer
    from .trainer.flow_grpo_config import FlowGRPOConfig
    from .trainer.flow_grpo_trainer import FlowGRPOTrainer
    from .trainer.nft_config import DiffusionNFTConfig
    from .trainer.nft_trainer import DiffusionNFTTrainer
    from .trainer.online_dpo_config import OnlineDiffusionDPOConfig
    from .trainer.online_dpo_trainer import OnlineDiffusionDPOTrainer
    from .trainer.refl_config import ReFLConfig
    from .trainer.refl_trainer import ReFLTrainer
    from .trainer.sft_config import DiffusionSFTConfig
    from .trainer.sft_trainer import DiffusionSFTTrainer
    from .trainer.slrm_config import SLRMConfig
    from .trainer.slrm_trainer import SLRMTrainer
    from .trainer.tapo_config import TAPOConfig
    from .trainer.tapo_trainer import TAPOTrainer
