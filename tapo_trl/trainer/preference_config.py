# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass
from typing import Literal

from ..data.dimensions import check_dimension_weights
from ..field_types import option
from .base_config import DiffusionConfig


@dataclass
class MediaDataConfig(DiffusionConfig):
    r"""
    Options of trainers that learn from a dataset of images or videos, [`SLRMConfig`], [`DiffusionDPOConfig`] and
    [`DiffusionSFTConfig`].

    Parameters:
        skip_bad_files (`bool`, *optional*, defaults to `False`):
            Whether to leave out rows with a file that is unreadable, damaged or too short, and log which. Otherwise
            that is an error, which lists them.
        short_videos (`str`, *optional*, defaults to `"refuse"`):
            What becomes of videos that end before `num_frames` at `fps` are there: `"refuse"` counts them among the files
            that cannot be used; `"uniform"` takes their frames at equal distances from the whole video.
        aspect_ratio_buckets (`bool`, *optional*, defaults to `False`):
            Whether images of the training keep about their aspect ratio, from 1/2 to 2: each row is cropped to the size of
            a bucket, of at most `height` x `width` pixels, and a batch holds rows of one bucket. Held-out rows are
            cropped to `height` x `width`.
        cache_latents (`bool`, *optional*, defaults to `True`):
            Whether to encode all images or videos before training, into a file that later runs re-use. Otherwise they
            are read and encoded batch by batch.
        eval_sigmas (`list[float]`, *optional*, defaults to `[0.1, 0.3, 0.5, 0.7, 0.9]`):
            Noise levels of the evaluation; its loss is the mean over them. For Diffusion-DPO and supervised fine-tuning the
            nearest levels of the training are taken.
    """

    skip_bad_files: bool = option(
        "Whether to leave out rows with a file that is unreadable, damaged or too short.", False
    )
    short_videos: Literal["refuse", "uniform"] = option(
        "What to do with videos that are too short for `num_frames` at `fps`: treat them as unusable files "
        "(`refuse`), or sample frames uniformly (`uniform`).",
        "refuse",
    )
    aspect_ratio_buckets: bool = option(
        "Whether to keep the approximate aspect ratio of training images, in batches of one size of at most `height` "
        "x `width` pixels.",
        False,
    )
    cache_latents: bool = option("Whether to encode all images or videos before training, into a file.", True)
    eval_sigmas: list[float] = option(
        "Noise levels of the evaluation; its loss is the mean over them.", [0.1, 0.3, 0.5, 0.7, 0.9]
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.eval_sigmas or not all(0 <= sigma <= 1 for sigma in self.eval_sigmas):
            raise ValueError(f"`eval_sigmas` must be noise levels in [0, 1], at least one, got {self.eval_sigmas}.")
        if self.aspect_ratio_buckets and self.num_frames is not None:
            raise ValueError(
                "`aspect_ratio_buckets=True` is for images, and `num_frames` for videos: set one of them."
            )
        if self.aspect_ratio_buckets and self.train_sampling_strategy != "random":
            raise ValueError(
                "`aspect_ratio_buckets=True` decides about the order of the rows: leave `train_sampling_strategy` at 'random', "
                f"not {self.train_sampling_strategy!r}."
            )


@dataclass
class PreferenceDataConfig(MediaDataConfig):
    r"""
    Options of trainers that learn from preference pairs, [`SLRMConfig`] and [`DiffusionDPOConfig`].

    Parameters:
        dimension_weights (`dict[str, float]`, *optional*):
            Weights of the columns `label_<dimension>`, such as `{"visual_quality": 1.0, "motion_consistency": 1.0,
            "text_alignment": 1.0}`, whose weighted sum then says which side is preferred. Without it, that is `chosen`.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Probability that a label is flipped. Ties (label 0.5) always count as one half.
    """

    dimension_weights: dict[str, float] | str | None = option(
        "Weights of the columns `label_<dimension>`, which then say which side is preferred."
    )
    label_smoothing: float = option("Assumed probability that a preference label is flipped.", 0.0)

    def __post_init__(self):
        super().__post_init__()
        self.check_label_smoothing()
        if self.dimension_weights is not None:
            check_dimension_weights(self.dimension_weights)
