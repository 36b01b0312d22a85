# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json
import sys
from pathlib import Path

from .parser import RecipeParser
from .tables import format_mean, format_table


SHOWN = 8  # samples of each model in the overview


def make_parser() -> RecipeParser:
    """Parser of `tapo-trl evaluate`."""
    from ..trainer.model_config import PipelineConfig
    from .arguments import EvaluateArguments

    return RecipeParser((EvaluateArguments, PipelineConfig), prog="tapo-trl evaluate")


def load_reward_model_and_pairs(args, model_args) -> tuple:
    """
    Loads a latent reward model, its base and held-out pairs.

    Args:
        args ([`ScoredPairsArguments`]): The reward model and the pairs.
        model_args ([`PipelineConfig`]): The pipeline; by default the one that the reward model was trained from.

    Returns:
        `tuple[LatentRewardModel, FlowPolicy, Dataset]`: The first two on the accelerator.
    """
    from accelerate import PartialState

    from ..data.loading import load_preference_pairs
    from ..policies import load_policy
    from ..rewards import load_reward_model

    pairs = load_preference_pairs(args, args.dataset_test_split)
    if args.max_pairs is not None:
        pairs = pairs.select(range(min(args.max_pairs, len(pairs))))
    device = PartialState().device
    slrm = load_reward_model(args.slrm).to(device)
    policy = load_policy(
        model_args.model_name_or_path or slrm.config.base_model_name_or_path,
        torch_dtype=model_args.dtype,
        revision=model_args.model_revision,
    )
    policy.pipeline.to(device)
    return slrm, policy, pairs


def measure_accuracy(args, model_args) -> dict[str, dict]:
    """
    Accuracy of a latent reward model on held-out pairs: share of the pairs whose preferred side has the higher score.

    Args:
        args ([`EvaluateArguments`]): The reward model and the pairs.
        model_args ([`PipelineConfig`]): The pipeline; by default the one that the reward model was trained from.

    Returns:
        `dict[str, dict]`: `slrm_accuracy` and, with `tie_threshold`, `slrm_accuracy_with_ties`, both `{rule: {sigma: accuracy}}`.
    """
    from ..metrics import score_pairs

    scores = score_pairs(
        *load_reward_model_and_pairs(args, model_args),
        sigmas=args.sigmas,
        rules=args.rules,
        resolution=args.resolution,
        height=args.height,
        width=args.width,
        num_frames=args.num_frames,
        fps=args.fps,
        short_videos=args.short_videos,
        dimension_weights=args.dimension_weights,
        skip_bad_files=args.skip_bad_files,
        batch_size=args.batch_size,
        seed=args.seed,
        cache_dir=args.cache_dir,
    )
    return {f"slrm_{name}": values for name, values in accuracies_of(scores, args).items()}


def accuracies_of(scores, args) -> dict[str, dict]:
    """
    What is reported of the scores of pairs.

    Args:
        scores ([`PairScores`]): The scores.
        args ([`EvaluateArguments`]): How ties are counted.
    """
    from ..metrics import accuracy_by_level, accuracy_with_ties_by_level

    found = {"accuracy": accuracy_by_level(scores, args.zero_margin)}
    if args.tie_threshold is not None:
        found["accuracy_with_ties"] = accuracy_with_ties_by_level(scores, args.tie_threshold)
    return found


def measure_reward_accuracy(args, model_args) -> dict[str, dict]:
    """
    Accuracy on held-out pairs of rewards that read pixels: those of one-step estimates, and of noisy latents (Table 2).

    Args:
        args ([`EvaluateArguments`]): The rewards and the pairs.
        model_args ([`PipelineConfig`]): The pipeline, which adds noise, predicts and decodes.

    Returns:
        `dict[str, dict]`: `reward_accuracy` and, with `tie_threshold`, `reward_accuracy_with_ties`, both
            `{reward: {"estimate" or "noisy": {sigma: accuracy}}}`.
    """
    from ..data.loading import load_preference_pairs
    from ..evaluation.scores import LatentScorer, check_scorers, load_scorers
    from ..metrics import score_pairs_of_pixels
    from ..rewards import PretrainedReward
    from ..scripts.utils import load_functions
    from .sample import load_sampling_policy, sample_size

    pairs = load_preference_pairs(args, args.dataset_test_split)
    if args.max_pairs is not None:
        pairs = pairs.select(range(min(args.max_pairs, len(pairs))))
    policy = load_sampling_policy(model_args, args)
    scorers = load_scorers(load_functions(args.reward_model), args.reward_model_init_kwargs, lambda name: policy)
    check_scorers(scorers, pairs["prompt"], policy)
    height, width, num_frames = sample_size(policy, args)
    options = {
        name: getattr(args, name)
        for name in ("fps", "short_videos", "dimension_weights", "skip_bad_files", "batch_size", "seed", "cache_dir")
    }
    options |= {
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "max_sequence_length": args.max_sequence_length,
    }
    accuracies: dict[str, dict] = {}
    for name, scorer in scorers.items():
        scores = score_pairs_of_pixels(scorer, policy, pairs, args.sigmas, **options)
        for key, values in accuracies_of(scores, args).items():
            accuracies.setdefault(f"reward_{key}", {})[name] = values
        if isinstance(scorer, (PretrainedReward, LatentScorer)):  # the next one takes its place on the accelerator
            scorer.to("cpu")
    return accuracies


