# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from typing import Any

from .parser import RecipeParser


def make_parser() -> RecipeParser:
    """Parser of `tapo-trl diagnose`."""
    from ..trainer.model_config import PipelineConfig
    from .arguments import DiagnoseArguments

    return RecipeParser((DiagnoseArguments, PipelineConfig), prog="tapo-trl diagnose")


def diagnose_reward_model(args, model_args) -> dict[str, dict]:
    """
    Scores pairs with a latent reward model at every noise level.

    Args:
        args ([`DiagnoseArguments`]): The reward model and the pairs.
        model_args ([`PipelineConfig`]): The pipeline; by default the one that the reward model was trained from.

    Returns:
        `dict[str, dict]`: By rule, see [`~metrics.diagnosis.diagnose_scores`].
    """
    from ..metrics import diagnose_scores, score_pairs
    from .evaluate import load_reward_model_and_pairs

    scores = score_pairs(
        *load_reward_model_and_pairs(args, model_args),
        sigmas=sorted(args.sigmas),
        rules=args.rules,
        fps=args.fps,
        short_videos=args.short_videos,
        dimension_weights=args.dimension_weights,
        skip_bad_files=args.skip_bad_files,
        batch_size=args.batch_size,
        seed=args.seed,
        cache_dir=args.cache_dir,
        show_progress=True,
    )
    return diagnose_scores(scores, args.tie_threshold)


def read_run(folder: str, judge: str) -> dict[str, Any]:
    """
    Reads the curves of a training from its logs.

    Args:
        folder (`str`): Output folder of the training.
        judge (`str`): Name of the judge in the logs.

    Returns:
        `dict[str, Any]`: `reward_curve`, a list of `{"step", "training", "held_out"}`, and `gradient_share`,
            `{step: {optimizer step: share}}`; either may be empty, but not both.
    """
    from dataclasses import asdict

    from ..callbacks.gradient_share import gradient_share_curves
    from ..callbacks.reward_curve import read_log_history, reward_curve

    logs = read_log_history(folder)
    checks, shares = reward_curve(logs, judge), gradient_share_curves(logs)
    if not checks and not shares:
        names = sorted({name for entry in logs for name in entry if "reward" in name})
        raise ValueError(
            f"`runs`: the logs in {folder} have neither `{judge}` nor shares of the gradient. Train with `guard_reward` or a "
            f"`GradientShareCallback`, or set `judge` to one of {names}."
        )
    return {"reward_curve": [asdict(check) for check in checks], "gradient_share": shares}


def format_rewards(rewards: dict[str, dict]) -> str:
    """Table of what [`diagnose_reward_model`] returns."""
    lines = []
    for rule, parts in rewards.items():
        accuracy, consistency, distributions = parts["accuracy"], parts["consistency"], parts["distributions"]
        rows = {
            "accuracy, without ties": accuracy["by_sigma"],
            "AUC, across prompts": {sigma: values["auc"] for sigma, values in distributions.items()},
            "flips from the next cleaner level": consistency["flips_from_next_cleaner"],
            "flips from the cleanest level": consistency["flips_from_cleanest"],
        }
        lines.append(f"{rule + ', sigma':<34}" + "".join(f"{sigma:>7.3g}" for sigma in distributions))
        for name, values in rows.items():
            cells = (f"{values[sigma]:>7.2f}" if sigma in values else f"{'':>7}" for sigma in distributions)
            lines.append(f"{name:<34}" + "".join(cells))
        ranges = {"all": accuracy} | {f"t = {name}": values for name, values in accuracy["by_range"].items()}
        for name, values in ranges.items():
            lines.append(
                f"{name:<14} accuracy {values['accuracy']:.3f} without ties, {values['accuracy_with_ties']:.3f} with ties"
            )
        lines += [
            f"a predicted tie is a difference of at most {accuracy['tie_threshold']:.3g}",
            f"{consistency['flips_per_pair']:.2f} flips per pair; {consistency['never_flips']:.0%} of the pairs never flip",
            "",
        ]
    return "\n".join(lines)


