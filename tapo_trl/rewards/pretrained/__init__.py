# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""Pretrained scorers of images and videos by short names. Their modules are imported when they are asked for."""

import difflib
import importlib
import os

from .base import PretrainedReward


# Name: module and class
REWARDS = {
    "aesthetic": "clip:AestheticReward",
    "clip": "clip:CLIPReward",
    "geneval": "geneval:GenEvalReward",
    "hpsv2.1": "hpsv2:HPSv21Reward",
    "hpsv3": "hpsv3:HPSv3Reward",
    "imagereward": "imagereward:ImageReward",
    "mps": "mps:MPSReward",
    "ocr": "ocr:OCRReward",
    "pickscore": "clip:PickScoreReward",
    "videoreward": "videoreward:VideoReward",
    "vqascore": "vqascore:VQAScoreReward",
}


def list_rewards() -> list[str]:
    """Names of the pretrained scorers, for [`get_reward`]."""
    return sorted(REWARDS)


def reward_class(name: str) -> type[PretrainedReward]:
    """
    The class of a pretrained scorer, whose attributes describe it.

    Raises:
        ValueError: if there is no such scorer. The message has the nearest names.
    """
    if name not in REWARDS:
        raise ValueError(f"There is no reward `{name}`. {_unknown(name)}")
    module, class_name = REWARDS[name].split(":")
    return getattr(importlib.import_module(f".{module}", __name__), class_name)


def is_reward_name(spec: str) -> bool:
    """
    Whether a text is the name of a pretrained scorer, and neither a folder nor a Hub id.

    Raises:
        ValueError: if there is a folder of that name, too.
    """
    if spec in REWARDS and os.path.exists(spec):
        raise ValueError(
            f"`{spec}` is the name of a reward and of a folder here: write `./{spec}` for the folder, or rename it."
        )
    return spec in REWARDS


def check_reward_name(spec: str) -> None:
    """
    Raises:
        ValueError: if a text is neither the name of a pretrained scorer, nor a Hub id or a folder.
    """
    if not is_reward_name(spec) and "/" not in spec and not os.path.exists(spec):
        raise ValueError(f"`{spec}` is neither a folder here nor a reward. {_unknown(spec)}")


def get_reward(name: str, **kwargs) -> PretrainedReward:
    """
    Load a pretrained image or video scorer, to use as `reward_model`.

    ```python
    from tapo_trl import TAPOConfig, TAPOTrainer, get_reward

    pickscore = get_reward("pickscore", torch_dtype="bfloat16")
    trainer = TAPOTrainer("stabilityai/stable-diffusion-3.5-medium", pickscore, TAPOConfig("sd35-tapo"))
    ```

    Args:
        name (`str`): one of [`list_rewards`], such as `"pickscore"`, `"hpsv2.1"` or `"ocr"`.
        kwargs: arguments of [`~PretrainedReward.from_pretrained`], such as `torch_dtype`, `batch_size` or `scale`.

    Raises:
        ValueError: if there is no such scorer.
        OSError: if its weights are neither here nor can be downloaded.
    """
    return reward_class(name).from_pretrained(**kwargs)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), REWARDS, n=2, cutoff=0.5)
    hint = f"Did you mean {' or '.join(f'`{other}`' for other in near)}? " if near else ""
    return f"{hint}The rewards are {', '.join(list_rewards())}."
