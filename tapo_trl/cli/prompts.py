# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from .parser import FolderParser, RecipeParser


def make_parser() -> RecipeParser:
    """Parser of `tapo-trl prompts`."""
    from .human_arguments import PromptsArguments

    return FolderParser((PromptsArguments,), prog="tapo-trl prompts")


def make_writer(args, elements):
    """
    Who writes the prompts.

    Args:
        args ([`PromptsArguments`]): Options of the command.
        elements ([`Elements`]): Elements, whose templates are used without a language model.
    """
    import os

    from ..human.writers import EndpointWriter, PipelineWriter, TemplateWriter

    if args.endpoint is not None:
        key = os.environ.get(args.api_key_env)
        return EndpointWriter(args.endpoint, args.llm, args.media, args.max_words, args.temperature, key)
    if args.llm is not None:
        return PipelineWriter(args.llm, args.media, args.max_words, args.temperature)
    return TemplateWriter(elements)


def open_study(args):
    """
    The study in the folder, or a new one with the title and seed of the command.

    Args:
        args ([`PromptsArguments`]): Options of the command.

    Raises:
        ValueError: if there is a study with another title or seed than the command gives.
    """
    from dataclasses import fields
    from pathlib import Path

    from ..human.study import IMAGE_DIMENSIONS, VIDEO_DIMENSIONS, Study

    if (Path(args.folder) / "study.yaml").exists():
        study = Study.load(args.folder)
        defaults = {field.name: field.default for field in fields(args)}
        for name in ("title", "seed"):
            given, own = getattr(args, name), getattr(study, name)
            if given not in (defaults[name], own):
                raise ValueError(
                    f"`{name}` is of new studies, but {study.folder} is one already, with {own!r}: leave it out."
                )
        return study
    study = Study(
        title=args.title, seed=args.seed, dimensions=VIDEO_DIMENSIONS if args.media == "videos" else IMAGE_DIMENSIONS
    )
    study.save(args.folder)
    return study


def main(args) -> None:
    """
    Writes prompts into a study, and prints how many were kept and why others were dropped.

    Args:
        args ([`PromptsArguments`]): Options of the command.

    Raises:
        SystemExit: if they cannot be written; says why.
    """
    from ..human.elements import Elements

    try:
        elements = Elements.load(args.elements)
        if args.prompts is None:
            write(args, elements)
        else:
            take(args)
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        raise SystemExit(f"tapo-trl prompts: error: {error}") from error


def take(args) -> None:
    """
    Takes prompts of one's own into a study.

    Args:
        args ([`PromptsArguments`]): Options of the command.
    """
    from ..data.loading import read_prompts
    from ..human.prompts import import_prompts

    prompts = read_prompts(args.prompts, "prompts")
    study = open_study(args)
    new = import_prompts(study, prompts)
    print(f"{new} new prompts; {len(study.read_prompts())} in {study.folder / 'prompts.jsonl'}.")


def write(args, elements) -> None:
    """
    Writes prompts from meta elements into a study.

    Args:
        args ([`PromptsArguments`]): Options of the command.
        elements ([`Elements`]): The elements.
    """
    from ..human.figures import plot_elements
    from ..human.prompts import distinct_2, write_prompts

    study = open_study(args)
    report = write_prompts(
        study,
        elements,
        make_writer(args, elements),
        args.num,
        max_words=args.max_words,
        batch_size=args.batch_size,
        attempts=args.attempts,
    )
    rows = study.read_prompts()
    for reason, number in report["dropped"].items():
        print(f"{number:6} dropped: {reason}")
    if report["from_templates"]:
        print(
            f"{report['from_templates']:6} written by a template, after {args.attempts} attempts of the language model"
        )
    print(
        f"{report['kept']:6} prompts in {study.folder / 'prompts.jsonl'}; distinct-2 {distinct_2([r['prompt'] for r in rows]):.2f}"
    )
    if report["kept"] < args.num:
        print(f"There are only {elements.num_combinations} combinations of the elements: add values to them.")
    if args.figure:
        plot_elements(rows, study.folder / "elements.png")
        print(f"Distribution of the elements: {study.folder / 'elements.png'}")
