# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""One launch per engine, shared by all tests: starting Python on every process takes longer than the trainings."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tapo_trl import SLRMModel, load_policy
from tapo_trl.policies.flux import FluxPolicy
from tapo_trl.policies.qwen_image import QwenImagePolicy
from tests.data.preference_pairs import color_pairs, latent_pairs
from tests.distributed.launching import ENGINES, Engine, compile_deepspeed, launch
from tests.testing_utils import tiny_sd3_pipeline, tiny_wan_pipeline


# Updates of SGD are linear in the gradient: a gradient that is too large by a factor gives other weights, which Adam,
# whose updates do not depend on the scale, would hide; and Adam makes large updates of rounding errors where a gradient
# is close to zero. Norms stay below `max_grad_norm`, which would hide the factor as well, in all but "accumulate".
PARITY = {
    "tapo": {
        "trainer": "tapo",
        "global_batch": 4,
        "evaluate": True,
        "generate": True,
        "ema": True,
        "args": {"max_steps": 3, "learning_rate": 0.5, "beta": 100.0},
    },
    "accumulate": {
        "trainer": "tapo",
        "global_batch": 4,
        "args": {
            "max_steps": 3,
            "learning_rate": 0.2,
            "beta": 300.0,
            "gradient_accumulation_steps": 2,
            "activation_checkpointing": True,
        },
    },
    "full": {
        "trainer": "tapo",
        "global_batch": 4,
        "lora": False,
        "args": {"max_steps": 2, "learning_rate": 0.1, "beta": 10.0},
    },
}
# An old policy that is far from the trained one, whose advantages are scaled by the samples of all processes
NFT = {
    "trainer": "nft",
    "global_batch": 4,
    "args": {"max_steps": 3, "learning_rate": 5.0, "old_policy_decay_rate": 0.4, "old_policy_max_decay": 0.9},
}
NFT_PARITY = {"nft": NFT}
# ZeRO-3 that keeps small weights whole, as it does by default: all of a tiny model
KEPT_WHOLE = {
    "tapo_kept_whole": PARITY["tapo"] | {"keep_small": True},
    "nft_kept_whole": NFT | {"keep_small": True},
}
SLRM = {"trainer": "slrm", "global_batch": 4, "evaluate": True, "args": {"max_steps": 4, "learning_rate": 0.1}}
VIDEO = {"family": "wan21", "video": True}
SLRM_PARITY = {"slrm": SLRM}
SLRM_FULL = {"slrm_full": SLRM | {"lora": False, "args": {"max_steps": 2, "learning_rate": 0.01}}}
SLRM_VIDEO = {"slrm_video": SLRM | VIDEO | {"args": {"max_steps": 2, "learning_rate": 0.1, "num_frames": 5}}}
DINA = {"dina": SLRM | {"args": {"max_steps": 2, "learning_rate": 0.1, "reward_model_type": "dina"}}}
LRM = {"lrm": SLRM | {"args": {"max_steps": 2, "learning_rate": 0.01, "reward_model_type": "lrm"}}}
# Other families with a pixel reward. Of Qwen-Image's last block, a layer of the prompt has no gradient
FAMILY_PARITY = {
    family: {
        "trainer": "tapo",
        "global_batch": 4,
        "family": family,
        "rewards": ["redness"],
        "args": {
            "max_steps": 2,
            "learning_rate": 0.1,
            "beta": 100.0,
            "max_sequence_length": 8,
            "ddp_find_unused_parameters": True,
        },
    }
    for family in ("flux1", "qwen_image")
}
VIDEO_PARITY = {
    "wan21": {
        "trainer": "tapo",
        "global_batch": 4,
        "rewards": ["video_reward"],
        "args": {"max_steps": 2, "learning_rate": 0.1, "beta": 100.0, "num_frames": 5, "max_grad_norm": 100.0},
    }
    | VIDEO
}
METHOD_PARITY = {
    method: {"trainer": method, "global_batch": 4, "args": {"max_steps": 2, "max_grad_norm": 100.0} | args}
    for method, args in {
        "online_dpo": {"learning_rate": 0.5},
        "grpo": {"learning_rate": 10.0, "epsilon": 0.5},
        "dpo": {"learning_rate": 0.005},
        "sft": {"learning_rate": 1.0},
    }.items()
}
# Each process trains on pairs of other steps, whose names it logs
SUBSET = {
    "subset": {
        "trainer": "tapo",
        "global_batch": 2,
        "args": PARITY["tapo"]["args"] | {"max_steps": 4, "pairs_per_update": 1, "logging_steps": 2},
    }
}
# The second update of three is skipped, by whichever process saw that a reward is not finite
SKIPPED = {"skipped": {"trainer": "tapo", "global_batch": 4, "args": PARITY["tapo"]["args"]}}
SKIPPED_ALONE = {"skipped": SKIPPED["skipped"] | {"bad": {"process": 0, "steps": [2]}}}
SKIPPED_BY_ONE = {"skipped": SKIPPED["skipped"] | {"bad": {"process": 1, "steps": [2]}}}
# 12 rows are 3 steps of 4: the checkpoint of step 4 lies inside of the second epoch
ADAM = {
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "weight_decay": 0.01,
    "lr_scheduler_type": "cosine",
    "max_steps": 5,
    "save_strategy": "steps",
    "save_steps": 4,
}
GAVE_UP = {
    "gave_up": {
        "trainer": "tapo",
        "global_batch": 4,
        "fails": True,
        "bad": {"process": 1, "steps": [2, 3]},
        "args": ADAM | {"max_skipped_updates": 1, "save_steps": 1},
    }
}
BF16_RESUME = {
    "adam_bf16": {"trainer": "tapo", "global_batch": 4, "args": ADAM | {"bf16": True}},
    "resumed_bf16": {"trainer": "tapo", "global_batch": 4, "args": ADAM | {"bf16": True}, "resume": "adam_bf16"},
}
SLRM_RESUME = {
    "slrm_adam": {"trainer": "slrm", "global_batch": 4, "args": ADAM},
    "slrm_resumed": {"trainer": "slrm", "global_batch": 4, "args": ADAM, "resume": "slrm_adam"},
}
# A checkpoint in the middle of an epoch and between two updates from the same rollouts, and an average of the weights
REUSED = {"trainer": "tapo", "global_batch": 4, "args": ADAM | {"num_iterations": 2, "save_steps": 100}}
EMA_RESUME = {
    "ema": REUSED | {"save_at": 3, "ema": True},
    "ema_resumed": REUSED | {"resume": "ema", "ema": True},
}
UNEVEN = {
    "uneven": {
        "trainer": "tapo",
        "global_batch": 4,
        "num_rows": 10,
        "args": {"num_train_epochs": 1, "learning_rate": 0.1},
    },
}
NFT_RESUME = {
    "nft_adam": {"trainer": "nft", "global_batch": 4, "args": ADAM | {"old_policy_decay_rate": 0.2}},
    "nft_resumed": {
        "trainer": "nft",
        "global_batch": 4,
        "args": ADAM | {"old_policy_decay_rate": 0.2},
        "resume": "nft_adam",
    },
}
REFUSED_LRM = {"lrm_refused": LRM["lrm"] | {"refused": True}}
ALONE = {"alone": {"trainer": "tapo", "global_batch": 4, "refused": True, "args": {"use_cpu": False}}}
NOT_SHARDED = {
    "not_sharded": {"trainer": "tapo", "global_batch": 4, "refused": True, "pretend_gpus": False, "args": {}}
}

