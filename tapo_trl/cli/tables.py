# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Tables of the command line."""

from typing import Any


def format_table(rows: list[dict[str, str]]) -> str:
    """Rows as text in columns, under their names."""
    rows = [{name: name for name in rows[0]}, *rows]
    widths = {name: max(len(row[name]) for row in rows) for name in rows[0]}
    return "\n".join("  ".join(row[name].ljust(width) for name, width in widths.items()).rstrip() for row in rows)


def format_mean(summary: dict[str, Any]) -> str:
    """Mean and standard error of [`~evaluation.scores.summarize`], to the digit that the error allows."""
    mean, error = summary["mean"], summary["standard_error"]
    return f"{mean:.4g}" if error is None else f"{mean:.4g} \u00b1 {error:.2g}"
