# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from .parser import FolderParser, RecipeParser


def make_parser() -> RecipeParser:
    """Parser of `tapo-trl pairs`."""
    from .human_arguments import PairsArguments

    return FolderParser((PairsArguments,), prog="tapo-trl pairs")


def load_study(args):
    """The study of a command, with the view and the votes per pair that it sets."""
    from accelerate import PartialState

    from ..human.study import Study

    study = Study.load(args.folder)
    changes = {"view": args.view, "votes_per_pair": args.votes_per_pair}
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes:
        settings = {name: value for name, value in vars(study).items() if name not in {"folder", *changes}}
        study = Study(**settings, **changes)
        if PartialState().is_main_process:
            study.save(args.folder)
        study.folder = type(study.folder)(args.folder)
    return study


def make_study_pairs(study, sources, matches, args, limits=None) -> int:
    """
    Makes the media, pairs them, and says what failed.

    Args:
        study ([`Study`]): The study.
        sources (`list[Source]`): The models.
        matches (`list[tuple[str, str]]`): Names of the sources that are compared.
        args ([`MediaArguments`]): Options of the command.
        limits (`dict[str, int]`, *optional*): Number of prompts of sources that do not take all.

    Returns:
        `int`: Number of media that could not be made by this process.
    """
    import sys

    from accelerate import PartialState

    from ..human.pairing import make_pairs, warn_of_different_shapes
    from ..human.sources import find_medium, make_media

    prompts = study.read_prompts()
    own = {source.name: prompts[: (limits or {}).get(source.name)] for source in sources}
    failures = [
        failure
        for source in sources
        for failure in make_media(study, source, own[source.name], args.batch_size, args.retry_failed)
    ]
    for failure in failures:
        print(f"Failed: {failure}", file=sys.stderr)
    missing = [
        row["prompt_id"]
        for name, rows in own.items()
        for row in rows
        if find_medium(study.folder / "media" / name, row["prompt_id"]) is None
    ]
    if PartialState().is_main_process:
        # Processes do not wait for each other: the last run of the command pairs what all of them made
        pairs = make_pairs(study, prompts, matches, gold=args.gold, repeats=args.repeats)
        warn_of_different_shapes(study, pairs)
        print(f"{len(pairs)} pairs in {study.folder / 'pairs.jsonl'}. `tapo-trl annotate {study.folder}` shows them.")
        if len(missing) > len(failures):
            print(
                f"{len(missing)} media are missing; other processes may still work on them. Run the command again at the end."
            )
    return len(failures)


def main(args) -> None:
    """
    Makes the media of two models, and pairs them.

    Args:
        args ([`PairsArguments`]): Options of the command.

    Raises:
        SystemExit: if the study cannot be used, or with status 1 if media could not be made.
    """
    from dataclasses import replace

    from ..human.sources import Source

    try:
        study = load_study(args)
        options_b = args.kwargs_a if args.kwargs_b is None else args.kwargs_b
        common = {"fps": args.fps, "dtype": args.dtype}
        first = Source(args.name_a, args.model_a, args.lora_a, dict(args.kwargs_a or {}), **common)
        second = Source(
            args.name_b, args.model_b or args.model_a, args.lora_b, dict(options_b or {}), seed=args.seed_b, **common
        )
        sources, matches, limits = [first, second], [(first.name, second.name)], {}
        if args.same_source:
            again = [replace(source, name=f"{source.name}.again", seed=source.seed + 1) for source in sources]
            matches += [(source.name, other.name) for source, other in zip(sources, again, strict=True)]
            limits = {source.name: args.same_source for source in again}
            sources += again
        failures = make_study_pairs(study, sources, matches, args, limits)
    except (ValueError, OSError) as error:  # OSError: a model that is not found
        raise SystemExit(f"tapo-trl pairs: error: {error}") from error
    if failures:
        raise SystemExit(1)