def measure_rewards(args, model_args) -> dict[str, dict]:
    """
    Rewards of a model's samples and, with a LoRA, of its base's on the same seeds, and of baselines.

    Args:
        args ([`EvaluateArguments`]): The rewards, the prompts and how to sample.
        model_args ([`PipelineConfig`]): The pipeline.

    Returns:
        `dict[str, dict]`: For each reward [`~evaluation.scores.summarize`] of the model's samples, or
            [`~evaluation.scores.compare`] of both; and `baselines`, if there are any, by their names.
    """
    from ..data.loading import read_prompts_and_columns
    from ..evaluation.scores import check_scorers, compare, load_scorers, score_samples, summarize
    from ..scripts.utils import load_functions
    from .sample import draw, in_place_of, load_baselines, load_sampling_policy

    prompts, columns = read_prompts_and_columns(args.prompts, "prompts")
    rewards = load_functions(args.reward_model)
    policy = load_sampling_policy(model_args, args)
    baselines = load_baselines(policy, model_args, args)
    scorers = load_scorers(rewards, args.reward_model_init_kwargs, load_base=lambda name: policy)
    check_scorers(scorers, prompts, policy, columns)
    samples = {"aligned" if args.lora is not None else "samples": draw(policy, prompts, args)}
    if args.lora is not None and args.compare_base:
        policy.pipeline.disable_lora()
        samples["base"] = draw(policy, prompts, args)
    device = policy.transformer.device
    seeds = range(args.seed, args.seed + len(prompts))
    for baseline in baselines:
        with in_place_of(policy, baseline):
            samples[baseline.name] = baseline.draw(prompts, seeds, args.batch_size, device)
    scores = {name: score_samples(scorers, drawn, prompts, device, columns) for name, drawn in samples.items()}
    if args.samples_dir is not None:
        save_samples(args, prompts, samples, scores)
    found = {}
    for spec in rewards:
        ours = next(iter(scores.values()))[spec]
        found[spec] = compare(scores["base"][spec], ours) if "base" in scores else summarize(ours)
        if baselines:
            found[spec]["baselines"] = {
                baseline.name: summarize(scores[baseline.name][spec]) for baseline in baselines
            }
    return found


def save_samples(args, prompts: list[str], samples: dict, scores: dict) -> None:
    """
    Writes `<model>/000.png` (or `.mp4`), `overview.png` with the first samples of each model side by side, and `scores.json`.

    Args:
        args ([`EvaluateArguments`]): The folder.
        prompts (`list[str]`): The prompts.
        samples (`dict[str, torch.Tensor]`): Samples by model.
        scores (`dict[str, dict[str, torch.Tensor]]`): Their scores, by model and reward.
    """
    import torch

    from ..media.pictures import resize_samples, save_overview
    from .sample import write_samples

    folder = Path(args.samples_dir)
    for name, drawn in samples.items():
        write_samples(drawn, folder / name, args.fps)
    first = [drawn[:SHOWN] for drawn in reversed(samples.values())]  # baselines, and the base before the model
    first = [resize_samples(drawn, first[-1].shape[2:]) for drawn in first]
    save_overview(torch.stack(first, dim=1).flatten(0, 1), folder / "overview", len(first), args.fps)
    values = {name: {spec: part.tolist() for spec, part in of_model.items()} for name, of_model in scores.items()}
    text = json.dumps({"prompts": prompts, "scores": values}, indent=2)
    (folder / "scores.json").write_text(text + "\n", encoding="utf-8")


def format_rewards(statistics: dict[str, dict]) -> str:
    """Table of what [`measure_rewards`] returns."""
    rows = []
    for spec, values in statistics.items():
        others = {name: format_mean(summary) for name, summary in values.get("baselines", {}).items()}
        if "base" not in values:
            rows.append({"reward": spec, **others, "mean": format_mean(values), "n": str(values["n"])})
            continue
        parts = {name: format_mean(values[name]) for name in ("base", "aligned", "difference")}
        ratio = "" if values["ratio"] is None else f"{values['ratio']:.3f}"
        counts = {"win rate": f"{values['win_rate']:.3f}", "ratio": ratio, "n": str(values["base"]["n"])}
        rows.append({"reward": spec, **others, **parts, **counts})
    return format_table(rows)


def main(args, model_args) -> None:
    """
    Measures, prints and (with `output_file`) writes the result as JSON: `slrm_accuracy` = `{rule: {sigma: accuracy}}`,
    `reward_accuracy` = `{reward: {reading: {sigma: accuracy}}}`, both with ties as
    `..._accuracy_with_ties` if there is a `tie_threshold`, `benchmark` (see [`~cli.benchmark.run_benchmark`]),
    and `rewards` = `{reward: mean}` of the model's samples with `reward_statistics`, whichever were asked for. The table of rewards is
    printed on the standard error. Of several processes only the first prints and writes; they share the samples of a benchmark.

    Args:
        args ([`EvaluateArguments`]): What to measure.
        model_args ([`PipelineConfig`]): The pipeline.
    """
    from accelerate import PartialState

    is_first, result = PartialState().is_main_process, {}
    if not is_first and args.benchmark is None:
        return
    if args.slrm is not None:
        result |= measure_accuracy(args, model_args)
    if args.benchmark is not None:
        from .benchmark import run_benchmark

        result["benchmark"] = run_benchmark(args, model_args)
    elif args.reward_model is not None and args.dataset_name is not None and None in (args.prompts, args.slrm):
        result |= measure_reward_accuracy(args, model_args)
    if args.benchmark is None and args.reward_model is not None and args.prompts is not None:
        statistics = measure_rewards(args, model_args)
        print(format_rewards(statistics), file=sys.stderr)
        means = {spec: values.get("aligned", values)["mean"] for spec, values in statistics.items()}
        result |= {"rewards": means, "reward_statistics": statistics}
    if not is_first:
        return
    text = json.dumps(result, indent=2)
    print(text)
    if args.output_file is not None:
        path = Path(args.output_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
