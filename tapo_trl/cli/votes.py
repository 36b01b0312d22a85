# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from typing import Any

from .parser import FolderParser, RecipeParser
from .tables import format_table


def make_parser() -> RecipeParser:
    """Parser of `tapo-trl votes`."""
    from .human_arguments import VotesArguments

    return FolderParser((VotesArguments,), prog="tapo-trl votes")


def _interval(values: dict[str, Any], key: str = "share") -> str:
    return f"{values[key]:.2f} [{values['low']:.2f}, {values['high']:.2f}]" if values[key] == values[key] else "-"


def format_report(report: dict[str, Any]) -> str:
    """
    The statistics of a study as text.

    Args:
        report (`dict`): What [`study_report`] returns.
    """
    skips = ", ".join(f"{number} {reason}" for reason, number in report["skips"].items())
    parts = [
        f"{report['votes']} votes of {report['people']} people on {report['pairs']} pairs"
        + (f"; skipped: {skips}" if skips else ""),
        format_table(
            [
                {
                    "dimension": name,
                    "alpha (ordinal)": _interval(values, "alpha"),
                    "equal answers": f"{values['percent']:.2f}",
                }
                for name, values in report["agreement"].items()
            ]
        ),
        format_table(
            [
                {
                    "person": name,
                    "votes": str(person["votes"]),
                    "fast": str(person["fast"]),
                    "seconds": f"{person['seconds']:.1f}",
                    "ties": _interval(person["ties"]),
                    "left of the others": _interval(person["left"]),
                    "known answers right": _interval(person["gold"]),
                    "same on repeats": _interval(person["same"]),
                }
                for name, person in report["annotators"].items()
            ]
        ),
    ]
    if report["wins"]:
        parts.append(format_table([_win_row(row) for row in report["wins"]]))
    if report["scores"]:
        parts.append(
            format_table(
                [
                    {
                        "dimension": row["dimension"],
                        "source": row["source"],
                        "Bradley-Terry score": f"{row['score']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]",
                    }
                    for row in report["scores"]
                ]
            )
        )
    return "\n\n".join(parts + [f"Warning: {warning}" for warning in report["warnings"]])


def _win_row(row: dict[str, Any]) -> dict[str, str]:
    return {
        "dimension": row["dimension"],
        "first": row["first"],
        "second": row["second"],
        "wins": str(row["wins"]),
        "ties": str(row["ties"]),
        "losses": str(row["losses"]),
        "share of the first": _interval(row),
        "p": f"{row['p']:.2g}",
        "p (Holm)": f"{row['p_holm']:.2g}",
    }


def read_study(args) -> tuple:
    """
    The study of a command, the events that count, and how many do not.

    Args:
        args ([`VotesArguments`]): Options of the command.
    """
    from ..human.report import select_guidelines
    from ..human.study import Study
    from ..human.votes import read_events

    study = Study.load(args.folder)
    guideline = study.guideline_hash if args.guidelines == "current" else None
    events = read_events(study.folder / "votes.jsonl", study.dimension_names, guideline)
    return study, *select_guidelines(study, events, args.guidelines)


def main(args) -> None:
    """
    Prints the statistics of a study, and exports its votes as a data set of preference pairs if asked to.

    Args:
        args ([`VotesArguments`]): Options of the command.

    Raises:
        SystemExit: if the study cannot be used; says why.
    """
    import json
    from pathlib import Path

    from ..human.figures import plot_wins
    from ..human.report import study_report

    try:
        study, events, others = read_study(args)
        if others:
            print(
                f"{others} votes on earlier questions or guidelines are left out (`--guidelines all` counts them).\n"
            )
        if not events:
            raise ValueError(f"{study.folder} has no votes: `tapo-trl annotate {study.folder}` collects them.")
        report = study_report(study, events, args.prior)
        print(format_report(report))
        for file in filter(None, (args.output_file, args.figure)):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
        if args.output_file is not None:
            Path(args.output_file).write_text(json.dumps(report, indent=2, allow_nan=True) + "\n", encoding="utf-8")
        if args.figure is not None:
            if not report["wins"]:
                raise ValueError("`figure`: nobody has voted on pairs of two sources.")
            plot_wins(report["wins"], args.figure)
        if args.output_dir is not None:
            export(study, events, args)
    except ValueError as error:
        raise SystemExit(f"tapo-trl votes: error: {error}") from error


def export(study, events: list[dict[str, Any]], args) -> None:
    """
    Writes the data set, and uploads it if asked to.

    Args:
        study ([`Study`]): The study.
        events (`list[dict]`): Its events.
        args ([`VotesArguments`]): Options of the command.
    """
    from ..human.export import SPLITS, VoteFilter, export_preferences, push_dataset, write_parquet

    rules = VoteFilter(args.min_votes, args.min_seconds, args.min_gold_accuracy, args.min_agreement, args.drop_ties)
    report = export_preferences(
        study,
        args.output_dir,
        events,
        rules,
        args.dimension_weights,
        args.splits or SPLITS,
        args.license,
        args.push_to_hub,
    )
    for reason, number in report["dropped"].items():
        print(f"{number:6} left out: {reason}")
    rows = ", ".join(f"{number} in {name}" for name, number in report["rows"].items())
    print(f"Wrote {rows} to {args.output_dir}. `tapo-trl slrm --dataset_name {args.output_dir} ...` trains on it.")
    if args.parquet_dir is not None:
        write_parquet(args.output_dir, args.parquet_dir)
    if args.push_to_hub is not None:
        print(f"Uploaded to {push_dataset(args.output_dir, args.push_to_hub)}")
