# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The emoji world for `tapo-trl reproduce ... --world emoji`."""

from functools import cache
from pathlib import Path

import torch
from judges import StyleJudge, SubjectJudge, load_judges

from tapo_trl.reproduction.world import World


HERE = Path("examples/emoji")
PREFERRED_STYLE = "fluent"


@cache
def judges() -> tuple[StyleJudge, SubjectJudge]:
    return load_judges(HERE / "judges")


def judge(images: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
    style_judge, subject_judge = judges()
    styles = style_judge.style_probabilities(images)
    preferred = style_judge.styles.index(PREFERRED_STYLE)
    caption = subject_judge.probabilities(images, prompts)
    return {
        "both": styles[:, preferred] * caption,
        "style": (styles.argmax(-1) == preferred).float(),
        "caption": caption,
        "R@1": (subject_judge.ranks(images, prompts) == 1).float(),
    }


FIRST_RATES = (4e-3, 8e-3)

WORLD = World(
    name="emoji",
    recipes={
        "slrm": "recipes/emoji/slrm.yaml",
        "slrm_lrm": "recipes/emoji/slrm_lrm.yaml",
        "slrm_dina": "recipes/emoji/slrm_dina.yaml",
        "slrm_spm": "recipes/emoji/slrm_spm.yaml",
        "tapo": "recipes/emoji/tapo.yaml",
        "dpo": "recipes/emoji/dpo.yaml",
        "online_dpo": "recipes/emoji/online_dpo.yaml",
        "grpo": "recipes/emoji/grpo.yaml",
    },
    pairs={split: str(HERE / "pairs" / f"{split}.parquet") for split in ("validation", "test")},
    prompts={split: str(HERE / "prompts" / f"{split}.txt") for split in ("validation", "test")},
    judge=judge,
    primary="both",
    describe={
        "both": "probability of the preferred style times that of the right caption",
        "style": "share of the preferred style",
        "caption": "probability of the right caption among all",
        "R@1": "share of pictures whose best caption is the right one",
    },
    learning_rates=dict.fromkeys(("tapo", "dpo", "online_dpo", "grpo"), FIRST_RATES),
    prompts_per_step=6,
    num_steps=16,
    num_inference_steps=20,
    guidance_scale=1.5,
)
