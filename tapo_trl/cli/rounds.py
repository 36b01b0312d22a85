# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from .parser import FolderParser, RecipeParser


def make_parser() -> RecipeParser:
    """Parser of `tapo-trl rounds`."""
    from .human_arguments import RoundsArguments

    return FolderParser((RoundsArguments,), prog="tapo-trl rounds")


def main(args) -> None:
    """
    Runs rounds of "sample, annotate, SLRM, TAPO", as far as votes are there.

    Args:
        args ([`RoundsArguments`]): Options of the command.

    Raises:
        SystemExit: with status 3 if people have to vote first, with status 1 if a step fails.
    """
    import subprocess
    from pathlib import Path

    from ..human.rounds import Rounds, WaitForVotes

    configs = {name: getattr(args, f"{name}_config") for name in ("slrm", "tapo", "pairs", "votes")}
    configs = {name: config for name, config in configs.items() if config is not None}
    folder = Path(args.folder)
    rounds = Rounds(folder, args.model_name_or_path, args.prompts, configs, annotate=args.annotate, media=args.media)
    for number in range(1, args.rounds + 1):
        try:
            rounds.do(number)
        except WaitForVotes as wait:
            print(f"Round {number}: {wait}")
            raise SystemExit(3) from wait
        except (subprocess.CalledProcessError, ValueError, OSError) as error:
            raise SystemExit(f"tapo-trl rounds: error: round {number}: {error}") from error
        print(f"Round {number} is done: {rounds.folder / f'round_{number}' / 'model'}", flush=True)
