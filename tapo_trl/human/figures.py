# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Figures of a study. They need matplotlib."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..metrics.plots import check_matplotlib


COLORS = {"wins": "tab:blue", "ties": "lightgray", "losses": "tab:orange"}


def plot_wins(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """
    Draw win rates as stacked bars, a panel per dimension, as in Fig. 9 of the paper, with the interval of the share.

    Args:
        rows (`Sequence[dict]`): `wins` of [`study_report`].
        path (`str` or `Path`): The PNG file.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    dimensions = list(dict.fromkeys(row["dimension"] for row in rows))
    height = max(sum(row["dimension"] == name for row in rows) for name in dimensions)
    figure = Figure(figsize=(4.6 * len(dimensions), 1.5 + 0.55 * height), layout="constrained", dpi=120)
    for axes, dimension in zip(figure.subplots(1, len(dimensions), squeeze=False)[0], dimensions, strict=True):
        own = [row for row in rows if row["dimension"] == dimension][::-1]
        for place, row in enumerate(own):
            total, left = row["wins"] + row["ties"] + row["losses"], 0.0
            for kind, color in COLORS.items():
                width = row[kind] / total
                axes.barh(place, width, left=left, color=color, label=kind if place == 0 else None)
                if width > 0.07:
                    axes.text(left + width / 2, place, f"{width:.0%}", ha="center", va="center", fontsize=8)
                left += width
            axes.plot([row["low"], row["high"]], [place - 0.33] * 2, color="black", linewidth=1.5)
            axes.plot(row["share"], place - 0.33, "o", color="black", markersize=3)
        axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(own)), [f"{row['first']}\nvs {row['second']}" for row in own], fontsize=8)
        axes.set_xlim(0, 1)
        axes.set_title(dimension.replace("_", " "), fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path)


def plot_elements(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """
    Draw how often each value of each meta element is in the prompts, as in Fig. 8 of the paper.

    Args:
        rows (`Sequence[dict]`): Rows of `prompts.jsonl`.
        path (`str` or `Path`): The PNG file.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    counts: dict[str, Counter] = {}
    for row in rows:
        for element, value in row.get("meta", {}).items():
            counts.setdefault(element, Counter())[value] += 1
    if not counts:
        raise ValueError("The prompts have no meta elements to draw.")
    columns = min(4, len(counts))
    lines = -(-len(counts) // columns)
    longest = max(len(counter) for counter in counts.values())
    figure = Figure(figsize=(4 * columns, lines * (0.8 + 0.24 * longest)), layout="constrained", dpi=110)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (element, counter) in zip(panels, counts.items(), strict=False):
        values = counter.most_common()[::-1]
        axes.barh([value for value, _ in values], [number for _, number in values], color="tab:blue")
        axes.set_title(element.replace("_", " "), fontsize=10)
        axes.tick_params(labelsize=8)
    for axes in panels[len(counts) :]:
        axes.axis("off")
    figure.savefig(path)
