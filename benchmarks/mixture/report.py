# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
Tables and learning curves of the trainings in `runs.jsonl`.

    python -m benchmarks.mixture.report

Writes `report.md` and `curves.png`, and prints the tables.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tapo_trl.metrics.plots import check_matplotlib

from ..reproduction.statistics import compare, estimate
from .seconds import FILE, finished, read_seconds
from .study import BUDGET, HERE, METHODS, best, end, read_runs, tried


TRUTH = ", true reward"
DISTANCES = (0.03, 0.1, 0.3)
PLOTTED = (
    "TAPO",
    "TAPO, one-step estimates",
    "TAPO, n = 2, P = 4, one-step estimates",
    "SPO's pairs",
    "online DPO",
    "Diffusion-DPO",
    "Flow-GRPO",
    "DiffusionNFT",
)
"""Methods with a learning curve, of the SLRM and of the true reward."""
COMPARED = (
    "TAPO",
    "TAPO, n = 2, P = 8, one-step estimates",
    "TAPO, n = 2, P = 4, one-step estimates",
    "TAPO, true reward",
)
"""Methods that are compared with all others that learn from the same."""
COLUMNS = ("reward", "style", "accuracy", "excess", "slrm", "distance", "diversity")


def rows_of(name: str) -> list[dict[str, Any]]:
    """The final trainings of a method, one per seed."""
    chosen = best(name)
    rows = [
        row
        for row in read_runs().values()
        if row["key"].endswith("test")
        and (row["method"], row["beta"], row["learning_rate"]) == (name, chosen.beta, chosen.learning_rate)
    ]
    return sorted((row for row in rows if row["curve"]), key=lambda row: row["seed"])


def at(row: dict[str, Any], x: str, value: float, y: str = "reward") -> float:
    """`y` of a learning curve where `x` first reaches `value`, by straight lines between its points."""
    xs, ys = ([point[name] for point in row["curve"]] for name in (x, y))
    return float(np.interp(value, np.maximum.accumulate(xs), ys))


def claim(name: str, other: str, rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> str:
    """Whether a method has more true reward at the end than another, by the seeds that both have."""
    common = {row["seed"] for row in rows} & {row["seed"] for row in others}
    first, second = (estimate([end(row) for row in both if row["seed"] in common]) for both in (rows, others))
    return f"- {name} above {other} ({len(common)} seeds): {compare(first, second)}"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def searched(name: str) -> str:
    """All trials of a method: the true reward at the end."""
    ends: dict[str, list[str]] = {}
    for run, row in tried(name):
        ends.setdefault(f"{run.beta:g} / {run.learning_rate:g}", []).append(f"{end(row):.2f}")
    return ", ".join(f"{options}: {' and '.join(values)}" for options, values in ends.items())


def write_report(names: Sequence[str], file: Path) -> str:
    """The tables of the methods that have final trainings."""
    final = {name: rows_of(name) for name in names}
    seconds = {name: value for name, value in read_seconds(FILE).items() if name in final}  # per 1,000 rows
    equal_seconds = min(seconds.values(), default=0) * BUDGET / 1000
    first = next(iter(final.values()))[0]["curve"][0]
    main_rows, equal = [["base", "", "", "", *(f"{first[column]:.2f}" for column in COLUMNS)]], []
    for name, rows in final.items():
        last = {column: estimate([row["curve"][-1][column] for row in rows]) for column in COLUMNS}
        chosen = best(name)
        cells = [f"{value.mean:.2f} ± {value.half_width or 0:.2f}" for value in last.values()]
        options = f"{chosen.beta:g} / {chosen.learning_rate:g}"
        main_rows.append([name, options, len(rows), rows[0]["curve"][-1]["step"], *cells])
        by_seconds = ["not measured"] * 2
        if name in seconds:
            num_rows = 1000 * equal_seconds / seconds[name]
            by_seconds = [f"{seconds[name]:.3f}", estimate([at(row, "forwards", num_rows) for row in rows])]
        peak = estimate([max(point["reward"] for point in row["curve"]) for row in rows])
        by_distance = []
        for distance in DISTANCES:
            reached = [row for row in rows if max(point["distance"] for point in row["curve"]) >= distance]
            values = [at(row, "distance", distance) for row in reached]
            by_distance.append(f"{estimate(values)} ({len(values)})" if values else "not reached")
        equal.append([name, *by_seconds, peak, *by_distance])
    claims = [
        claim(first, name, final[first], rows)
        for first in COMPARED
        for name, rows in final.items()
        if first in final
        and name != first
        and (METHODS[name].learns_from == "truth") == (METHODS[first].learns_from == "truth")
    ]
    text = "\n\n".join(
        [
            f"At {BUDGET:,} rows through the policy's network, mean and 95 % interval of the seeds.",
            table(["method", "beta / learning rate", "seeds", "updates", *COLUMNS], main_rows),
            "Processor seconds per 1,000 rows (median of rounds over all methods), and the true reward at equal seconds: those that the "
            f"cheapest method takes for {BUDGET:,} rows, {equal_seconds:.1f} s. Then at the best point of each curve, and where the distance "
            "from the base first reaches a value (with the number of seeds that reach it):",
            table(["method", "seconds", "equal seconds", "best point", *(f"distance {d}" for d in DISTANCES)], equal),
            "\n".join(claims),
            "All trials, true reward at the end on the noise of `validation`, of the first seed or three (beta / learning rate):",
            table(["method", "trials"], [[name, searched(name)] for name in names]),
        ]
    )
    file.write_text(text + "\n", encoding="utf-8")
    return text


def plot(names: Sequence[str], file: Path) -> None:
    """Learning curves: mean and 95 % interval of the seeds. Dashed lines learn from the true reward."""
    check_matplotlib()
    from matplotlib.figure import Figure

    colors = {
        name: f"C{index}" for index, name in enumerate(dict.fromkeys(name.removesuffix(TRUTH) for name in names))
    }
    figure = Figure(figsize=(15, 8), layout="constrained")
    panels = [("forwards", name) for name in ("reward", "slrm", "excess", "distance", "diversity")] + [
        ("distance", "reward")
    ]
    for axes, (x, y) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        for name in names:
            rows = rows_of(name)
            xs = np.mean([[point[x] for point in row["curve"]] for row in rows], axis=0)
            ys = np.array([[point[y] for point in row["curve"]] for row in rows])
            color = colors[name.removesuffix(TRUTH)]
            axes.plot(xs, ys.mean(0), "--" if METHODS[name].learns_from == "truth" else "-", label=name, color=color)
            if len(rows) > 1 and x == "forwards":
                half = [estimate(column).half_width for column in ys.T]
                axes.fill_between(xs, ys.mean(0) - half, ys.mean(0) + half, alpha=0.2, color=color, linewidth=0)
        axes.set(
            xlabel={"forwards": "rows through the policy"}.get(x, x), ylabel="true reward" if y == "reward" else y
        )
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    figure.savefig(file, dpi=60)


def main() -> None:
    if not (names := finished()):
        raise SystemExit("There are no final trainings: `python -m benchmarks.mixture.study seeds`.")
    print(write_report(names, HERE / "report.md"))
    plot([name for name in names if name.removesuffix(TRUTH) in PLOTTED], HERE / "curves.png")


if __name__ == "__main__":
    main()
