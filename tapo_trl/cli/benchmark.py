# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""`tapo-trl evaluate --benchmark`: samples in the layout of a benchmark's own tool, and scores."""

import shlex
import sys
from pathlib import Path
from typing import Any


SETTINGS = (  # what samples depend on, beside the model and its LoRA
    *("num_inference_steps", "guidance_scale", "negative_prompt", "max_sequence_length", "fps"),
    *("vae_tiling", "vae_slicing"),
)


def run_benchmark(args, model_args) -> dict[str, Any]:
    """
    Draws the samples that are missing and scores them; or reads the scores of the benchmark's own tool.

    Args:
        args ([`EvaluateArguments`]): The benchmark, its prompts and how to sample.
        model_args ([`PipelineConfig`]): The pipeline.

    Returns:
        `dict[str, Any]`: `scores` of the tool, or the number of `samples` and, with `reward_model`, `rewards`: for each
            [`~evaluation.scores.summarize`] of all samples, and of those of each category.
    """
    from accelerate import PartialState

    from ..evaluation.prompts import find_benchmark, load_prompts
    from ..evaluation.sampling import sample_benchmark
    from .sample import draw, load_sampling_policy, sample_size

    benchmark = find_benchmark(args.benchmark)
    if args.results is not None:
        return {"name": args.benchmark, "scores": read_results(args.benchmark, args.results)}
    rows = load_prompts(args.benchmark, args.benchmark_prompts)
    policy = load_sampling_policy(model_args, args)
    if policy.modality != benchmark.modality:
        raise ValueError(
            f"`{args.benchmark}` is a benchmark of {benchmark.modality}s, but the model makes {policy.modality}s."
        )
    scorers = load_benchmark_scorers(args, policy, rows) if PartialState().is_main_process else {}
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"size": sample_size(policy, args), "model": model_args.model_name_or_path, "lora": args.lora}
    settings |= {"revision": model_args.model_revision, "torch_dtype": str(model_args.dtype)}
    items = sample_benchmark(
        args.benchmark,
        rows,
        lambda prompts, seeds: draw(policy, prompts, args, seeds),
        args.samples_dir,
        settings=settings,
        samples_per_prompt=args.samples_per_prompt,
        batch_size=args.batch_size,
        fps=args.fps,
        seed=args.seed,
    )
    result: dict[str, Any] = {"name": args.benchmark, "samples": len(items)}
    if not PartialState().is_main_process:
        return result
    if args.reward_model is not None:
        result["rewards"] = score_items(args, policy, rows, items, scorers)
    if benchmark.next_step is not None:
        command = benchmark.next_step.format(folder=shlex.quote(str(Path(args.samples_dir).absolute())))
        print(
            f"The samples are in {args.samples_dir}. In a clone of {benchmark.source} and in its own environment, run\n\n    {command}\n\n"
            f"and then `tapo-trl evaluate --benchmark {args.benchmark} --results RESULT`.",
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


def load_benchmark_scorers(args, policy, rows) -> dict[str, Any]:
    """The rewards of the samples, loaded and checked before these are drawn."""
    from ..evaluation.scores import check_scorers, load_scorers
    from ..scripts.utils import load_functions

    rewards = load_functions(args.reward_model or [])
    scorers = load_scorers(rewards, args.reward_model_init_kwargs, lambda name: policy)
    check_scorers(scorers, rows["prompt"], policy)
    return scorers


def score_items(args, policy, rows, items, scorers) -> dict[str, dict[str, dict]]:
    """
    Rewards of the samples of a benchmark.

    Args:
        args ([`EvaluateArguments`]): The rewards and the folder.
        policy ([`FlowPolicy`]): The pipeline, base of latent reward models.
        rows (`Dataset`): The prompts, with their categories.
        items (`list[Item]`): The files.
        scorers (`dict[str, Callable]`): From [`load_benchmark_scorers`].
    """
    from ..evaluation.scores import SampleFiles, score_samples, summarize

    prompts = [item.prompt for item in items]
    files = SampleFiles([Path(args.samples_dir) / item.file for item in items])
    scores = score_samples(scorers, files, prompts, policy.transformer.device)
    column = next((name for name in ("category", "tag") if name in rows.column_names), None)
    # Each row has as many files; the same prompt may stand in two categories
    per_row = len(items) // len(rows)
    categories = [] if column is None else [category for category in rows[column] for _ in range(per_row)]
    found = {}
    for name, values in scores.items():
        found[name] = {"all": summarize(values)}
        for category in dict.fromkeys(categories):
            members = [row for row, other in enumerate(categories) if other == category]
            found[name][category] = summarize(values[members])
    return found
