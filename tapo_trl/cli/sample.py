# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterator
from contextlib import contextmanager

from .parser import RecipeParser


def make_parser() -> RecipeParser:
    """Parser of `tapo-trl sample`."""
    from ..trainer.model_config import PipelineConfig
    from .arguments import SampleArguments

    return RecipeParser((SampleArguments, PipelineConfig), prog="tapo-trl sample")


def load_sampling_policy(model_args, args):
    """
    Loads a policy onto the accelerator, with LoRA weights if there are any.

    Args:
        model_args ([`PipelineConfig`]): The pipeline.
        args ([`GenerationArguments`]): LoRA weights, and how to decode.

    Returns:
        [`FlowPolicy`]: The policy.
    """
    from accelerate import PartialState

    from ..policies import load_policy
    from ..trainer.policy_setup import set_vae_options

    policy = load_policy(model_args.require_model(), torch_dtype=model_args.dtype, revision=model_args.model_revision)
    policy.configure_experts(None, args.guidance_scale_2, args.guidance_scale)
    if args.lora is not None:
        policy.load_lora_weights(args.lora)
    set_vae_options(policy, args)
    policy.pipeline.to(PartialState().device)
    return policy


def sample_size(policy, args) -> tuple[int, int, int | None]:
    """
    Height, width and number of frames of the samples.

    Args:
        policy ([`FlowPolicy`]): The policy, whose size is the default.
        args ([`GenerationArguments`]): The sizes that are asked for.
    """
    size = policy.defaults
    height, width = args.height or args.resolution or size.height, args.width or args.resolution or size.width
    return height, width, args.num_frames or size.num_frames


def load_baselines(policy, model_args, args) -> list:
    """
    The baselines of `tapo-trl evaluate`, checked, and without weights.

    Args:
        policy ([`FlowPolicy`]): The model that they are compared with.
        model_args ([`PipelineConfig`]): Precision.
        args ([`EvaluateArguments`]): The baselines, their arguments and sizes.

    Returns:
        `list[Baseline]`: The baselines.

    Raises:
        ValueError: if one cannot be sampled so, or makes videos of images.
    """
    from ..evaluation.baselines import Baseline, parse_baselines
    from ..policies.loading import AUTO
    from ..rewards.loading import init_kwargs_of

    if args.baselines is not None and model_args.dtype == AUTO:
        raise ValueError("`torch_dtype: auto` is not for `baselines`: name the precision of all models.")
    height, width = args.height or args.resolution, args.width or args.resolution
    sizes = {"height": height, "width": width, "num_frames": args.num_frames}
    baselines = []
    for name, path in parse_baselines(args.baselines or []).items():
        options = {key: value for key, value in sizes.items() if value is not None}
        options |= init_kwargs_of(name, args.baseline_kwargs)
        baseline = Baseline(name, path, model_args.dtype, options)
        if baseline.modality != policy.modality:
            raise ValueError(
                f"The baseline `{name}` makes {baseline.modality}s, but the model makes {policy.modality}s."
            )
        baselines.append(baseline)
    return baselines


@contextmanager
def in_place_of(policy, baseline) -> Iterator[None]:
    """Keep a policy on the CPU while a baseline is drawn, and forget the weights of the baseline afterwards."""
    device = policy.transformer.device
    policy.pipeline.to("cpu")
    yield
    baseline.pipeline = None
    policy.pipeline.to(device)


def draw(policy, prompts: list[str], args, seeds=None):
    """
    Draws one image or video per prompt, as the trainers do; sample `i` starts from the noise of `args.seed + i`.

    Args:
        policy ([`FlowPolicy`]): The policy.
        prompts (`list[str]`): The prompts.
        args ([`GenerationArguments`]): How to sample.
        seeds (`Sequence[int]`, *optional*): Seed of each sample.

    Returns:
        `torch.Tensor`: Samples of shape `[B, 3, H, W]` or `[B, 3, F, H, W]`, float32 in [0, 1], on the CPU.
    """
    from ..policies.sampling import generate_samples

    return generate_samples(
        policy,
        policy.transformer,
        prompts,
        lambda batch: policy.encode_prompts(batch, args.max_sequence_length),
        args.negative_prompt,
        latent_shape=policy.latent_shape(*sample_size(policy, args)),
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed if seeds is None else seeds,
        batch_size=args.batch_size,
    )


def write_samples(samples, folder, fps: int) -> None:
    """
    Writes `000.png`, `001.png` and so on, or `.mp4`.

    Args:
        samples (`torch.Tensor`): Samples, as [`draw`] returns them.
        folder (`Path`): Folder, made if it does not exist.
        fps (`int`): Frames per second of videos.
    """
    from ..data.videos import write_video
    from ..media.pictures import images_to_pil

    folder.mkdir(parents=True, exist_ok=True)
    for index, sample in enumerate(samples):
        if samples.ndim == 5:
            write_video(folder / f"{index:03d}.mp4", sample, fps)
        else:
            images_to_pil(sample[None])[0].save(folder / f"{index:03d}.png")


def compare_methods(prompts: list[str], folder, args, model_args) -> None:
    """
    Draws the same prompts and seeds with the base model and with each of `methods`, and writes `grid.png`, a row per method and
    a column per prompt (the middle frames of videos), beside a folder of samples of each.

    Args:
        prompts (`list[str]`): The prompts.
        folder (`Path`): Where to.
        args ([`SampleArguments`]): The methods, and how to sample.
        model_args ([`PipelineConfig`]): The base model.
    """
    from copy import copy
    from pathlib import Path

    from ..evaluation.baselines import parse_baselines
    from ..media.pictures import images_to_pil, labelled_grid

    cells = {}
    for name, path in {"base": None, **parse_baselines(args.methods, "methods")}.items():
        own_args, own_model = copy(args), copy(model_args)
        if path is not None and (Path(path) / "model_index.json").is_file():
            own_model.model_name_or_path, own_model.model_revision = path, None
        else:
            own_args.lora = path
        samples = draw(load_sampling_policy(own_model, own_args), prompts, args)
        write_samples(samples, folder / name, args.fps)
        cells[name] = images_to_pil(samples if samples.ndim == 4 else samples[:, :, samples.shape[2] // 2])
    labelled_grid(list(cells.values()), list(cells), prompts).save(folder / "grid.png")
    print(f"Wrote {len(prompts)} samples of each of {', '.join(cells)}, and grid.png, to {folder}.")


def main(args, model_args) -> None:
    """
    Draws images and writes them, and a grid of them, as PNG files; or videos, as MP4 files, with a strip of their frames.

    Args:
        args ([`SampleArguments`]): What to draw.
        model_args ([`PipelineConfig`]): The pipeline.
    """
    from pathlib import Path

    from ..data.loading import read_prompts_and_columns
    from ..media.pictures import save_overview

    prompts, _ = read_prompts_and_columns(args.prompts, "prompts")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if args.methods is not None:
        return compare_methods(prompts, folder, args, model_args)

    samples = draw(load_sampling_policy(model_args, args), prompts, args)
    is_video = samples.ndim == 5
    write_samples(samples, folder, args.fps)
    save_overview(samples, folder / "grid", args.columns, args.fps)
    files = "videos, grid.mp4" if is_video else "images"
    print(f"Wrote {len(prompts)} {files} and grid.png to {folder}.")
