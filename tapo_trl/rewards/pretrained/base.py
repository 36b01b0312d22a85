# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""Interface of pretrained scorers of images and videos."""

import inspect
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from huggingface_hub.errors import HFValidationError
from torch import nn

from ...policies.loading import AUTO, parse_dtype
from .checkpoints import read_state_dict, weights_file


if TYPE_CHECKING:
    from ...policies import FlowPolicy

HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
SCALES = "`scale` multiplies the score and `standardize=(mean, std)` subtracts and divides"


class PretrainedReward(nn.Module, ABC):
    """
    A frozen scorer with published weights, which can be used as a [`RewardFunction`]. Load one with [`get_reward`] or
    [`~PretrainedReward.from_pretrained`].

    Subclasses define the attributes below and the methods [`~PretrainedReward.load`] and
    [`~PretrainedReward.raw_scores`].

    Args:
        batch_size (`int`, *optional*): images (or videos) per forward when it is called. Defaults to the class's.
        scale (`float`, *optional*): factor on the score, for weighted sums.
        standardize (`tuple[float, float]`, *optional*):
            mean and standard deviation of the scores on your data; returned scores are `(score - mean) / std`.
        frames (`int` or `str`, *optional*, defaults to `"all"`):
            frames of a video that an image scorer reads, whose scores are averaged: `"all"`, `"first"`, or a number of
            frames, evenly spaced from the first to the last.
        offload (`bool`, *optional*, defaults to `False`): whether to move the weights back to the CPU after each call.

    Attributes:
        name (`str`): short name, as in [`get_reward`] and in logs.
        weights (`str`, *optional*): Hub id of the weights; `None` if a package brings them.
        weights_file (`str`, *optional*): file of that repository, if it is not loaded as a whole.
        needs (`tuple[str, ...]`): what else is read from the Hub, as arguments of `hf download`.
        license (`str`): licence of the weights.
        score_range (`tuple[float, float]`): usual range of the published number.
        reads (`str`): `"image"` or `"video"`.
        columns (`tuple[str, ...]`): columns of the dataset that it reads beside the prompt.
        differentiable (`bool`): whether gradients reach the pixels through [`~PretrainedReward.score`].
        num_parameters (`int`): number of parameters.
        default_dtype (`torch.dtype`): precision of the weights unless `torch_dtype` is given.
        default_batch_size (`int`): images per forward.
        citation (`str`): paper, as author, year and arXiv number.
    """

    name: ClassVar[str]
    weights: ClassVar[str | None] = None
    weights_file: ClassVar[str | None] = None
    needs: ClassVar[tuple[str, ...]] = ()
    license: ClassVar[str]
    score_range: ClassVar[tuple[float, float]]
    reads: ClassVar[Literal["image", "video"]] = "image"
    columns: ClassVar[tuple[str, ...]] = ()
    differentiable: ClassVar[bool] = True
    num_parameters: ClassVar[int]
    default_dtype: ClassVar[torch.dtype] = torch.float32
    default_batch_size: ClassVar[int] = 16
    citation: ClassVar[str]

    def __init__(
        self,
        batch_size: int | None = None,
        scale: float | None = None,
        standardize: tuple[float, float] | None = None,
        frames: int | Literal["all", "first"] = "all",
        offload: bool = False,
    ):
        super().__init__()
        self._check_options(batch_size, scale, standardize, frames)
        self.batch_size = self.default_batch_size if batch_size is None else batch_size
        mean, std = (0.0, 1.0) if standardize is None else standardize
        self.mean, self.factor = float(mean), 1 / std if scale is None else float(scale)
        self.frames = frames
        self.offload = offload

    @classmethod
    def _check_options(cls, batch_size, scale, standardize, frames) -> None:
        if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1):
            raise ValueError(f"`batch_size` of the reward `{cls.name}` must be at least 1, but it is {batch_size!r}.")
        if frames not in ("all", "first") and not (isinstance(frames, int) and frames >= 1):
            raise ValueError(
                f'`frames` of the reward `{cls.name}` must be "all", "first" or a number of frames, got {frames!r}.'
            )
        if scale is not None and standardize is not None:
            raise ValueError(f"The reward `{cls.name}` takes one of `scale` and `standardize`: {SCALES}.")
        if scale is not None and not isinstance(scale, (int, float)):
            raise ValueError(f"`scale` of the reward `{cls.name}` must be a number, got {scale!r}.")
        is_pair = isinstance(standardize, (tuple, list)) and len(standardize) == 2
        if standardize is not None and not (
            is_pair and all(isinstance(value, (int, float)) for value in standardize) and standardize[1] > 0
        ):
            raise ValueError(
                f"`standardize` of the reward `{cls.name}` must be a mean and a positive standard deviation, got "
                f"{standardize!r}."
            )
        if frames != "all" and cls.reads == "video":
            raise ValueError(f"`frames` is for rewards of images, but the reward `{cls.name}` reads whole videos.")

    @classmethod
    def _check_arguments(cls, names: Sequence[str]) -> None:
        """Before weights are read, rather than after it."""
        makers = [cls.load, *(base.__init__ for base in cls.__mro__ if issubclass(base, PretrainedReward))]
        known = {name for maker in makers for name in inspect.signature(maker).parameters}
        for name in names:
            if name not in known:
                raise ValueError(
                    f"The reward `{cls.name}` has no argument `{name}`: see `help(tapo_trl.rewards.pretrained.reward_class("
                    f"{cls.name!r}))` and `PretrainedReward.from_pretrained`."
                )

    # For subclasses

    @classmethod
    def load(cls, weights: str | None, torch_dtype: torch.dtype, revision: str | None, **kwargs) -> "PretrainedReward":
        """
        Make the scorer from a Hub id or a folder. Here one without weights.

        Args:
            weights (`str`, *optional*): Hub id, folder or file.
            torch_dtype (`torch.dtype`): precision of the weights.
            revision (`str`, *optional*): revision on the Hub.
            kwargs: arguments of the class.

        Raises:
            ValueError: if there are no weights to load.
        """
        if weights is not None or revision is not None:
            raise ValueError(f"The reward `{cls.name}` has no weights on the Hub: leave `weights` and `revision` out.")
        return cls(**kwargs)

    @classmethod
    def read_weights(cls, weights: str, revision: str | None = None) -> dict[str, torch.Tensor]:
        """
        Tensors of one file: `weights` itself, or `weights_file` in that folder or repository. Nothing is unpickled but
        tensors.
        """
        return read_state_dict(
            weights if os.path.isfile(weights) else weights_file(weights, cls.weights_file, revision)
        )

    @classmethod
    def check_prompts(cls, prompts: Sequence[str], **columns: Sequence[Any]) -> None:
        """
        Check that prompts can be scored, before anything is sampled.

        Args:
            prompts (`Sequence[str]`): prompts.
            columns: further columns of the dataset, one value per prompt.

        Raises:
            ValueError: if one cannot.
        """
        missing = [name for name in cls.columns if name not in columns]
        if missing:
            raise ValueError(
                f"The reward `{cls.name}` reads the column `{missing[0]}` of the dataset beside the prompt, but there is none."
            )

    @classmethod
    def check_reads(cls, policy: "FlowPolicy") -> None:
        """
        Raises:
            ValueError: if it reads videos, but the policy makes images.
        """
        if cls.reads == "video" and policy.modality == "image":
            raise ValueError(
                f"The reward `{cls.name}` reads videos, but a `{type(policy).__name__}` makes images: choose a reward of images."
            )

    @abstractmethod
    def raw_scores(self, images: torch.Tensor, prompts: list[str], **columns: list[Any]) -> torch.Tensor:
        """
        The published number.

        Args:
            images (`torch.Tensor` of shape `(N, 3, H, W)`, or `(N, 3, F, H, W)` if it reads videos): float32 in [0, 1].
            prompts (`list[str]`): one per image.
            columns: those that the class reads, one value per image.

        Returns:
            `torch.Tensor` of shape `(N,)`. The score of an image must not depend on the others.
        """

    # For users

    @classmethod
    def from_pretrained(
        cls,
        weights: str | os.PathLike | None = None,
        *,
        torch_dtype: torch.dtype | str | None = None,
        batch_size: int | None = None,
        revision: str | None = None,
        scale: float | None = None,
        standardize: tuple[float, float] | None = None,
        frames: int | Literal["all", "first"] = "all",
        offload: bool = False,
        **kwargs,
    ) -> "PretrainedReward":
        """
        Load the scorer on the CPU, frozen and in evaluation mode. It is moved to the device of the images at the first
        call.

        Args:
            weights (`str` or `os.PathLike`, *optional*): Hub id, folder or file. Defaults to the published weights.
            torch_dtype (`torch.dtype` or `str`, *optional*): precision of the weights. Defaults to the class's.
            revision (`str`, *optional*): revision on the Hub.
            kwargs: further arguments of the class. The others are described there.

        Raises:
            ValueError: if an argument is unusable.
            OSError: if the weights are not in the cache and cannot be downloaded. The message contains the download
            command.
        """
        dtype = parse_dtype(torch_dtype) or cls.default_dtype
        if dtype == AUTO:
            raise ValueError(f"`torch_dtype='auto'` is for pipelines: name the precision of the reward `{cls.name}`.")
        options = {"batch_size": batch_size, "scale": scale, "standardize": standardize, "frames": frames}
        cls._check_options(**options)
        cls._check_arguments(list(kwargs))
        weights = cls.weights if weights is None else os.path.expanduser(weights)
        try:
            scorer = cls.load(weights, dtype, revision, **options, offload=offload, **kwargs)
        except (OSError, HFValidationError) as error:
            raise OSError(cls._missing(weights, revision, error)) from error
        return scorer.requires_grad_(False).eval()

    @classmethod
    def _missing(cls, weights: str | None, revision: str | None, error: OSError) -> str:
        if weights is None or os.path.exists(weights):
            return f"The reward `{cls.name}` could not be loaded from `{weights}`: {error}"
        if not HUB_ID.fullmatch(weights):
            return f"The reward `{cls.name}`: there is no file or folder `{weights}`, and it is no Hub id."
        options = f" {cls.weights_file}" if cls.weights_file is not None and weights == cls.weights else ""
        options += f" --revision {revision}" if revision is not None else ""
        commands = [f"hf download {weights}{options}", *(f"hf download {name}" for name in cls.needs)]
        return (
            f"The reward `{cls.name}` needs `{weights}`, which is not in the cache and could not be downloaded. Download it where "
            f"there is a network, with `{' && '.join(commands)}`, or pass a folder as `weights`. The error was: {error}"
        )

    @classmethod
    def memory(cls, torch_dtype: torch.dtype | str | None = None) -> int:
        """Bytes of the weights on the accelerator."""
        return cls.num_parameters * (parse_dtype(torch_dtype) or cls.default_dtype).itemsize

    def score(self, images: torch.Tensor, prompts: list[str], **columns: Any) -> torch.Tensor:
        """
        Score images or videos in one forward pass, with gradients with respect to the pixels if the class is `differentiable`.

        Args:
            images (`torch.Tensor` of shape `(N, 3, H, W)` or `(N, 3, F, H, W)`):
                float in [0, 1]. A scorer of images rates the `frames` of videos, and averages.
            prompts (`list[str]`): one per image.
            columns: further columns of the dataset, of which `columns` of the class are read.

        Returns:
            `torch.Tensor` of shape `(N,)`, float32: scores on the published scale, changed by `scale` or
            `standardize`.

        Raises:
            ValueError: if the input is not as described, or if there is another number of scores than of images.
        """
        columns = self._check_input(images, prompts, columns)
        images, num_frames = self._read_frames(images)
        return self._rate(images, prompts, columns, num_frames).view(-1, num_frames).mean(1)

    def _rate(
        self, images: torch.Tensor, prompts: list[str], columns: dict[str, list[Any]], num_frames: int, start: int = 0
    ) -> torch.Tensor:
        """Scores of some images or frames, of which the one at `start` is the first; their prompts are found by it."""
        rows = [index // num_frames for index in range(start, start + len(images))]
        prompts = [prompts[row] for row in rows]
        columns = {name: [values[row] for row in rows] for name, values in columns.items()}
        scores = self.raw_scores(images.float(), prompts, **columns).float()
        if scores.shape != (len(images),):
            raise ValueError(
                f"The reward `{self.name}` must give one score for each of {len(images)} {self.reads}s, but gave shape "
                f"{tuple(scores.shape)}."
            )
        return (scores - self.mean) * self.factor

    @torch.no_grad()
    def forward(self, images: torch.Tensor, prompts: list[str], **columns: Any) -> torch.Tensor:
        """
        Rate images or videos without gradients, in chunks of `batch_size`, on the device of the images.

        Args:
            images (`torch.Tensor` of shape `(N, 3, H, W)` or `(N, 3, F, H, W)`): float in [0, 1].
            prompts (`list[str]`): one per image.
            columns: further columns of the dataset, of which `columns` of the class are read.

        Returns:
            `torch.Tensor` of shape `(N,)`, float32. NaN where pixels are not finite, as after a diverged step.

        Raises:
            ValueError: if the input is not as described, or if a score is not finite.
        """
        columns = self._check_input(images, prompts, columns)
        readable = torch.stack([image.isfinite().all() for image in images])
        images = images.float().nan_to_num(0.0, 0.0, 0.0)
        images, num_frames = self._read_frames(images)
        self._move(images.device)
        with torch.autocast(images.device.type, enabled=False):
            chunks = range(0, len(images), self.batch_size)
            scores = [
                self._rate(images[start : start + self.batch_size], prompts, columns, num_frames, start)
                for start in chunks
            ]
        if self.offload:
            self._move(torch.device("cpu"))
        scores = torch.cat(scores).to(images.device).view(-1, num_frames).mean(1)
        if not scores.isfinite().all():
            bad = (~scores.isfinite()).nonzero().flatten().tolist()
            raise ValueError(
                f"The reward `{self.name}` gave scores that are not finite for the {self.reads}s {bad[:5]} of {len(scores)}, whose "
                "pixels are finite. Load it in a wider precision, such as `torch_dtype='float32'`, or check its weights."
            )
        return scores.where(readable, torch.nan)

    def _check_input(self, images: torch.Tensor, prompts: list[str], columns: dict[str, Any]) -> dict[str, list[Any]]:
        """Returns the columns that are read."""
        if not isinstance(images, torch.Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, torch.Tensor) else f"`{type(images).__name__}`"
            raise ValueError(f"The reward `{self.name}` reads float tensors with values in [0, 1], but got {kind}.")
        if images.ndim not in (4, 5) or images.shape[1] != 3 or len(images) == 0:
            raise ValueError(
                f"The reward `{self.name}` reads images of shape (N, 3, H, W) or videos of shape (N, 3, F, H, W), but got "
                f"{tuple(images.shape)}."
            )
        if self.reads == "video" and images.ndim == 4:
            raise ValueError(
                f"The reward `{self.name}` reads videos of shape (N, 3, F, H, W), but got images of shape "
                f"{tuple(images.shape)}: choose a reward of images, such as `pickscore`."
            )
        if isinstance(prompts, str) or len(prompts) != len(images):
            number = "a `str`" if isinstance(prompts, str) else len(prompts)
            raise ValueError(f"The reward `{self.name}` needs a list of {len(images)} prompts, but got {number}.")
        read = {name: columns[name] for name in self.columns if name in columns}
        self.check_prompts(prompts, **read)
        return read

    def _read_frames(self, videos: torch.Tensor) -> tuple[torch.Tensor, int]:
        """What is rated one by one: frames of videos, one video after the other, and their number in each."""
        if videos.ndim == 4 or self.reads == "video":
            return videos, 1
        total = videos.shape[2]
        number = {"all": total, "first": 1}.get(self.frames, self.frames)
        index = torch.linspace(0, total - 1, min(number, total)).round().long()
        frames = videos[:, :, index.to(videos.device)].transpose(1, 2)
        return frames.flatten(0, 1), len(index)

    def _move(self, device: torch.device) -> None:
        if any(tensor.device != device for tensor in (*self.parameters(), *self.buffers())):
            self.to(device)
