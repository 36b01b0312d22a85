# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Arguments of the commands that train nothing. `tapo-trl COMMAND --help` describes the fields."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..data.loading import PreferenceDatasetArguments
from ..field_types import convert_fields, option, read_mapping
from ..files import check_folder_name
from ..policies.loading import parse_dtype


REWARDS_OF_SAMPLES = (
    "Rewards: names of pretrained ones (`tapo-trl rewards` lists them), `package.module:function`, Hub ids or folders of reward "
    "models, or addresses of reward servers."
)
INIT_KWARGS = "Keyword arguments for rewards that are given by name. A mapping under the name of a reward applies to that reward only."


def _check_file(output_file: str | None) -> None:
    """Before the work, rather than after it."""
    if output_file is not None:
        check_folder_name(Path(output_file).parent, "output_file")
        if not output_file.strip() or Path(output_file).is_dir():
            raise ValueError(f"`output_file={output_file}` must name a file.")


@dataclass
class GenerationArguments:
    """How a command draws samples."""

    prompts: list[str] | None = option(
        "Prompts, or the path of one file: .txt with a prompt per line, or .parquet, .jsonl or .csv with the column `prompt`, whose "
        "further columns rewards get."
    )
    lora: str | None = option("Folder or Hub id with `pytorch_lora_weights.safetensors`.")
    num_inference_steps: int = option("Sampling steps.", 28)
    guidance_scale: float = option(
        "Guidance scale, in the terms of the pipeline; 1 (Z-Image: 0) turns guidance off.", 4.5
    )
    guidance_scale_2: float | None = option("Guidance scale of the expert for low noise levels, if there are two.")
    negative_prompt: str = option("Negative prompt.", "")
    resolution: int | None = option("Height and width in pixels; by default the pipeline's.")
    height: int | None = option("Height in pixels. Overrides `resolution`.")
    width: int | None = option("Width in pixels. Overrides `resolution`.")
    num_frames: int | None = option("Number of frames of a video; 81 by default.")
    fps: int = option("Frames per second of a video.", 16)
    max_sequence_length: int | None = option("Number of tokens of a prompt; by default the model family's.")
    vae_tiling: bool = option("Whether to decode large samples in overlapping tiles.", False)
    vae_slicing: bool = option("Whether to decode one sample at a time.", False)
    batch_size: int = option("Prompts (or pairs) per forward pass.", 4)
    seed: int = option("Seed of the first sample; sample `i` uses `seed + i`.", 0)

    def __post_init__(self):
        for name in ("num_inference_steps", "resolution", "height", "width", "num_frames", "fps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, but it is {value}.")


@dataclass
class MergeArguments:
    """Arguments of `tapo-trl merge` beside [`PipelineConfig`]."""

    lora: str | None = option("Folder or Hub id with `pytorch_lora_weights.safetensors`.")
    output_dir: str = option("Folder to write to.", "merged")
    format: str = option(
        "`diffusers`, a pipeline with the LoRA merged, in `torch_dtype`; or `comfyui`, one file of LoRA weights for ComfyUI.",
        "diffusers",
        choices=["diffusers", "comfyui"],
    )

    def __post_init__(self):
        check_folder_name(self.output_dir, "output_dir")
        if self.lora is None:
            raise ValueError("`lora` is missing: give the folder or Hub id of a trained LoRA.")


