# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..field_types import check_folder_name, convert_fields
from .script_arguments import PreferenceDatasetArguments


@dataclass
class GenerationArguments:
    """
    How a command draws samples.

    Parameters:
        prompts (`list[str]`, *optional*):
            Prompts, or the path of one `.txt` file with a prompt per line.
        lora (`str`, *optional*):
            Folder or Hub id with `pytorch_lora_weights.safetensors`, such as the output of `tapo-trl tapo`.
        num_inference_steps (`int`, *optional*, defaults to `28`):
            Sampling steps.
        guidance_scale (`float`, *optional*, defaults to `4.5`):
            Guidance scale; 1 turns guidance off.
        negative_prompt (`str`, *optional*, defaults to `""`):
            Negative prompt.
        resolution (`int`, *optional*):
            Height and width in pixels, unless those are given. The default is the size of the pipeline: that of SD3.5's
            training, and 480 x 832 for Wan2.1.
        height (`int`, *optional*):
            Height in pixels.
        width (`int`, *optional*):
            Width in pixels.
        num_frames (`int`, *optional*):
            Number of frames of a video. The default is 81 for Wan2.1.
        fps (`int`, *optional*, defaults to `16`):
            Frames per second of a video.
        max_sequence_length (`int`, *optional*):
            Number of T5 (or UMT5) tokens. The default is the model family's.
        vae_tiling (`bool`, *optional*, defaults to `False`):
            Whether to decode large samples in overlapping tiles.
        vae_slicing (`bool`, *optional*, defaults to `False`):
            Whether to decode one sample at a time.
        batch_size (`int`, *optional*, defaults to `4`):
            Prompts per forward pass. The samples do not depend on it, up to rounding.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the first sample; sample `i` uses `seed + i`.
    """

    prompts: list[str] | None = field(
        default=None, metadata={"help": "Prompts, or the path of one .txt file with a prompt per line."}
    )
    lora: str | None = field(
        default=None, metadata={"help": "Folder or Hub id with `pytorch_lora_weights.safetensors`."}
    )
    num_inference_steps: int = field(default=28, metadata={"help": "Sampling steps."})
    guidance_scale: float = field(default=4.5, metadata={"help": "Guidance scale; 1 turns guidance off."})
    negative_prompt: str = field(default="", metadata={"help": "Negative prompt."})
    resolution: int | None = field(
        default=None, metadata={"help": "Height and width in pixels; by default the pipeline's."}
    )
    height: int | None = field(default=None, metadata={"help": "Height in pixels. Overrides `resolution`."})
    width: int | None = field(default=None, metadata={"help": "Width in pixels. Overrides `resolution`."})
    num_frames: int | None = field(default=None, metadata={"help": "Number of frames of a video; 81 by default."})
    fps: int = field(default=16, metadata={"help": "Frames per second of a video."})
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "Number of T5 (or UMT5) tokens; by default the model family's."}
    )
    vae_tiling: bool = field(default=False, metadata={"help": "Whether to decode large samples in overlapping tiles."})
    vae_slicing: bool = field(default=False, metadata={"help": "Whether to decode one sample at a time."})
    batch_size: int = field(default=4, metadata={"help": "Prompts (or pairs) per forward pass."})
    seed: int = field(default=0, metadata={"help": "Seed of the first sample; sample `i` uses `seed + i`."})

    def __post_init__(self):
        for name in ("num_inference_steps", "resolution", "height", "width", "num_frames", "fps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, but it is {value}.")


@dataclass
class SampleArguments(GenerationArguments):
    """
    Arguments of `tapo-trl sample` beside [`PipelineConfig`]: those of [`GenerationArguments`], and

    Parameters:
        output_dir (`str`, *optional*, defaults to `"samples"`):
            Folder of the files: `000.png`, `001.png`, ... and `grid.png`; or `000.mp4`, ..., all videos side by side in
            `grid.mp4` and their frames in `grid.png`.
        columns (`int`, *optional*):
            Columns of the grid; about the square root of the number of prompts by default.
    """

    output_dir: str = field(default="samples", metadata={"help": "Folder of the PNG or MP4 files."})
    columns: int | None = field(default=None, metadata={"help": "Columns of the grid."})

    def __post_init__(self):
        super().__post_init__()
        if self.prompts is None:
            raise ValueError("`prompts` is missing: give one or more prompts, or the path of a .txt file.")


