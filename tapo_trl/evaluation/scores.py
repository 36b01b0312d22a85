# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Rewards of finished samples, and what a table says of them."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.images import ImageReader
from ..data.videos import read_video
from ..policies import FlowPolicy, load_policy
from ..rewards import PretrainedReward, SPMModel, StepRewardModel, get_reward, load_reward_model
from ..rewards.loading import check_init_kwargs, init_kwargs_of
from ..rewards.pretrained import is_reward_name
from ..rewards.scoring import call_reward_function, check_reward_function


IMAGES, VIDEOS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}, {".mp4", ".webm", ".mov", ".mkv", ".avi"}
BATCH_SIZE = 16  # samples that a scorer gets at once


class LatentScorer:
    """
    A latent reward model as a reward of finished samples: pixels are encoded and scored at noise level 0, without a
    velocity target, as in [`FlowGRPOTrainer`]. An SPM scores the pixels directly.

    Args:
        model ([`StepRewardModel`]): the reward model.
        policy ([`FlowPolicy`]): its base model, whose VAE and text encoders are used.
    """

    def __init__(self, model: StepRewardModel, policy: FlowPolicy):
        model.check_compatible(policy)
        self.model, self.policy = model.requires_grad_(False).eval(), policy

    def to(self, device: torch.device | str) -> None:
        """Move the reward model; the policy stays where it is."""
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        self.model.to(images.device)
        is_video = images.ndim == 5
        if is_video != (self.policy.modality == "video"):
            raise ValueError(
                f"A reward model on a `{type(self.policy).__name__}` rates {self.policy.modality}s, but got samples of shape "
                f"{tuple(images.shape[1:])}."
            )
        if isinstance(self.model, SPMModel):
            return self.model.score(images, 0.0, prompts)
        self.policy.latent_shape(
            *images.shape[-2:], images.shape[2] if is_video else None
        )  # a size that it can encode
        embeds = self.policy.encode_prompts(prompts, self.model.config.max_sequence_length)
        latents = self.policy.encode(images)
        return self.model.score(latents, 0.0, **embeds.tensors)


def load_scorers(
    rewards: Mapping[str, str | Callable],
    init_kwargs: dict[str, Any] | None = None,
    load_base: Callable[[str], FlowPolicy] = load_policy,
) -> dict[str, Callable]:
    """
    Load rewards for samples. Weights stay on the CPU until [`score_samples`].

    Args:
        rewards (`dict[str, str | Callable]`): by what they are called: names of pretrained rewards, folders or Hub ids of reward
            models, and functions of images.
        init_kwargs (`dict[str, Any]`, *optional*): see `reward_model_init_kwargs` of [`RolloutConfig`].
        load_base (`Callable`, *optional*): loads the pipeline that a latent reward model was trained from, by its name.
    """
    check_init_kwargs([reward for reward in rewards.values() if isinstance(reward, str)], init_kwargs)
    scorers = {}
    for name, reward in rewards.items():
        if isinstance(reward, str) and is_reward_name(reward):
            reward = get_reward(reward, **init_kwargs_of(reward, init_kwargs))
        elif isinstance(reward, str):
            model = load_reward_model(reward, **init_kwargs_of(reward, init_kwargs))
            reward = LatentScorer(model, load_base(model.config.base_model_name_or_path))
        check_reward_function(reward)
        scorers[name] = reward
    return scorers


