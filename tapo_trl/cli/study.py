# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from .parser import FolderParser, RecipeParser


def make_parser() -> RecipeParser:
    """Parser of `tapo-trl study`."""
    from .human_arguments import StudyArguments

    return FolderParser((StudyArguments,), prog="tapo-trl study")


def read_methods(file: str) -> list:
    """
    The methods of a YAML file: `methods`, a mapping from names to the fields of [`Source`]; `defaults`, fields for all of them.

    Raises:
        ValueError: if it cannot be used.
    """
    from pathlib import Path

    import yaml

    from ..human.sources import Source

    if not Path(file).is_file():
        raise ValueError(f"`methods`: there is no file {file}.")
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        methods = content["methods"]
        defaults = content.get("defaults", {})
        return [
            Source(name=name, **({} if "folder" in fields else defaults), **fields) for name, fields in methods.items()
        ]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`methods`: {file} cannot be used ({error}). It needs `methods: {{name: {{model: ...}}}}`."
        ) from error


def main(args) -> None:
    """
    Makes the media of several methods and pairs them; without `methods`, prints the results of the votes.

    Args:
        args ([`StudyArguments`]): Options of the command.

    Raises:
        SystemExit: if the study cannot be used, or with status 1 if media could not be made.
    """
    from ..human.pairing import matches_of
    from .pairs import load_study, make_study_pairs

    try:
        if args.methods is None:
            print_results(args)
            return
        study, sources = load_study(args), read_methods(args.methods)
        matches = matches_of([source.name for source in sources], args.compare)
        failures = make_study_pairs(study, sources, matches, args)
    except (ValueError, OSError) as error:  # OSError: a model that is not found
        raise SystemExit(f"tapo-trl study: error: {error}") from error
    if failures:
        raise SystemExit(1)


def print_results(args) -> None:
    """
    Prints win rates and scores of the votes so far.

    Args:
        args ([`StudyArguments`]): Options of the command.
    """
    from .human_arguments import VotesArguments
    from .votes import main as print_votes

    print_votes(VotesArguments(folder=args.folder, figure=args.figure, output_file=args.output_file))