@dataclass
class SampleArguments(GenerationArguments):
    """Arguments of `tapo-trl sample` beside [`PipelineConfig`]: those of [`GenerationArguments`]."""

    output_dir: str = option("Folder of the PNG or MP4 files.", "samples")
    columns: int | None = option("Columns of the grid.")
    methods: list[str] | None = option(
        "Models to compare on the same prompts and seeds, as `NAME=PATH`: LoRA weights, or the folder of a pipeline."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.methods is not None and (self.lora is not None or self.columns is not None):
            raise ValueError("`methods` names the models, with a column per prompt: leave `lora` and `columns` unset.")
        if self.prompts is None:
            raise ValueError("`prompts` is missing: give one or more prompts, or the path of a .txt file.")


@dataclass
class ScoredPairsArguments(PreferenceDatasetArguments):
    """A latent reward model, and the held-out pairs of [`PreferenceDatasetArguments`] that it scores."""

    reads_pairs = True  # whether it is measured on pairs
    dataset_test_split: str = option(
        "Split of held-out pairs; slices such as `train[90%%:]` work for files and Hub datasets.", "test"
    )
    slrm: str | None = option("Hub id or folder of the latent reward model that is measured.")
    sigmas: list[float] = option("Noise levels in [0, 1).", [0.1, 0.3, 0.5, 0.7, 0.9])
    rules: list[str] | None = option(
        "Velocity targets of an SLRM's score: `ground_truth` (the paper's, which needs the clean "
        "sample), or `reference` and `none`, which are known at inference time. Defaults to the "
        "first two, and to `none` for other reward models."
    )
    max_pairs: int | None = option("Number of pairs to use, from the start.")
    short_videos: Literal["refuse", "uniform"] = option(
        (
            "What to do with videos that are too short: treat them as unusable files (`refuse`), or "
            "sample frames uniformly (`uniform`)."
        ),
        "refuse",
    )
    dimension_weights: dict[str, float] | str | None = option(
        "Weights of the columns `label_<dimension>`, which then say which side is preferred."
    )
    skip_bad_files: bool = option(
        "Whether to leave out pairs with a file that is unreadable, damaged or too short.", False
    )
    cache_dir: str | None = option("Where latents and prompt embeddings are kept.")

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
        if self.slrm is not None and self.dataset_name is None and self.reads_pairs:
            raise ValueError("`slrm` needs `dataset_name`: the held-out preference pairs to measure it on.")


@dataclass
class EvaluateArguments(ScoredPairsArguments, GenerationArguments):
    """
    Arguments of `tapo-trl evaluate` beside [`PipelineConfig`]: the accuracy of reward models on held-out pairs (`slrm` or
    `reward_model`, and `dataset_name`), the mean reward of a model's samples (`reward_model` and `prompts`), or a public
    `benchmark`. The pairs are described by [`ScoredPairsArguments`] and the samples by [`GenerationArguments`], whose size,
    `fps`, `batch_size` and `seed` hold for the pairs, too; by default their size is that of the SLRM's training.
    """

    reward_model: list[str] | None = option(REWARDS_OF_SAMPLES)
    reward_model_init_kwargs: dict[str, Any] | str | None = option(INIT_KWARGS)
    zero_margin: Literal["half", "wrong"] = option(
        "What a pair with equal scores counts in the accuracy without ties: one half, or nothing (as in VideoAlign's code).",
        "half",
    )
    tie_threshold: str | None = option(
        "Report the accuracy with ties, too, at each noise level. A pair is a predicted tie if its scores differ by at most this "
        "number. `best` is the number with the highest accuracy, and `videoalign` counts as VideoAlign's code."
    )
    compare_base: bool = option("Whether to draw and score the base model's samples, too, if there is a `lora`.", True)
    baselines: list[str] | None = option(
        "Further models to draw and score, as `NAME=ID`: any text-to-image or text-to-video pipelines of diffusers, by Hub id or folder, "
        "sampled by their own `__call__` on the same prompts and seeds."
    )
    baseline_kwargs: dict[str, Any] | str | None = option(
        "Arguments of the baselines' `__call__`, such as `{num_inference_steps: 50}`. A mapping under the name of a baseline applies to "
        "that one only. By default their pipelines' own, with the sizes that are set here."
    )
    samples_dir: str | None = option("Folder for the samples and the score of each.")
    benchmark: str | None = option(
        "Public benchmark whose samples are drawn: `geneval`, `compbench/color` (or another category), "
        "`drawbench`, `partiprompts`, `ocr` or `vbench`."
    )
    benchmark_prompts: str | None = option("The benchmark's official prompt file, or a clone of its repository.")
    samples_per_prompt: int | None = option("Samples per prompt of the benchmark; by default as many as it asks for.")
    results: str | None = option(
        "Output of the benchmark's own tool, to compute scores from: `results.jsonl` of GenEval, `vqa_result.json` of "
        "T2I-CompBench, or the folder of VBench's `*_eval_results.json`."
    )
    output_file: str | None = option("JSON file for the result.")

    def __post_init__(self):
        ScoredPairsArguments.__post_init__(self)
        GenerationArguments.__post_init__(self)
        read_mapping(self, "reward_model_init_kwargs")
        read_mapping(self, "baseline_kwargs")
        self._check_ties()
        self._check_baselines()
        if self.samples_dir is not None:
            check_folder_name(self.samples_dir, "samples_dir")
        _check_file(self.output_file)
        if self.benchmark is not None:
            return self._check_benchmark()
        for name in ("benchmark_prompts", "samples_per_prompt", "results"):
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}` is set but `benchmark` is not: whose is it?")
        if self.slrm is None and self.reward_model is None:
            raise ValueError(
                "Give `slrm` (accuracy on pairs), `reward_model` (reward of samples, or accuracy on pairs), or `benchmark`."
            )
        if self.reward_model is not None and self.prompts is None and self.dataset_name is None:
            raise ValueError(
                "`reward_model` needs `prompts` (what the model should draw) or `dataset_name` (pairs to be ranked)."
            )

    def _check_baselines(self) -> None:
        from ..evaluation.baselines import parse_baselines

        if self.baselines is not None and (
            self.results is not None or (self.prompts is None and self.benchmark is None)
        ):
            raise ValueError("`baselines` are sampled: give `prompts` or a `benchmark` without `results`.")
        names = parse_baselines(self.baselines or [])
        for name, value in (self.baseline_kwargs or {}).items():
            if not names or (isinstance(value, dict) and name not in names):
                raise ValueError(f"`baseline_kwargs` has arguments for `{name}`, but `baselines` is {list(names)}.")

    def _check_ties(self) -> None:
        if (self.tie_threshold is not None or self.zero_margin != "half") and self.dataset_name is None:
            raise ValueError("`tie_threshold` and `zero_margin` are for pairs: give `dataset_name`.")
        if self.tie_threshold in (None, "best", "videoalign"):
            return
        try:
            self.tie_threshold = float(self.tie_threshold)
        except ValueError:
            self.tie_threshold = -1.0
        if not 0 <= self.tie_threshold < float("inf"):
            raise ValueError("`tie_threshold` must be best, videoalign, or a number that is not negative.")

    def _check_benchmark(self) -> None:
        from ..evaluation.prompts import find_benchmark

        benchmark = find_benchmark(self.benchmark)
        for name in ("slrm", "dataset_name", "prompts"):
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}` and `benchmark` exclude each other: run two commands.")
        if self.samples_per_prompt is not None and self.samples_per_prompt < 1:
            raise ValueError(f"`samples_per_prompt` must be at least 1, but it is {self.samples_per_prompt}.")
        if self.results is not None:
            if benchmark.next_step is None:
                raise ValueError(
                    f"`results` are those of a tool, and `{self.benchmark}` has none: give `reward_model`."
                )
            return
        if self.samples_dir is None:
            raise ValueError("`benchmark` needs `samples_dir`: the folder of the samples.")
        if self.benchmark_prompts is None:
            raise ValueError(f"`benchmark` needs `benchmark_prompts`. {benchmark.how_to_get}")
        if benchmark.next_step is None and self.reward_model is None:
            raise ValueError(
                f"`benchmark={self.benchmark}` has no tool of its own: give `reward_model`, which scores it."
            )


