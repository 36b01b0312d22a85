# Copyright 2026 The tapo_trl authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from peft import LoraConfig

from .known_pipelines import SIZES


if TYPE_CHECKING:
    from ..policies import FlowPolicy


@dataclass
class PipelineConfig:
    """
    Configuration of the diffusers pipeline that a command loads.

    Parameters:
        model_name_or_path (`str`, *optional*):
            Hub id or folder of a diffusers pipeline, such as `stabilityai/stable-diffusion-3.5-medium`.
        model_revision (`str`, *optional*):
            Branch, tag or commit of the pipeline's repository.
        torch_dtype (`str`, *optional*, defaults to `"float32"`):
            Precision of the frozen weights: `"float32"`, `"bfloat16"` or `"float16"`.
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of a diffusers pipeline, such as `stabilityai/stable-diffusion-3.5-medium`."
        },
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the pipeline's repository."}
    )
    torch_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={"help": "Precision of the frozen weights."},
    )

    @property
    def dtype(self) -> torch.dtype:
        """`torch_dtype` as PyTorch's own type."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.torch_dtype]

    def require_model(self) -> str:
        """`model_name_or_path`, or an error that asks for it."""
        if self.model_name_or_path is None:
            raise ValueError(
                "`model_name_or_path` is missing: give the Hub id or folder of a diffusers pipeline, for example "
                "`--model_name_or_path stabilityai/stable-diffusion-3.5-medium`."
            )
        return self.model_name_or_path


@dataclass
class DiffusionModelConfig(PipelineConfig):
    """
    Configuration of the model that a command trains. (TRL's [`~trl.ModelConfig`] is made for language models.)

    Parameters:
        > Parameters that control the model

        model_name_or_path (`str`, *optional*):
            Hub id or folder of a diffusers pipeline, such as `stabilityai/stable-diffusion-3.5-medium`.
        model_revision (`str`, *optional*):
            Branch, tag or commit of the pipeline's repository.
        torch_dtype (`str`, *optional*, defaults to `"float32"`):
            Precision of the frozen weights: `"float32"`, `"bfloat16"` or `"float16"`. LoRA matrices are float32 always.

        > Parameters that control LoRA

        use_peft (`bool`, *optional*, defaults to `False`):
            Train LoRA matrices instead of the whole transformer.
        lora_r (`int`, *optional*, defaults to `64`):
            Rank; 64 for SD3.5 and 128 for Wan2.1 in the paper (Table 5).
        lora_alpha (`int`, *optional*):
            Scale of the update, `lora_alpha / lora_r`. The default is `lora_r`, as in diffusers' training scripts.
        lora_dropout (`float`, *optional*, defaults to `0.0`):
            Dropout of LoRA's input. With 0, the loss of the first step is exactly ln 2 (M9 of the design).
        lora_target_modules (`list[str]`, *optional*):
            Names of the linear layers to adapt. The default is every attention projection of the model family.
        init_lora_weights (`str`, *optional*, defaults to `"gaussian"`):
            Initialisation of the LoRA matrices, `"gaussian"` or `"default"` (Kaiming). Both start at a zero update.
    """

    use_peft: bool = field(default=False, metadata={"help": "Train LoRA matrices instead of the whole transformer."})
    lora_r: int = field(default=64, metadata={"help": "Rank of the LoRA matrices; 64 for SD3.5, 128 for Wan2.1."})
    lora_alpha: int | None = field(
        default=None,
        metadata={"help": "Scale of the update, `lora_alpha / lora_r`. The default is `lora_r`."},
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of LoRA's input."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the linear layers to adapt. The default is every attention projection of the model family."
        },
    )
    init_lora_weights: Literal["gaussian", "default"] = field(
        default="gaussian",
        metadata={"help": "Initialisation of the LoRA matrices. Both start at a zero update."},
    )

    def __post_init__(self):
        if self.lora_r < 1:
            raise ValueError(f"`lora_r` must be at least 1, but it is {self.lora_r}.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"`lora_dropout` must be in [0, 1), but it is {self.lora_dropout}.")


def get_lora_config(
    model_args: DiffusionModelConfig, policy: "FlowPolicy", target_modules: list[str] | None = None
) -> LoraConfig | None:
    """
    The LoRA configuration that the arguments ask for.

    Args:
        model_args ([`DiffusionModelConfig`]): The arguments.
        policy ([`FlowPolicy`]): The policy; it knows the attention projections of its model family.
        target_modules (`list[str]`, *optional*): Those of another network, if it is not the policy's transformer.

    Returns:
        `LoraConfig` or `None`: The configuration for `peft_config=`, or `None` without `use_peft`.
    """
    if not model_args.use_peft:
        return None
    return LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_r if model_args.lora_alpha is None else model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules or target_modules or policy.lora_target_modules,
        init_lora_weights=True if model_args.init_lora_weights == "default" else model_args.init_lora_weights,
    )