# Under every engine that has a test of its own; then what each has beside it
EVERYWHERE = PARITY | NFT_PARITY | SLRM_PARITY | VIDEO_PARITY | SLRM_VIDEO
SEVERAL = EVERYWHERE | SKIPPED_BY_ONE | EMA_RESUME | NFT_RESUME | BF16_RESUME | SLRM_RESUME
RUNS = {
    "single": EVERYWHERE | FAMILY_PARITY | METHOD_PARITY | SUBSET | SLRM_FULL | DINA | LRM | SKIPPED_ALONE,
    "ddp": SEVERAL | FAMILY_PARITY | METHOD_PARITY | SUBSET | LRM | GAVE_UP | UNEVEN,
    "zero1": {"tapo": PARITY["tapo"]},
    "zero2": SEVERAL | FAMILY_PARITY | REFUSED_LRM | GAVE_UP | ALONE,
    "zero3": SEVERAL | KEPT_WHOLE | SLRM_FULL | DINA | REFUSED_LRM,
    "fsdp2": SEVERAL | FAMILY_PARITY | METHOD_PARITY | SLRM_FULL | DINA | REFUSED_LRM | NOT_SHARDED,
}
# What CI leaves out: the same check under one more engine
EXHAUSTIVE = {
    "single": {},
    "ddp": FAMILY_PARITY | VIDEO_PARITY | SLRM_VIDEO | NFT_RESUME | BF16_RESUME,
    "zero1": {},
    "zero2": FAMILY_PARITY | NFT_PARITY | NFT_RESUME | SLRM_RESUME,
    "zero3": NFT_PARITY | VIDEO_PARITY | SLRM_VIDEO | EMA_RESUME | NFT_RESUME | BF16_RESUME | DINA | KEPT_WHOLE,
    "fsdp2": METHOD_PARITY | VIDEO_PARITY | SLRM_VIDEO | BF16_RESUME | SLRM_FULL,
}


