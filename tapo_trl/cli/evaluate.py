# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from .parser import RecipeParser


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


def measure_accuracy(args, model_args) -> dict[str, dict[float, float]]:
    """
    Accuracy of a latent reward model on held-out pairs: share of the pairs whose preferred side has the higher score.

    Args:
        args ([`EvaluateArguments`]): The reward model and the pairs.
        model_args ([`PipelineConfig`]): The pipeline; by default the one that the reward model was trained from.

    Returns:
        `dict[str, dict[float, float]]`: `{rule: {sigma: accuracy}}`.
    """
    from ..metrics import evaluate_preference_accuracy

    return evaluate_preference_accuracy(
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


def measure_rewards(args, model_args) -> dict[str, float]:
    """
    Mean rewards of a model's samples.

    Args:
        args ([`EvaluateArguments`]): The rewards, the prompts and how to sample.
        model_args ([`PipelineConfig`]): The pipeline.

    Returns:
        `dict[str, float]`: `{reward: mean}`.
    """
    from ..data.loading import read_prompts
    from ..rewards.scoring import call_reward_function, check_reward_function
    from ..scripts.utils import load_function
    from .sample import draw, load_sampling_policy

    rewards = {spec: load_function(spec, "reward_model") for spec in args.reward_model}
    for reward in rewards.values():
        check_reward_function(reward)
    prompts = read_prompts(args.prompts, "prompts")
    samples = draw(load_sampling_policy(model_args, args), prompts, args)
    return {
        spec: call_reward_function(reward, samples.clone(), prompts, noun="sample").mean().item()
        for spec, reward in rewards.items()
    }


def main(args, model_args) -> None:
    """
    Measures, prints and (with `output_file`) writes the result as JSON: `slrm_accuracy` = `{rule: {sigma: accuracy}}`
    and `rewards` = `{reward: mean}`, whichever were asked for.

    Args:
        args ([`EvaluateArguments`]): What to measure.
        model_args ([`PipelineConfig`]): The pipeline.
    """
    import json
    from pathlib import Path

    result = {}
    if args.slrm is not None:
        result["slrm_accuracy"] = measure_accuracy(args, model_args)
    if args.reward_model is not None:
        result["rewards"] = measure_rewards(args, model_args)
    text = json.dumps(result, indent=2)
    print(text)
    if args.output_file is not None:
        path = Path(args.output_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
