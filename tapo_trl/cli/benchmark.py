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
        result["rewards"] = score_items(args, policy, rows, items)
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


def score_items(args, policy, rows, items) -> dict[str, dict[str, dict]]:
    """
    Rewards of the samples of a benchmark.

    Args:
        args ([`EvaluateArguments`]): The rewards and the folder.
        policy ([`FlowPolicy`]): The pipeline, base of latent reward models.
        rows (`Dataset`): The prompts, with their categories.
        items (`list[Item]`): The files.
    """
    from ..evaluation.scores import SampleFiles, load_scorers, score_samples, summarize
    from ..rewards import PretrainedReward
    from ..scripts.utils import load_functions

    prompts = [item.prompt for item in items]
    scorers = load_scorers(load_functions(args.reward_model), args.reward_model_init_kwargs, lambda name: policy)
    for scorer in scorers.values():
        if isinstance(scorer, PretrainedReward):
            scorer.check_prompts(prompts)
    files = SampleFiles([Path(args.samples_dir) / item.file for item in items])
    scores = score_samples(scorers, files, prompts, policy.transformer.device)
    column = next((name for name in ("category", "tag") if name in rows.column_names), None)
    categories = {} if column is None else dict(zip(rows["prompt"], rows[column], strict=True))
    found = {}
    for name, values in scores.items():
        found[name] = {"all": summarize(values)}
        for category in dict.fromkeys(categories.values()):
            members = [row for row, prompt in enumerate(prompts) if categories[prompt] == category]
            found[name][category] = summarize(values[members])
    return found
