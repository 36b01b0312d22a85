# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What an experiment found, as Markdown, JSON and a picture."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from tapo_trl.metrics.plots import TITLE_WIDTH, check_matplotlib

from .statistics import Estimate


if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

BAR_HEIGHT = 0.35  # inches
MAX_CURVES_BESIDE_LEGEND = 4  # in one panel; the legend of more stands outside


@dataclass
class Report:
    """
    Args:
        title (`str`): headline.
        method (`str`): how it was made, in a few sentences.
        header (`list[str]`): columns of the table.
        rows (`list[list]`): its rows: texts, numbers, [`Estimate`].
        claims (`list[str]`): what the paper claims and whether it holds here, a line each.
        panels (`list[Callable[[Axes], None]]`): draw the panels of the picture.
        data (`dict[str, Any]`): what else the JSON file holds.
    """

    title: str
    method: str
    header: list[str]
    rows: list[list[Any]]
    claims: list[str] = field(default_factory=list)
    panels: list[Callable[["Axes"], None]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def markdown(self, command: str) -> str:
        lines = [f"# {self.title}", "", self.method, "", f"Command: `{command}`", ""]
        lines += ["| " + " | ".join(self.header) + " |", "|---" * len(self.header) + "|"]
        lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in self.rows]
        if self.claims:
            lines += ["", "## Claims", "", *(f"- {claim}" for claim in self.claims)]
        return "\n".join([*lines, ""])

    def write(self, folder: Path, name: str, command: str) -> None:
        """Write `NAME.md`, `NAME.json` and `NAME.png`, if there is anything to draw."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(self.markdown(command), encoding="utf-8")
        content = {"title": self.title, "command": command, "header": self.header, "rows": self.rows}
        content |= {"claims": self.claims, **self.data}
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1, default=asdict) + "\n", encoding="utf-8")
        if self.panels:
            self._draw(folder / f"{name}.png")

    def _draw(self, path: Path) -> None:
        check_matplotlib()
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5 * len(self.panels), 4), layout="constrained", dpi=110)
        for axes, draw in zip(figure.subplots(1, len(self.panels), squeeze=False)[0], self.panels, strict=True):
            draw(axes)
        figure.savefig(path)


def write_index(folder: Path, names: Iterable[str]) -> None:
    """
    Write `README.md`, which has the claims of all reports in a folder.

    Args:
        folder (`Path`): where reports were written.
        names (`Iterable[str]`): the reports, in order; those that are missing are left out.
    """
    lines = ["# Claims, measured here", ""]
    lines += ["Written by `tapo-trl reproduce`, see [Reproducing the paper](../../../docs/reproduction.md).", ""]
    for name in names:
        file = folder / f"{name}.json"
        if file.is_file():
            report = json.loads(file.read_text(encoding="utf-8"))
            lines += [f"## [{report['title']}]({name}.md)", "", *(f"- {claim}" for claim in report["claims"]), ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value)


def bars(title: str, values: dict[str, Estimate], start: float | None = None) -> Callable[["Axes"], None]:
    """A panel of horizontal bars with intervals, and a line at `start`."""

    def draw(axes: "Axes") -> None:
        names = list(values)
        axes.barh(
            names,
            [value.mean for value in values.values()],
            xerr=[value.half_width or 0 for value in values.values()],
            color="tab:blue",
            alpha=0.7,
            capsize=3,
        )
        if start is not None:
            axes.axvline(start, color="black", linestyle=":", linewidth=1)
        axes.invert_yaxis()
        axes.set_title(fill(title, TITLE_WIDTH))
        axes.tick_params(labelsize="small")
        axes.figure.set_figheight(max(axes.figure.get_figheight(), BAR_HEIGHT * len(names)))
        _make_room(axes, *axes.get_yticklabels())

    return draw


def lines(
    title: str, x: str, curves: dict[str, dict[float, Estimate]], log_x: bool = False, chance: float | None = None
) -> Callable[["Axes"], None]:
    """A panel of curves with intervals."""

    def draw(axes: "Axes") -> None:
        for name, curve in curves.items():
            axes.errorbar(
                list(curve),
                [value.mean for value in curve.values()],
                yerr=[value.half_width or 0 for value in curve.values()],
                marker="o",
                capsize=3,
                label=name,
            )
        if log_x:
            axes.set_xscale("log")
        if chance is not None:
            axes.axhline(chance, color="black", linestyle=":", linewidth=1)
        axes.set(title=fill(title, TITLE_WIDTH), xlabel=x)
        if len(curves) <= MAX_CURVES_BESIDE_LEGEND:
            axes.legend(fontsize="small")
            return
        _make_room(axes, axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1)))

    return draw


def _make_room(axes: "Axes", *beside: "Artist") -> None:
    """Widen the picture by what stands beside a panel."""
    figure = axes.figure
    width = max(artist.get_window_extent().width for artist in beside)
    figure.set_figwidth(figure.get_figwidth() + width / figure.dpi)


def grid(title: str, rows: list, columns: list, values: list[list[float]], x: str, y: str) -> Callable[["Axes"], None]:
    """A panel of a table of numbers, coloured."""

    def draw(axes: "Axes") -> None:
        axes.imshow(values, cmap="viridis", aspect="auto")
        middle = (min(map(min, values)) + max(map(max, values))) / 2
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                color = "white" if value < middle else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize="small")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.set(title=fill(title, TITLE_WIDTH), xlabel=x, ylabel=y)

    return draw