def check_scorers(
    scorers: Mapping[str, Callable],
    prompts: Sequence[str],
    policy: FlowPolicy | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """
    Check that pretrained rewards can rate samples, before they are drawn.

    Args:
        scorers (`dict[str, Callable]`): from [`load_scorers`].
        prompts (`Sequence[str]`): prompts of the samples.
        policy ([`FlowPolicy`], *optional*): what draws the samples.
        columns (`dict[str, Sequence]`, *optional*): what is known beside the prompts, one value for each.

    Raises:
        ValueError: if one cannot.
    """
    for scorer in scorers.values():
        if isinstance(scorer, PretrainedReward):
            scorer.check_prompts(prompts, **(columns or {}))
            if policy is not None:
                scorer.check_reads(policy)


def score_samples(
    scorers: Mapping[str, Callable],
    samples: Sequence[torch.Tensor],
    prompts: list[str],
    device: torch.device | str = "cpu",
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> dict[str, torch.Tensor]:
    """
    Score samples with one reward after the other, so that only the weights of one reward are on the accelerator.

    Args:
        scorers (`dict[str, Callable]`): from [`load_scorers`]. A function of yours gets all samples of one size at once, on the
            CPU.
        samples (`Sequence[torch.Tensor]`): images of shape `(3, H, W)` or videos of shape `(3, F, H, W)`, float32 in [0, 1]. Sizes may
            differ.
        prompts (`list[str]`): one per sample.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where weights compute.
        columns (`dict[str, Sequence]`, *optional*): what is known beside the prompts, one value per sample. A scorer gets what it
            has arguments for.

    Returns:
        `dict[str, torch.Tensor]`: for each reward, scores of shape `(len(samples),)`, float32, on the CPU.

    Raises:
        ValueError: if a score is not finite.
    """
    scores = {}
    for name, scorer in scorers.items():
        has_weights = isinstance(scorer, (PretrainedReward, LatentScorer))
        read = columns_of(scorer, columns or {})
        scores[name] = torch.empty(len(samples))
        for rows, pixels in _batches(samples, BATCH_SIZE if has_weights else len(samples)):
            pixels = pixels.to(device if has_weights else "cpu")
            of_rows = {column: [values[row] for row in rows] for column, values in read.items()}
            scores[name][rows] = call_reward_function(
                scorer, pixels, [prompts[row] for row in rows], of_rows, noun="sample"
            ).cpu()
        if has_weights:
            scorer.to("cpu")
        bad = (~scores[name].isfinite()).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"The reward `{name}` gave scores that are not finite, the first for the prompt {prompts[bad[0]]!r}."
            )
    return scores


def columns_of(scorer: Callable, columns: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """Those of some columns that a reward has arguments for."""
    parameters = inspect.signature(scorer.forward if isinstance(scorer, nn.Module) else scorer).parameters
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: values for name, values in columns.items() if takes_all or name in parameters}


def _batches(samples: Sequence[torch.Tensor], size: int) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Rows and samples, at most `size` of one shape at once."""
    waiting: dict[torch.Size, dict[int, torch.Tensor]] = {}
    for row in range(len(samples)):
        sample = samples[row]
        group = waiting.setdefault(sample.shape, {})
        group[row] = sample
        if len(group) == size:
            yield list(group), torch.stack(list(group.values()))
            group.clear()
    for group in waiting.values():
        if group:
            yield list(group), torch.stack(list(group.values()))


def summarize(scores: torch.Tensor) -> dict[str, float | int | None]:
    """
    Mean, its standard error, and the number of scores.

    Args:
        scores (`torch.Tensor` of shape `(N,)`): scores of N samples.

    Returns:
        `dict`: `mean`, `standard_error` (`None` for one sample) and `n`.
    """
    scores = scores.double()
    error = (scores.std() / len(scores) ** 0.5).item() if len(scores) > 1 else None
    return {"mean": scores.mean().item(), "standard_error": error, "n": len(scores)}


def compare(base: torch.Tensor, aligned: torch.Tensor) -> dict[str, Any]:
    """
    Two models on the same prompts and seeds.

    Args:
        base (`torch.Tensor` of shape `(N,)`): scores of the one.
        aligned (`torch.Tensor` of shape `(N,)`): scores of the other, in the same order.

    Returns:
        `dict`: [`summarize`] of `base`, `aligned` and their `difference`, whose standard error is that of pairs; `win_rate`, the share
        of prompts for which `aligned` scores higher, ties as a half; `ratio` of the means.
    """
    wins = (aligned > base).double() + (aligned == base).double() / 2
    found = {"base": summarize(base), "aligned": summarize(aligned), "difference": summarize(aligned - base)}
    mean = found["base"]["mean"]
    ratio = found["aligned"]["mean"] / mean if mean > 0 else None
    return found | {"win_rate": wins.mean().item(), "ratio": ratio}


def find_samples(folder: str | Path) -> list[Path]:
    """
    The images or videos of a folder, in the order of their names, numbers by value. A `grid.*` as `tapo-trl sample` writes it is left
    out.

    Raises:
        ValueError: if there are none, or both.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    files = sorted((path for path in folder.iterdir() if path.stem != "grid"), key=lambda path: _by_number(path.name))
    images, videos = ([path for path in files if path.suffix.lower() in kind] for kind in (IMAGES, VIDEOS))
    if bool(images) == bool(videos):
        what = "both images and videos" if images else "neither images nor videos"
        raise ValueError(f"The folder {folder} has {what}, but its samples should be of one kind.")
    return images or videos


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    parts = [part for part in re.split(r"(\d+)", name) if part]
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


class SampleFiles(Sequence):
    """Images of shape `(3, H, W)` or videos of shape `(3, F, H, W)`, float32 in [0, 1], in their own sizes, read when they are needed."""

    def __init__(self, files: Sequence[Path]):
        self.files = files

    def check(self) -> None:
        """
        Read the headers of images.

        Raises:
            BadFileError: if one cannot be read.
        """
        for file in self.files:
            if file.suffix.lower() in IMAGES:
                ImageReader(1, 1).check(file, str(file))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> torch.Tensor:
        file = self.files[row]
        if file.suffix.lower() in VIDEOS:
            return read_video(file)
        return ImageReader(*ImageReader(1, 1).check(file, str(file))).load(file, str(file))
