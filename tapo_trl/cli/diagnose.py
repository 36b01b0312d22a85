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
    if args.slrm is not None:
        diagnosis["rewards"] = diagnose_reward_model(args, model_args)
        print(format_rewards(diagnosis["rewards"]))
    for name, run in diagnosis.get("runs", {}).items():
        print(format_run(name, run["reward_curve"]))
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "diagnosis.json").write_text(json.dumps(diagnosis, indent=2) + "\n", encoding="utf-8")
    plot_diagnosis(diagnosis, folder / "diagnosis.png")
    print(f"Written: {folder / 'diagnosis.json'}, {folder / 'diagnosis.png'}")
