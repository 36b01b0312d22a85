# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""`tapo-trl evaluate --benchmark`: samples in the layout of a benchmark's own tool, and scores."""

import shlex
import sys
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any


GENEVAL, ALL = "geneval", "all"
SETTINGS = (  # what samples depend on, beside the model and its LoRA
    *("num_inference_steps", "guidance_scale", "negative_prompt", "max_sequence_length", "fps"),
    *("vae_tiling", "vae_slicing"),
)


def run_benchmark(args, model_args) -> dict[str, Any]:
    """
    Draws the samples that are missing and scores them; or reads the scores of the benchmark's own tool. GenEval is scored here if
    the weights of its detector are.

    Args:
        args ([`EvaluateArguments`]): The benchmark, its prompts and how to sample.
        model_args ([`PipelineConfig`]): The pipeline.

    Returns:
        `dict[str, Any]`: `scores` of the benchmark, the number of `samples` and, with `reward_model`, `rewards`: for each
            [`~evaluation.scores.summarize`] of all samples, and of those of each category; and the same of `baselines`, by name.
    """
    from accelerate import PartialState

    from ..evaluation.prompts import find_benchmark, load_prompts
    from ..evaluation.sampling import sample_benchmark
    from .sample import draw, in_place_of, load_baselines, load_sampling_policy, sample_size

    benchmark = find_benchmark(args.benchmark)
    if args.results is not None:
        return {"name": args.benchmark, "scores": read_results(args.benchmark, args.results)}
    rows, rewards = load_prompts(args.benchmark, args.benchmark_prompts), list(args.reward_model or [])
    if args.benchmark == GENEVAL and GENEVAL not in rewards and detector_is_here(args):
        rewards.append(GENEVAL)
    policy = load_sampling_policy(model_args, args)
    if policy.modality != benchmark.modality:
        raise ValueError(
            f"`{args.benchmark}` is a benchmark of {benchmark.modality}s, but the model makes {policy.modality}s."
        )
    baselines = load_baselines(policy, model_args, args)
    scorers = load_benchmark_scorers(args, rewards, policy, rows) if PartialState().is_main_process else {}
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"size": sample_size(policy, args), "model": model_args.model_name_or_path, "lora": args.lora}
    settings |= {"revision": model_args.model_revision, "torch_dtype": str(model_args.dtype)}
    sampling = {name: getattr(args, name) for name in ("samples_per_prompt", "batch_size", "fps", "seed")}
    items = sample_benchmark(
        args.benchmark,
        rows,
        lambda prompts, seeds: draw(policy, prompts, args, seeds),
        args.samples_dir,
        settings=settings,
        **sampling,
    )
    for baseline in baselines:
        with in_place_of(policy, baseline):
            own_draw = partial(baseline.draw, batch_size=args.batch_size, device=PartialState().device)
            folder, settings = baseline_folder(args, baseline), {**baseline.settings, "fps": args.fps}
            sample_benchmark(args.benchmark, rows, own_draw, folder, settings=settings, **sampling)
    result: dict[str, Any] = {"name": args.benchmark, "samples": len(items)}
    if PartialState().is_main_process:
        result |= score_model(args, policy, rows, items, scorers, Path(args.samples_dir))
        for baseline in baselines:
            found = score_model(args, policy, rows, items, scorers, baseline_folder(args, baseline))
            result.setdefault("baselines", {})[baseline.name] = found
    return result


def baseline_folder(args, baseline) -> Path:
    """Where the samples of a baseline go, in the layout of the benchmark."""
    return Path(args.samples_dir) / "baselines" / baseline.name


def score_model(args, policy, rows, items, scorers, folder: Path) -> dict[str, Any]:
    """
    The rewards of the samples of one model, and the scores of the benchmark; or what to do for them is printed.

    Args:
        args ([`EvaluateArguments`]): The benchmark.
        policy ([`FlowPolicy`]): The pipeline, base of latent reward models.
        rows (`Dataset`): The prompts, with their categories.
        items (`list[Item]`): The files.
        scorers (`dict[str, Callable]`): From [`load_benchmark_scorers`].
        folder (`Path`): The samples.
    """
    from ..evaluation.prompts import find_benchmark

    benchmark, result = find_benchmark(args.benchmark), {}
    if scorers:
        result["rewards"] = score_items(policy, rows, items, scorers, folder)
    if args.benchmark == GENEVAL and GENEVAL in scorers:
        means = {tag: summary["mean"] for tag, summary in result["rewards"].pop(GENEVAL).items() if tag != ALL}
        result["scores"] = {**means, "overall": mean(means.values())}
        if not result["rewards"]:
            del result["rewards"]
    elif benchmark.next_step is not None:
        command = benchmark.next_step.format(folder=shlex.quote(str(folder.absolute())))
        if args.benchmark == GENEVAL:
            from ..rewards.pretrained.geneval import GenEvalReward

            native = f" Or fetch the detector, and run this command again:\n\n    {GenEvalReward.how_to_get()}"
        else:
            native = ""
        print(
            f"The samples are in {folder}. In a clone of {benchmark.source} and in its own environment, run\n\n    {command}\n\n"
            f"and then `tapo-trl evaluate --benchmark {args.benchmark} --results RESULT`.{native}",
            file=sys.stderr,
        )
    return result


def read_results(name: str, path: str) -> dict[str, float]:
    """Scores from what the tool of the benchmark `name` wrote."""
    from ..evaluation.results import read_compbench, read_geneval, read_vbench

    if not Path(path).exists():
        raise FileNotFoundError(f"`results`: there is no {path}.")
    if name == "geneval":
        return read_geneval(path)
    return read_vbench(path) if name == "vbench" else {name: read_compbench(path)}


def detector_is_here(args) -> bool:
    """Whether GenEval can be scored: its detector is where it is looked for, or is named."""
    from ..rewards.pretrained.geneval import GenEvalReward

    return GENEVAL in (args.reward_model_init_kwargs or {}) or GenEvalReward.detector_path().is_file()


def load_benchmark_scorers(args, rewards: list[str], policy, rows) -> dict[str, Any]:
    """The rewards of the samples, loaded and checked before these are drawn."""
    from ..evaluation.scores import check_scorers, load_scorers
    from ..scripts.utils import load_functions

    scorers = load_scorers(load_functions(rewards), args.reward_model_init_kwargs, lambda name: policy)
    columns = {name: rows[name] for name in rows.column_names if name != "prompt"}
    check_scorers(scorers, rows["prompt"], policy, columns)
    return scorers


def score_items(policy, rows, items, scorers, folder: Path) -> dict[str, dict[str, dict]]:
    """
    Rewards of the samples of a benchmark.

    Args:
        policy ([`FlowPolicy`]): The pipeline, base of latent reward models.
        rows (`Dataset`): The prompts, with their categories.
        items (`list[Item]`): The files.
        scorers (`dict[str, Callable]`): From [`load_benchmark_scorers`].
        folder (`Path`): The samples.
    """
    from ..evaluation.scores import SampleFiles, score_samples, summarize

    of_items = rows[[item.row for item in items]]  # the same prompt may stand in two categories
    prompts = of_items.pop("prompt")
    files = SampleFiles([folder / item.file for item in items])
    scores = score_samples(scorers, files, prompts, policy.transformer.device, of_items)
    categories = next((of_items[name] for name in ("category", "tag") if name in of_items), [])
    found = {}
    for name, values in scores.items():
        found[name] = {ALL: summarize(values)}
        for category in dict.fromkeys(categories):
            members = [row for row, other in enumerate(categories) if other == category]
            found[name][category] = summarize(values[members])
    return found