@dataclass
class PreferenceDatasetArguments:
    """
    A data set of preference pairs.

    Parameters:
        dataset_name (`str`, *optional*):
            Hub id, folder (also one of `Dataset.save_to_disk`) or `.parquet`, `.json`, `.jsonl` or `.csv` file.
        dataset_config (`str`, *optional*):
            Configuration of a data set on the Hub.
        dataset_test_split (`str`, *optional*):
            Split of held-out pairs; slices such as `train[90%:]` work for files and Hub data sets.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of the prompts.
        chosen_column (`str`, *optional*, defaults to `"chosen"`):
            Column of the preferred images or videos, when the pairs are stored by preference.
        rejected_column (`str`, *optional*, defaults to `"rejected"`):
            Column of the other ones.
        pair_columns (`list[str]`, *optional*):
            The two columns of images or videos, when the pairs are stored by position with a label (as in Pick-a-Pic). Needs
            `label_column`; `chosen_column` and `rejected_column` are not used then.
        label_column (`str`, *optional*):
            Column that tells how much the first of `pair_columns` is preferred: 1 the first, 0 the second, 0.5 a
            tie. Values between count as the nearer of 0 and 1.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, folder, or .parquet, .json, .jsonl or .csv file of preference pairs."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    dataset_test_split: str | None = field(
        default=None,
        metadata={"help": "Split of held-out pairs; slices such as `train[90%%:]` work for files and Hub data sets."},
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompts."})
    chosen_column: str = field(default="chosen", metadata={"help": "Column of the preferred images or videos."})
    rejected_column: str = field(default="rejected", metadata={"help": "Column of the other ones."})
    pair_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "The two columns of images or videos, when the pairs are stored by position with a label (as in "
            "Pick-a-Pic). Needs `label_column`."
        },
    )
    label_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that tells how much the first of `pair_columns` is preferred: 1 the first, 0 the second, 0.5 "
            "a tie."
        },
    )

    def __post_init__(self):
        if self.pair_columns is not None and len(self.pair_columns) != 2:
            raise ValueError(f"`pair_columns` must name two columns, but it names {len(self.pair_columns)}.")
        if (self.pair_columns is None) != (self.label_column is None):
            missing, present = (
                ("label_column", "pair_columns") if self.pair_columns else ("pair_columns", "label_column")
            )
            raise ValueError(f"`{present}` is set but `{missing}` is not: pairs stored by position need both.")


@dataclass
class SLRMScriptArguments(PreferenceDatasetArguments):
    """
    Arguments of `tapo-trl slrm` beside [`SLRMConfig`] and [`DiffusionModelConfig`]: those of
    [`PreferenceDatasetArguments`], and

    Parameters:
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on; slices such as `train[:90%]` work for files and Hub data sets.
        dry_run (`bool`, *optional*, defaults to `False`):
            Print shapes, numbers of tokens, parameters and forwards and an estimate of the memory, and stop. Nothing is
            loaded; neither an accelerator nor the data is needed.
    """

    dataset_train_split: str = field(
        default="train",
        metadata={"help": "Split to train on; slices such as `train[:90%%]` work for files and Hub data sets."},
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Print shapes, tokens, parameters, forwards and an estimate of the memory, and stop."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.dataset_name is None:
            raise ValueError("`dataset_name` is missing: give the Hub id, folder or file of the preference pairs.")


@dataclass
class SampleCallbackArguments:
    """
    What a command that trains a policy shows of it meanwhile.

    Parameters:
        sample_every_steps (`int`, *optional*):
            Draw fixed prompts every so many optimizer steps ([`SampleGridCallback`]): a grid of images, or videos and a
            strip of their frames.
        sample_prompts (`list[str]`, *optional*):
            Prompts of the grid, or the path of one `.txt` file. The default is the first eight held-out prompts, or the
            first eight training prompts if none are held out.
        sample_seed (`int`, *optional*, defaults to `0`):
            Seed of the first cell of the grid.
        ema_decay (`float`, *optional*):
            Keep an average of the trained weights with this decay ([`EMACallback`]); the grid is drawn with it.
    """

    sample_every_steps: int | None = field(
        default=None, metadata={"help": "Draw fixed prompts (a grid, or videos) every so many optimizer steps."}
    )
    sample_prompts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Prompts of the grid, or the path of one .txt file. The default is the first eight held-out "
            "prompts, or the first eight training prompts if none are held out."
        },
    )
    sample_seed: int = field(default=0, metadata={"help": "Seed of the first cell of the grid."})
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Keep an average of the trained weights with this decay; the grid is drawn with it."},
    )


@dataclass
class DPOScriptArguments(SampleCallbackArguments, SLRMScriptArguments):
    """
    Arguments of `tapo-trl dpo` beside [`DiffusionDPOConfig`] and [`DiffusionModelConfig`]: those of
    [`SLRMScriptArguments`], which describe the pairs, and those of [`SampleCallbackArguments`].
    """


@dataclass
class TAPOScriptArguments(SampleCallbackArguments):
    """
    Arguments of `tapo-trl tapo`, `online_dpo` and `grpo` beside [`TAPOConfig`], [`OnlineDiffusionDPOConfig`] or
    [`FlowGRPOConfig`] (which have `dataset_name` and `dataset_split`) and [`DiffusionModelConfig`]: those of [`SampleCallbackArguments`], and

    Parameters:
        > Parameters that control the prompts

        dataset_config (`str`, *optional*):
            Configuration of a data set on the Hub.
        dataset_test_split (`str`, *optional*):
            Split of held-out prompts.
        eval_dataset_name (`str`, *optional*):
            Data set of held-out prompts, when it is not a split of `dataset_name`.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of the prompts. The lines of a `.txt` file are prompts.

        > Parameters that control the reward

        reward_model (`list[str]`, *optional*):
            One or more of: the Hub id or folder of an SLRM; `package.module:function` for a callable
            `f(images, prompts, **columns)`. Several are combined with `reward_weights`.

        > Parameters that control the callbacks

        guard_reward (`str`, *optional*):
            `package.module:function`, a held-out reward that must not fall while the training reward rises
            ([`RewardHackingGuardCallback`]).
        guard_every_steps (`int`, *optional*, defaults to `50`):
            Optimizer steps between two checks of the guard.
        guard_num_prompts (`int`, *optional*, defaults to `32`):
            Number of held-out prompts that the guard scores.
        guard_patience (`int`, *optional*, defaults to `2`):
            Number of bad checks in a row before the guard acts.
        guard_min_drop (`float`, *optional*, defaults to `0.0`):
            Smallest fall of the held-out reward that counts.
        guard_action (`str`, *optional*, defaults to `"warn"`):
            `"warn"` or `"stop"`.
        gradient_share_every_steps (`int`, *optional*):
            Measure the share of each stochastic step in the gradient every so many optimizer steps
            ([`GradientShareCallback`]).

        > Parameters that control the command

        dry_run (`bool`, *optional*, defaults to `False`):
            Print shapes, numbers of tokens, parameters and forwards and an estimate of the memory, and stop. Nothing is
            loaded; neither an accelerator nor the data is needed.
    """

    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split of held-out prompts."})
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Data set of held-out prompts, when it is not a split of `dataset_name`."},
    )
    prompt_column: str = field(
        default="prompt", metadata={"help": "Column of the prompts. The lines of a .txt file are prompts."}
    )
    reward_model: list[str] | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of an SLRM, or `package.module:function`; several are combined with "
            "`reward_weights`."
        },
    )
    guard_reward: str | None = field(
        default=None,
        metadata={
            "help": "`package.module:function`, a held-out reward that must not fall while the training reward rises."
        },
    )
    guard_every_steps: int = field(default=50, metadata={"help": "Optimizer steps between two checks of the guard."})
    guard_num_prompts: int = field(default=32, metadata={"help": "Number of held-out prompts that the guard scores."})
    guard_patience: int = field(default=2, metadata={"help": "Number of bad checks in a row before the guard acts."})
    guard_min_drop: float = field(default=0.0, metadata={"help": "Smallest fall of the held-out reward that counts."})
    guard_action: Literal["warn", "stop"] = field(
        default="warn", metadata={"help": "What the guard does: warn, or stop the training."}
    )
    gradient_share_every_steps: int | None = field(
        default=None,
        metadata={"help": "Measure the share of each stochastic step in the gradient every so many optimizer steps."},
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Print shapes, tokens, parameters, forwards and an estimate of the memory, and stop."},
    )


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
        skip_bad_files (`bool`, *optional*, defaults to `False`):
            Whether to leave out pairs with a file that is unreadable, damaged or too short.
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
    skip_bad_files: bool = field(
        default=False,
        metadata={"help": "Whether to leave out pairs with a file that is unreadable, damaged or too short."},
    )

    def __post_init__(self):
        super().__post_init__()
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


@dataclass
class BenchArguments:
    """
    Arguments of `tapo-trl bench`.

    Parameters:
        size (`str`, *optional*, defaults to `"tiny"`):
            Networks with random weights: `"tiny"` (SD3) and `"tiny_wan"`, for a CPU, or `"sd35"` (SD3.5-medium) and `"wan21"`
            (Wan2.1 1.3B). It also gives the defaults of what is left out below.
        model_name_or_path (`str`, *optional*):
            A pipeline to load instead.
        device (`str`, *optional*, defaults to `"cpu"`):
            Where to run.
        torch_dtype (`str`, *optional*, defaults to `"float32"`):
            Precision of the frozen weights.
        height (`int`, *optional*):
            Height of a sample in pixels.
        width (`int`, *optional*):
            Width of a sample in pixels.
        num_frames (`int`, *optional*):
            Number of frames of a video.
        max_sequence_length (`int`, *optional*):
            Number of tokens of the T5 or UMT5 text encoder.
        num_inference_steps (`int`, *optional*):
            Sampling steps T.
        num_sde_steps (`list[int]`, *optional*, defaults to `[2, 4, 8, 16]`):
            Stochastic steps n.
        num_candidates (`list[int]`, *optional*, defaults to `[2, 4]`):
            Candidates P per branch.
        prompts (`list[int]`, *optional*, defaults to `[1, 4, 8]`):
            Prompts per batch.
        sweep_steps (`list[int]`, *optional*):
            Other values of T to run the first n and prompts and the last P with.
        sweep_resolutions (`list[int]`, *optional*):
            Heights and widths to do the same with.
        guidance_scale (`float`, *optional*, defaults to `4.5`):
            Scale of classifier-free guidance, none if at most 1.
        score_batch_size (`int`, *optional*):
            Candidates per forward of the reward model. All of a step by default.
        transition_batch_size (`int`, *optional*, defaults to `1`):
            Transition pairs per forward and backward.
        lora_r (`int`, *optional*, defaults to `64`):
            Rank of the LoRA.
        share_backbone (`bool`, *optional*, defaults to `False`):
            Whether policy and reward model share one set of base weights.
        repeats (`int`, *optional*, defaults to `3`):
            How often everything is run. The median counts.
        warm_up (`bool`, *optional*, defaults to `True`):
            Whether to run everything once before.
        plot (`bool`, *optional*, defaults to `True`):
            Whether to draw `bench.png`, which needs matplotlib.
        output_dir (`str`, *optional*, defaults to `"bench"`):
            Where to write `bench.json`, `bench.md` and `bench.png`.
    """

    size: Literal["tiny", "tiny_wan", "sd35", "wan21"] = field(
        default="tiny", metadata={"help": "Networks with random weights; gives the defaults of what is left out."}
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "A pipeline to load instead."})
    device: str = field(default="cpu", metadata={"help": "Where to run."})
    torch_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Precision of the frozen weights."}
    )
    height: int | None = field(default=None, metadata={"help": "Height of a sample in pixels."})
    width: int | None = field(default=None, metadata={"help": "Width of a sample in pixels."})
    num_frames: int | None = field(default=None, metadata={"help": "Number of frames of a video."})
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "Number of tokens of the T5 or UMT5 text encoder."}
    )
    num_inference_steps: int | None = field(default=None, metadata={"help": "Sampling steps T."})
    num_sde_steps: list[int] = field(default_factory=lambda: [2, 4, 8, 16], metadata={"help": "Stochastic steps n."})
    num_candidates: list[int] = field(default_factory=lambda: [2, 4], metadata={"help": "Candidates P per branch."})
    prompts: list[int] = field(default_factory=lambda: [1, 4, 8], metadata={"help": "Prompts per batch."})
    sweep_steps: list[int] = field(
        default_factory=list, metadata={"help": "Other values of T, with the first n and prompts and the last P."}
    )
    sweep_resolutions: list[int] = field(
        default_factory=list, metadata={"help": "Heights and widths, with the first n and prompts and the last P."}
    )
    guidance_scale: float = field(default=4.5, metadata={"help": "Scale of classifier-free guidance."})
    score_batch_size: int | None = field(
        default=None, metadata={"help": "Candidates per forward of the reward model. All of a step by default."}
    )
    transition_batch_size: int = field(default=1, metadata={"help": "Transition pairs per forward and backward."})
    lora_r: int = field(default=64, metadata={"help": "Rank of the LoRA."})
    share_backbone: bool = field(
        default=False, metadata={"help": "Whether policy and reward model share one set of base weights."}
    )
    repeats: int = field(default=3, metadata={"help": "How often everything is run. The median counts."})
    warm_up: bool = field(default=True, metadata={"help": "Whether to run everything once before."})
    plot: bool = field(default=True, metadata={"help": "Whether to draw `bench.png`, which needs matplotlib."})
    output_dir: str = field(default="bench", metadata={"help": "Where to write the results."})

    def __post_init__(self):
        size = SIZES[self.size]
        for name in ("height", "width", "num_frames", "max_sequence_length", "num_inference_steps"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(size, name))