@dataclass
class ScoredPairsArguments(PreferenceDatasetArguments):
    """
    A latent reward model, and the held-out pairs of [`PreferenceDatasetArguments`] that it scores.

    Parameters:
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split of held-out pairs.
        slrm (`str`, *optional*):
            Hub id or folder of the latent reward model, of any kind, that scores the pairs of `dataset_test_split`.
        sigmas (`list[float]`, *optional*, defaults to `[0.1, 0.3, 0.5, 0.7, 0.9]`):
            Noise levels in [0, 1).
        rules (`list[str]`, *optional*):
            Velocity targets of an SLRM's score: `ground_truth` is the paper's rule, which sees the clean sample; `reference`
            and `none` can be used while sampling. Defaults to the first two, and to `none` for other reward models.
        max_pairs (`int`, *optional*):
            Measure on the first so many pairs.
        short_videos (`str`, *optional*, defaults to `"refuse"`):
            Whether videos that are too short for `num_frames` at `fps` count as files that cannot be used (`"refuse"`), or
            give frames at equal distances (`"uniform"`).
        dimension_weights (`dict[str, float]`, *optional*):
            Weights of the columns `label_<dimension>`, whose weighted sum then says which side is preferred, as in
            [`SLRMConfig`].
        skip_bad_files (`bool`, *optional*, defaults to `False`):
            Whether to leave out pairs with a file that is unreadable, damaged or too short.
        cache_dir (`str`, *optional*):
            Where latents and prompt embeddings are kept. Defaults to `tapo_trl` in the Hugging Face home.
    """

    dataset_test_split: str = field(
        default="test",
        metadata={"help": "Split of held-out pairs; slices such as `train[90%%:]` work for files and Hub data sets."},
    )
    slrm: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the latent reward model that is measured."}
    )
    sigmas: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9], metadata={"help": "Noise levels in [0, 1)."}
    )
    rules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Velocity targets of an SLRM's score: `ground_truth` is the paper's rule, which sees the clean sample; "
            "`reference` and `none` can be used while sampling. By default the first two, and `none` for other reward "
            "models."
        },
    )
    max_pairs: int | None = field(default=None, metadata={"help": "Measure on the first so many pairs."})
    short_videos: Literal["refuse", "uniform"] = field(
        default="refuse",
        metadata={
            "help": "Whether videos that are too short count as files that cannot be used (`refuse`), or give frames at "
            "equal distances (`uniform`)."
        },
    )
    dimension_weights: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": "Weights of the columns `label_<dimension>`, which then say which side is preferred."},
    )
    skip_bad_files: bool = field(
        default=False,
        metadata={"help": "Whether to leave out pairs with a file that is unreadable, damaged or too short."},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where latents and prompt embeddings are kept."})

    def __post_init__(self):
        super().__post_init__()
        convert_fields(self)
        if isinstance(self.dimension_weights, str):
            self.dimension_weights = json.loads(self.dimension_weights)
        if self.dimension_weights is not None:
            from ..data.dimensions import check_dimension_weights

            check_dimension_weights(self.dimension_weights)
        if any(not 0.0 <= sigma < 1.0 for sigma in self.sigmas):
            raise ValueError(f"`sigmas` must lie in [0, 1), but they are {self.sigmas}.")
        if self.slrm is not None and self.dataset_name is None:
            raise ValueError("`slrm` needs `dataset_name`: the held-out preference pairs to measure it on.")


@dataclass
class EvaluateArguments(ScoredPairsArguments, GenerationArguments):
    """
    Arguments of `tapo-trl evaluate` beside [`PipelineConfig`]: the accuracy of a reward model on held-out pairs
    (`slrm` and `dataset_name`), the mean reward of a model's samples (`reward_model` and `prompts`), or both. The pairs are
    described by [`ScoredPairsArguments`] and the samples by [`GenerationArguments`], whose size, `fps`, `batch_size` and
    `seed` hold for the pairs, too; by default their size is that of the SLRM's training.

    Parameters:
        reward_model (`list[str]`, *optional*):
            `package.module:function` callables that score the samples.
        output_file (`str`, *optional*):
            JSON file for the result, which is printed in any case.
    """

    reward_model: list[str] | None = field(
        default=None, metadata={"help": "`package.module:function` callables that score the samples."}
    )
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the result."})

    def __post_init__(self):
        ScoredPairsArguments.__post_init__(self)
        GenerationArguments.__post_init__(self)
        if self.slrm is None and self.reward_model is None:
            raise ValueError("Give `slrm` (accuracy on pairs), `reward_model` (reward of samples), or both.")
        if self.output_file is not None:  # before the work, rather than after it
            check_folder_name(Path(self.output_file).parent, "output_file")
            if not self.output_file.strip() or Path(self.output_file).is_dir():
                raise ValueError(f"`output_file={self.output_file}` must name a file.")
        if self.reward_model is not None and self.prompts is None:
            raise ValueError("`reward_model` needs `prompts`: what the model should draw.")


@dataclass
class DiagnoseArguments(ScoredPairsArguments):
    """
    Arguments of `tapo-trl diagnose` beside [`PipelineConfig`]: a reward model and held-out pairs, which
    [`ScoredPairsArguments`] describe, the folders of trainings, or both.

    Parameters:
        sigmas (`list[float]`, *optional*, defaults to `[0.0, 0.1, ..., 0.9]`):
            Noise levels in [0, 1), at least two.
        tie_threshold (`float`, *optional*):
            Largest difference of the scores of a predicted tie. By default the one with the highest accuracy with ties on
            these pairs.
        batch_size (`int`, *optional*, defaults to `8`):
            Pairs per forward pass.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the noise.
        fps (`int`, *optional*, defaults to `16`):
            Frames per second of videos.
        runs (`list[str]`, *optional*):
            Output folders of `tapo-trl tapo`, whose logs are drawn: the training reward against the judge, and the shares
            of the gradient.
        judge (`str`, *optional*, defaults to `"guard/held_out_reward"`):
            What the training reward is compared to, by its name in the logs.
        output_dir (`str`, *optional*, defaults to `"diagnosis"`):
            Folder of `diagnosis.json` and `diagnosis.png`.
    """

    sigmas: list[float] = field(
        default_factory=lambda: [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
        metadata={"help": "Noise levels in [0, 1), at least two."},
    )
    tie_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Largest difference of the scores of a predicted tie. By default the one with the highest accuracy with "
            "ties on these pairs."
        },
    )
    batch_size: int = field(default=8, metadata={"help": "Pairs per forward pass."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise."})
    fps: int = field(default=16, metadata={"help": "Frames per second of videos."})
    runs: list[str] | None = field(
        default=None, metadata={"help": "Output folders of `tapo-trl tapo`, whose logs are drawn."}
    )
    judge: str = field(
        default="guard/held_out_reward",
        metadata={"help": "What the training reward of `runs` is compared to, by its name in the logs."},
    )
    output_dir: str = field(default="diagnosis", metadata={"help": "Folder of `diagnosis.json` and `diagnosis.png`."})

    def __post_init__(self):
        super().__post_init__()
        if self.slrm is None and self.runs is None:
            raise ValueError("Give `slrm` and `dataset_name` (a reward model on pairs), `runs` (trainings), or both.")
        if len(set(self.sigmas)) < 2:
            raise ValueError(f"`sigmas` must be at least two noise levels to compare, but they are {self.sigmas}.")
        for name in ("batch_size", "fps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but it is {getattr(self, name)}.")
