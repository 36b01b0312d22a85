# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Pictures of a diagnosis. matplotlib is needed for these alone."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 4.5, 3.4  # of one panel, inches
TITLE_WIDTH = 40  # letters
CHOSEN, REJECTED, TRAINING, JUDGE = "tab:blue", "tab:orange", "tab:gray", "tab:red"


def check_matplotlib() -> None:
    """
    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("Plots need matplotlib, which is not installed: `pip install matplotlib`.") from error


def plot_diagnosis(diagnosis: dict[str, dict], path: str | Path) -> None:
    """
    Draw a diagnosis as a PNG file: a row of panels for each rule of a reward model, and one for each run.

    Args:
        diagnosis (`dict[str, dict]`): `rewards`, what [`~metrics.diagnosis.diagnose_scores`] returns, and `runs`, by name,
            `{"reward_curve": [{"step", "training", "held_out"}], "gradient_share": {step: {optimizer step: share}}}`;
            either can be left out.
        path (`str` or `Path`): the file.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is nothing to draw.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    rows = [_reward_panels(rule, parts) for rule, parts in diagnosis.get("rewards", {}).items()]
    rows += [_run_panels(Path(name).name, parts) for name, parts in diagnosis.get("runs", {}).items()]
    rows = [row for row in rows if row]
    if not rows:
        raise ValueError("`diagnosis` has nothing to draw: neither `rewards` nor `runs` with a curve.")
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * len(rows)), layout="constrained", dpi=120)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, panels in zip(axes, rows, strict=True):
        for place, draw in zip(row, panels, strict=False):
            draw(place)
        for place in row[len(panels) :]:
            place.set_axis_off()
    figure.savefig(path)


def _reward_panels(rule: str, parts: dict[str, Any]) -> list[Callable[["Axes"], None]]:
    return [
        partial(_draw_accuracy, rule, parts["accuracy"], parts["distributions"]),
        partial(_draw_flips, rule, parts["consistency"]),
        partial(draw_distributions, rule, parts["distributions"]),
    ]


def _run_panels(name: str, parts: dict[str, Any]) -> list[Callable[["Axes"], None]]:
    panels = []
    if parts["reward_curve"]:
        panels.append(partial(_draw_rewards, name, parts["reward_curve"]))
    if parts["gradient_share"]:
        panels.append(partial(_draw_gradient_shares, name, parts["gradient_share"]))
    return panels


def _draw_accuracy(rule: str, accuracy: dict[str, Any], distributions: dict[float, Any], axes: "Axes") -> None:
    axes.plot(*_points(accuracy["by_sigma"]), "o-", color=CHOSEN, label="accuracy")
    auc = {sigma: values["auc"] for sigma, values in distributions.items()}
    axes.plot(*_points(auc), "s--", color=TRAINING, label="AUC, across prompts")
    _chance(axes)
    _finish(axes, f"{rule}: accuracy", "share of pairs", (0, 1.03))


def _draw_flips(rule: str, consistency: dict[str, Any], axes: "Axes") -> None:
    axes.plot(
        *_points(consistency["flips_from_next_cleaner"]), "o-", color=CHOSEN, label="from the next cleaner level"
    )
    axes.plot(*_points(consistency["flips_from_cleanest"]), "s--", color=JUDGE, label="from the cleanest level")
    _chance(axes)
    title = f"{rule}: rankings that flip (never: {consistency['never_flips']:.0%})"
    _finish(axes, title, "share of pairs", (-0.03, 1))


def draw_distributions(rule: str, distributions: dict[float, Any], axes: "Axes") -> None:
    for side, color in (("chosen", CHOSEN), ("rejected", REJECTED)):
        sigmas = sorted(distributions)
        quantiles = [sorted(distributions[sigma][side]["quantiles"].items()) for sigma in sigmas]
        low, lower, median, upper, high = zip(*[[value for _, value in row] for row in quantiles], strict=True)
        axes.fill_between(sigmas, low, high, color=color, alpha=0.15, linewidth=0)
        axes.fill_between(sigmas, lower, upper, color=color, alpha=0.3, linewidth=0)
        axes.plot(sigmas, median, "o-", color=color, label=side)
    _finish(axes, f"{rule}: scores (5, 25, 50, 75, 95 %)", "score")


def _draw_rewards(name: str, checks: list[dict[str, float]], axes: "Axes") -> None:
    trained = [check for check in checks if check["training"] is not None]
    twin = axes.twinx()
    lines = axes.plot(
        [check["step"] for check in checks],
        [check["held_out"] for check in checks],
        "o-",
        color=JUDGE,
        label="judge (left)",
    )
    lines += twin.plot(
        [check["step"] for check in trained],
        [check["training"] for check in trained],
        "s--",
        color=TRAINING,
        label="training reward (right)",
    )
    axes.legend(handles=lines, fontsize="small")
    axes.set(title=f"{name}: reward against judge", xlabel="optimizer step", ylabel="judge")
    twin.set_ylabel("training reward")


def _draw_gradient_shares(name: str, curves: dict[str, dict[int, float]], axes: "Axes") -> None:
    from matplotlib import colormaps

    for number, (step, shares) in enumerate(sorted(curves.items())):
        axes.plot(*_points(shares), ".-", color=colormaps["viridis"](0.9 * number / len(curves)), label=step)
    axes.axhline(1 / len(curves), color="black", linestyle=":", linewidth=1)
    axes.set(title=f"{name}: share of the gradient", xlabel="optimizer step", ylabel="share of the norms")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def _points(curve: dict[float, float]) -> tuple[list[float], list[float]]:
    return sorted(curve), [curve[position] for position in sorted(curve)]


def _chance(axes: "Axes") -> None:
    axes.axhline(0.5, color="black", linestyle=":", linewidth=1)


def _finish(axes: "Axes", title: str, y: str, y_range: tuple[float, float] | None = None) -> None:
    axes.set(title=fill(title, TITLE_WIDTH), xlabel="noise level $\\sigma$", ylabel=y)
    if y_range is not None:
        axes.set_ylim(y_range)
    axes.legend(fontsize="small")