def format_run(name: str, checks: list[dict[str, float]]) -> str:
    """One line about the `reward_curve` of [`read_run`]."""
    if not checks:
        return f"{name}: no judge in the logs"
    best, last = max(checks, key=lambda check: check["held_out"]), checks[-1]
    parts = [
        f"at step {check['step']} {when} judge {check['held_out']:.4g}"
        + ("" if check["training"] is None else f", training reward {check['training']:.4g}")
        for check, when in ((best, "(the best)"), (last, "(the last)"))
    ]
    return f"{name}: {'; '.join(parts)}"


def draw_both_branches(args, model_args, file) -> None:
    """
    Draws the winning and the losing trajectory of prompts step by step.

    Args:
        args ([`DiagnoseArguments`]): The prompts, the reward model and the rollout.
        model_args ([`PipelineConfig`]): The pipeline; by default the one that the reward model was trained from.
        file (`Path`): Where to write the picture.
    """
    from accelerate import PartialState

    from ..data.loading import read_prompts_and_columns
    from ..evaluation.trajectories import draw_trajectories, sample_trajectories
    from ..policies import load_policy
    from ..rewards import LatentReward, LatentRewardModel, load_reward_model

    prompts, _ = read_prompts_and_columns(args.trajectories, "trajectories")
    device = PartialState().device
    model = load_reward_model(args.slrm).to(device)
    if not isinstance(model, LatentRewardModel):
        raise ValueError(f"`trajectories` is for latent reward models, but `{args.slrm}` holds a {model.label}.")
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if name is None:
        name, revision = model.config.base_model_name_or_path, model.config.base_revision
    policy = load_policy(name, torch_dtype=model_args.dtype, revision=revision)
    target = model.rollout_target(None)
    if args.lora is not None:
        if target == "reference":
            raise ValueError(
                "`lora`: the SLRM's target is the velocity of the base, which `trajectories` does not have beside a LoRA: leave `lora` "
                "unset."
            )
        policy.load_lora_weights(args.lora)
    policy.pipeline.to(device)
    model.check_compatible(policy)
    config = model.config
    steps = sample_trajectories(
        policy,
        LatentReward(model, target, args.batch_size),
        prompts,
        policy.latent_shape(config.height or config.resolution, config.width or config.resolution, config.num_frames),
        num_inference_steps=args.num_inference_steps,
        num_sde_steps=args.num_sde_steps,
        num_candidates=args.num_candidates,
        guidance_scale=args.guidance_scale,
        max_sequence_length=config.max_sequence_length,
        seed=args.seed,
    )
    draw_trajectories(steps, prompts).save(file)


def main(args, model_args) -> None:
    """
    Writes `diagnosis.json` and `diagnosis.png` and prints a table.

    Args:
        args ([`DiagnoseArguments`]): What to look at.
        model_args ([`PipelineConfig`]): The pipeline.
    """
    import json
    from pathlib import Path

    from ..metrics.plots import check_matplotlib, plot_diagnosis

    check_matplotlib()
    diagnosis = {}
    if args.runs is not None:
        diagnosis["runs"] = {folder: read_run(folder, args.judge) for folder in args.runs}
    if args.slrm is not None and args.reads_pairs:
        diagnosis["rewards"] = diagnose_reward_model(args, model_args)
        print(format_rewards(diagnosis["rewards"]))
    for name, run in diagnosis.get("runs", {}).items():
        print(format_run(name, run["reward_curve"]))
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if args.trajectories is not None:
        draw_both_branches(args, model_args, folder / "trajectories.png")
        print(f"Written: {folder / 'trajectories.png'}")
        if not diagnosis:
            return
    (folder / "diagnosis.json").write_text(json.dumps(diagnosis, indent=2) + "\n", encoding="utf-8")
    plot_diagnosis(diagnosis, folder / "diagnosis.png")
    print(f"Written: {folder / 'diagnosis.json'}, {folder / 'diagnosis.png'}")
