# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass, field
from typing import Literal

from ..data.dimensions import check_dimension_weights
from ..data.preferences import DEFAULT_FPS
from ..rewards.slrm import DEFAULT_RESOLUTION


@dataclass
class PreferenceDataConfig:
    r"""
    What [`SLRMConfig`] and [`DiffusionDPOConfig`] say of their preference pairs.

    Parameters:
        resolution (`int`, *optional*, defaults to `512`):
            Height and width in pixels to which images and videos are cropped, around their centre, and resized. `height`
            and `width` take precedence.
        height (`int`, *optional*):
            Height in pixels.
        width (`int`, *optional*):
            Width in pixels.
        num_frames (`int`, *optional*):
            Number of frames, for policies that make videos: one more than a multiple of 4 for Wan2.1. They are taken
            from the start of each video.
        fps (`int`, *optional*, defaults to `16`):
            Frames per second at which videos are sampled.
        dimension_weights (`dict[str, float]`, *optional*):
            Weights of the columns `label_<dimension>`, such as `{"visual_quality": 1.0, "motion_consistency": 1.0,
            "text_alignment": 1.0}`, whose weighted sum then says which side is preferred. Without it, that is `chosen`.
        skip_bad_files (`bool`, *optional*, defaults to `False`):
            Whether to leave out pairs with a file that is unreadable, damaged or too short, and log which. Otherwise
            that is an error, which lists them.
        short_videos (`str`, *optional*, defaults to `"refuse"`):
            What becomes of videos that end before `num_frames` at `fps` are there: `"refuse"` counts them among the files
            that cannot be used; `"uniform"` takes their frames at equal distances from the whole video.
        aspect_ratio_buckets (`bool`, *optional*, defaults to `False`):
            Whether images of the training keep about their aspect ratio, from 1/2 to 2: each pair is cropped to the size of
            a bucket, of at most `height` x `width` pixels, and a batch holds pairs of one bucket. Held-out pairs are
            cropped to `height` x `width`.
        max_sequence_length (`int`, *optional*):
            Number of tokens of the T5 (or UMT5) text encoder. Defaults to the model family's: 256 for SD3.5 and 512 for
            Wan2.1.
        cache_latents (`bool`, *optional*, defaults to `True`):
            Whether to encode all images or videos before training, into a file that later runs re-use. Otherwise they
            are read and encoded batch by batch.
        vae_tiling (`bool`, *optional*, defaults to `False`):
            Whether to encode large images or videos in overlapping tiles, which needs less memory and changes them a
            little.
        vae_slicing (`bool`, *optional*, defaults to `False`):
            Whether to encode the images or videos of a batch one at a time. Videos are, when their latents are cached.
        cache_dir (`str`, *optional*):
            Where latents and prompt embeddings are kept. Defaults to `tapo_trl` in the Hugging Face home.
    """

    resolution: int = field(
        default=DEFAULT_RESOLUTION,
        metadata={"help": "Height and width in pixels to which images and videos are cropped and resized."},
    )
    height: int | None = field(default=None, metadata={"help": "Height in pixels. Overrides `resolution`."})
    width: int | None = field(default=None, metadata={"help": "Width in pixels. Overrides `resolution`."})
    num_frames: int | None = field(
        default=None, metadata={"help": "Number of frames from the start of each video, for video policies."}
    )
    fps: int = field(default=DEFAULT_FPS, metadata={"help": "Frames per second at which videos are sampled."})
    dimension_weights: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": "Weights of the columns `label_<dimension>`, which then say which side is preferred."},
    )
    skip_bad_files: bool = field(
        default=False,
        metadata={"help": "Whether to leave out pairs with a file that is unreadable, damaged or too short."},
    )
    short_videos: Literal["refuse", "uniform"] = field(
        default="refuse",
        metadata={
            "help": "Whether videos that are too short for `num_frames` at `fps` count as files that cannot be used "
            "(`refuse`), or give frames at equal distances (`uniform`)."
        },
    )
    aspect_ratio_buckets: bool = field(
        default=False,
        metadata={
            "help": "Whether images of the training keep about their aspect ratio, in batches of one size of at most `height` "
            "x `width` pixels."
        },
    )
    max_sequence_length: int | None = field(
        default=None,
        metadata={
            "help": "Number of tokens of the T5 (or UMT5) text encoder. By default the model family's: 256 for SD3.5, 512 "
            "for Wan2.1."
        },
    )
    cache_latents: bool = field(
        default=True, metadata={"help": "Whether to encode all images or videos before training, into a file."}
    )
    vae_tiling: bool = field(
        default=False, metadata={"help": "Whether to encode large images or videos in overlapping tiles."}
    )
    vae_slicing: bool = field(
        default=False, metadata={"help": "Whether to encode the images or videos of a batch one at a time."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where latents and prompt embeddings are kept."})

    def check_preference_data(self) -> None:
        """
        Raises:
            ValueError: if a value cannot be used; the message starts with the name of its field.
        """
        for name in ("max_sequence_length", "resolution", "height", "width", "num_frames", "fps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.aspect_ratio_buckets and self.num_frames is not None:
            raise ValueError(
                "`aspect_ratio_buckets=True` is for images, and `num_frames` for videos: set one of them."
            )
        if self.aspect_ratio_buckets and self.train_sampling_strategy != "random":
            raise ValueError(
                "`aspect_ratio_buckets=True` decides about the order of the pairs: leave `train_sampling_strategy` at 'random', "
                f"not {self.train_sampling_strategy!r}."
            )
        if self.short_videos not in ("refuse", "uniform"):
            raise ValueError(f"`short_videos` must be 'refuse' or 'uniform', got {self.short_videos!r}.")
        if self.dimension_weights is not None:
            check_dimension_weights(self.dimension_weights)