@dataclass
class ScoreArguments:
    """Arguments of `tapo-trl score FOLDER` beside [`PipelineConfig`], the pipeline of latent reward models."""

    folder: str | None = option("Folder of the images or videos. Can also be the first argument, without the flag.")
    prompts: list[str] | None = option(
        "Prompt of each file, in the order of the file names: a list, a .txt file with a prompt per line, a .parquet, .jsonl or .csv "
        "file with the column `prompt`, whose further columns rewards get, or a .json file `{file name: prompt}`."
    )
    reward_model: list[str] | None = option(REWARDS_OF_SAMPLES)
    reward_model_init_kwargs: dict[str, Any] | str | None = option(INIT_KWARGS)
    output_file: str | None = option(
        "JSON file for the result and the score of each file, or CSV file for the scores alone."
    )

    def __post_init__(self):
        for name in ("folder", "prompts", "reward_model"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"`{name}` is missing: `tapo-trl score FOLDER --prompts prompts.txt --reward_model clip`."
                )
        read_mapping(self, "reward_model_init_kwargs")
        _check_file(self.output_file)


@dataclass
class RewardsArguments:
    """Arguments of `tapo-trl rewards`."""

    torch_dtype: str | None = option(
        "Precision for which the memory is listed. By default the default precision of each reward."
    )
    prepare: str | None = option(
        "Download the instruction text of `hpsv3` or `videoreward` from the distribution of the original. Needed once."
    )
    source: str | None = option(
        "Local wheel or Python file of the original, which `prepare` reads instead of downloading."
    )

    def __post_init__(self):
        if self.source is not None and self.prepare is None:
            raise ValueError("`source` is where `prepare` takes the instruction from: give `prepare`, too.")
        if self.torch_dtype is not None:
            parse_dtype(self.torch_dtype)