def engine_param(engine: str, *values: str, run: str):
    """A parameter of tests of a run under an engine."""
    return pytest.param(engine, *values, marks=pytest.mark.exhaustive if run in EXHAUSTIVE[engine] else ())


@dataclass
class Results:
    """What the runs of an engine left."""

    engine: Engine
    folder: Path
    facts: dict[str, dict]

    def weights(self, run: str, file: str = "pytorch_lora_weights.safetensors") -> dict[str, torch.Tensor]:
        """The final weights, as diffusers loads them."""
        return load_file(self.folder / run / "final" / file)


@pytest.fixture(scope="session")
def job(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("assets")
    tiny_sd3_pipeline().save_pretrained(folder / "pipeline")
    FluxPolicy.tiny().save_pretrained(folder / "flux1")
    QwenImagePolicy.tiny().save_pretrained(folder / "qwen_image")
    tiny_wan_pipeline().save_pretrained(folder / "wan21")
    policy = load_policy(str(folder / "pipeline"))
    torch.manual_seed(0)
    SLRMModel.from_policy(policy, num_task_tokens=2, max_sequence_length=4).save_pretrained(folder / "reward")
    policy = load_policy(str(folder / "wan21"))
    SLRMModel.from_policy(policy, num_task_tokens=2, max_sequence_length=4).save_pretrained(folder / "video_reward")
    color_pairs(12).save_to_disk(folder / "pairs")
    latent_pairs(12, shape=(4, 2, 4, 4)).save_to_disk(folder / "video_pairs")
    names = ("pipeline", "flux1", "qwen_image", "wan21", "reward", "video_reward", "pairs", "video_pairs")
    return {name: str(folder / name) for name in names}


@pytest.fixture(scope="session")
def results(job, tmp_path_factory, request):
    """`results("zero2")`: what the runs of that engine left."""

    compile_once = cache(compile_deepspeed)
    is_exhaustive = any(item.get_closest_marker("exhaustive") for item in request.session.items)

    @cache
    def of_engine(name: str) -> Results:
        if ENGINES[name].recipe.startswith("deepspeed"):
            compile_once()
        folder = tmp_path_factory.mktemp(name)
        left_out = {} if is_exhaustive else EXHAUSTIVE[name]
        runs = {run: options for run, options in RUNS[name].items() if run not in left_out}
        facts = launch(ENGINES[name], job | {"runs": runs}, folder)
        return Results(ENGINES[name], folder, facts)

    return of_engine