@dataclass
class DiagnoseArguments(ScoredPairsArguments):
    """
    Arguments of `tapo-trl diagnose` beside [`PipelineConfig`]: a reward model and held-out pairs, which
    [`ScoredPairsArguments`] describe, the folders of trainings, or both.
    """

    sigmas: list[float] = option(
        "Noise levels in [0, 1), at least two.", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    )
    tie_threshold: float | None = option(
        "Largest difference of the scores of a predicted tie. By default the one with the highest accuracy with ties "
        "on these pairs."
    )
    batch_size: int = option("Pairs per forward pass.", 8)
    seed: int = option("Seed of the noise.", 0)
    fps: int = option("Frames per second of videos.", 16)
    runs: list[str] | None = option("Output folders of training runs, whose logged curves are plotted.")
    trajectories: list[str] | None = option("Prompts whose two TAPO trajectories are drawn, scored by `slrm`.")
    lora: str | None = option("LoRA weights of the policy of `trajectories`; by default the base draws.")
    num_inference_steps: int = option("Sampling steps T of `trajectories`.", 20)
    num_sde_steps: int = option("Stochastic steps n of `trajectories`.", 8)
    num_candidates: int = option("Candidates P of `trajectories`.", 4)
    guidance_scale: float = option("Guidance scale of `trajectories`.", 4.5)
    judge: str = option("Logged metric that the training reward of `runs` is compared with.", "guard/held_out_reward")
    output_dir: str = option("Folder of `diagnosis.json` and `diagnosis.png`.", "diagnosis")

    def __post_init__(self):
        super().__post_init__()
        if self.slrm is None and self.runs is None:
            raise ValueError("Give `slrm` and `dataset_name` (a reward model on pairs), `runs` (trainings), or both.")
        if self.trajectories is not None and self.slrm is None:
            raise ValueError("`trajectories` needs `slrm`, the reward model that scores both branches.")
        for name in ("lora", "num_inference_steps", "num_sde_steps", "num_candidates", "guidance_scale"):
            if self.trajectories is None and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"`{name}` is for `trajectories`, which is not given: leave it unset.")
        if len(set(self.sigmas)) < 2:
            raise ValueError(f"`sigmas` must be at least two noise levels to compare, but they are {self.sigmas}.")
        for name in ("batch_size", "fps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but it is {getattr(self, name)}.")

    @property
    def reads_pairs(self) -> bool:
        return self.trajectories is None or self.dataset_name is not None


@dataclass(frozen=True)
class Size:
    """
    What `tapo-trl bench` measures under one word.

    Args:
        repository (`str`): Released pipeline whose family and sizes it has.
        height, width, num_frames (`int`): Size of a sample.
        max_sequence_length (`int`): Tokens of a prompt.
        num_inference_steps (`int`): Sampling steps.
        tiny (`dict[str, int]`, *optional*): Sizes of the transformer of the family's tiny pipeline, which stands in.
    """

    repository: str
    height: int
    width: int
    num_frames: int | None
    max_sequence_length: int
    num_inference_steps: int
    tiny: dict[str, Any] | None = None


SD35, WAN21 = "stabilityai/stable-diffusion-3.5-medium", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
_TINY_SD35 = {
    "num_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "caption_projection_dim": 128,
    "pos_embed_max_size": 16,
    "dual_attention_layers": (0, 1),
}
_TINY_WAN21 = {"num_layers": 4, "attention_head_dim": 24, "num_attention_heads": 4, "ffn_dim": 256}
SIZES = {
    "tiny": Size(SD35, 64, 64, None, 16, 20, _TINY_SD35),
    "tiny_wan": Size(WAN21, 64, 64, 9, 16, 20, _TINY_WAN21),
    "sd35": Size(SD35, 512, 512, None, 256, 20),
    "wan21": Size(WAN21, 480, 832, 17, 512, 40),
}


@dataclass
class BenchArguments:
    """Arguments of `tapo-trl bench`."""

    size: Literal["tiny", "tiny_wan", "sd35", "wan21"] = option(
        "Size of the networks, which have random weights. Sets the defaults of the other options.", "tiny"
    )
    model_name_or_path: str | None = option("Pipeline to load instead of random weights.")
    device: str = option("Where to run.", "cpu")
    torch_dtype: Literal["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"] = option(
        "Precision of the frozen weights.", "float32"
    )
    height: int | None = option("Height of a sample in pixels.")
    width: int | None = option("Width of a sample in pixels.")
    num_frames: int | None = option("Number of frames of a video.")
    max_sequence_length: int | None = option("Number of tokens of a prompt.")
    num_inference_steps: int | None = option("Sampling steps T.")
    num_sde_steps: list[int] = option("Stochastic steps n.", [2, 4, 8, 16])
    num_candidates: list[int] = option("Candidates P per branch.", [2, 4])
    prompts: list[int] = option("Prompts per batch.", [1, 4, 8])
    sweep_steps: list[int] = option(
        "Further values of T, measured with the first of `num_sde_steps` and `prompts` and the last of `num_candidates`.",
        [],
    )
    sweep_resolutions: list[int] = option(
        "Further sizes (height and width), measured with the first of `num_sde_steps` and `prompts` and the last of "
        "`num_candidates`.",
        [],
    )
    guidance_scale: float = option("Scale of classifier-free guidance.", 4.5)
    score_batch_size: int | None = option("Candidates per forward of the reward model. All of a step by default.")
    transition_batch_size: int = option("Transition pairs per forward and backward.", 1)
    lora_r: int = option("Rank of the LoRA.", 64)
    share_backbone: bool = option("Whether policy and reward model share one set of base weights.", False)
    layerwise_casting: bool = option("Whether the policy's frozen linear layers are kept in float8.", False)
    reward_layerwise_casting: bool = option("Whether the reward model's linear layers are kept in float8.", False)
    reward_group_offload: bool = option(
        "Whether to keep the reward model on the CPU and move one block at a time to the accelerator.", False
    )
    attention_backend: str | None = option("Another implementation of attention, by diffusers' name.")
    torch_compile: bool = option("Whether every transformer block is compiled.", False)
    repeats: int = option("Number of repetitions. The median is reported.", 3)
    warm_up: bool = option("Whether to do one untimed run first.", True)
    plot: bool = option("Whether to draw `bench.png`, which needs matplotlib.", True)
    output_dir: str = option("Where to write the results.", "bench")
    activation_checkpointing: bool = option("Whether the update recomputes activations, to save memory.", True)
    chunk_sizes: list[int] = option(
        "Values of `transition_batch_size` for which the update of the first setting is compared with its bare forwards and "
        "backwards.",
        [],
    )

    def __post_init__(self):
        size = SIZES[self.size]
        for name in ("height", "width", "num_frames", "max_sequence_length", "num_inference_steps"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(size, name))
