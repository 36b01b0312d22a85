# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from tapo_trl.cli.parser import RecipeParser


ALL = "all"


@dataclass
class ReproduceArguments:
    """
    Arguments of `tapo-trl reproduce`.

    Parameters:
        experiments (`list[str]`):
            What to measure: names of tables and figures, or `all`. The flag itself can be left out.
        world (`str`, *optional*, defaults to `"emoji"`):
            Folder with a `world.py`, or the name of one in `examples`.
        seeds (`int`, *optional*, defaults to `3`):
            Training seeds of every number.
        jobs (`int`, *optional*, defaults to `1`):
            Trainings at once, each in a process of its own.
        threads (`int`, *optional*, defaults to `1`):
            Processor threads of each.
        samples_per_prompt (`int`, *optional*, defaults to `2`):
            Samples of each held-out prompt that are judged.
        runs_dir (`str`, *optional*, defaults to `"runs/paper"`):
            Where trainings are kept. One that is finished is not made again.
        known_results (`str`, *optional*):
            A `runs.jsonl` of results from elsewhere: what is in it is not trained again.
        output_dir (`str`, *optional*, defaults to `"benchmarks/paper"`):
            Where the reports are written, and `runs.jsonl`, the results of each training that they rest on.
    """

    experiments: list[str] = field(
        default_factory=list, metadata={"help": "What to measure: names of tables and figures, or `all`."}
    )
    world: str = field(
        default="emoji", metadata={"help": "Folder with a `world.py`, or the name of one in `examples`."}
    )
    seeds: int = field(default=3, metadata={"help": "Training seeds of every number."})
    jobs: int = field(default=1, metadata={"help": "Number of concurrent trainings, each in its own process."})
    threads: int = field(default=1, metadata={"help": "Processor threads of each."})
    samples_per_prompt: int = field(default=2, metadata={"help": "Samples of each held-out prompt that are judged."})
    runs_dir: str = field(default="runs/paper", metadata={"help": "Where trainings are kept."})
    known_results: str | None = field(
        default=None,
        metadata={"help": "A `runs.jsonl` of earlier results, which are not trained again."},
    )
    output_dir: str = field(
        default="benchmarks/paper",
        metadata={"help": "Where the reports are written, and `runs.jsonl`, the results that they rest on."},
    )

    def __post_init__(self):
        from . import EXPERIMENTS

        unknown = [name for name in self.experiments if name not in (*EXPERIMENTS, ALL)]
        if unknown or not self.experiments:
            problem = f"there is no experiment {', '.join(unknown)}" if unknown else "say what to measure"
            raise ValueError(f"{problem}: {', '.join(EXPERIMENTS)}, or {ALL}.")
        for name in ("seeds", "jobs", "threads", "samples_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.known_results is not None and not Path(self.known_results).is_file():
            raise ValueError(f"`known_results`: there is no file {self.known_results}.")


class ReproduceParser(RecipeParser):
    """Takes what comes before the first flag for the experiments."""

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs) -> tuple:
        if args is not None:
            names = list(takewhile(lambda arg: not arg.startswith("-"), args))
            args = [*(["--experiments", *names] if names else []), *list(args)[len(names) :]]
        return super().parse_args_and_config(args, **kwargs)


def make_parser() -> ReproduceParser:
    """Parser of `tapo-trl reproduce`."""
    return ReproduceParser((ReproduceArguments,), prog="tapo-trl reproduce")


def main(args: ReproduceArguments) -> None:
    """
    Makes the trainings that are missing, and writes each report as soon as it is complete.

    Args:
        args ([`ReproduceArguments`]): The experiments, the world and the number of seeds.
    """
    from tapo_trl.metrics.plots import check_matplotlib

    from . import EXPERIMENTS, Lab, RunQueue, load_world
    from .report import write_index
    from .runs import read_results

    check_matplotlib()
    world = load_world(args.world)
    root, reports = Path(args.runs_dir) / world.name, Path(args.output_dir) / world.name
    queue = RunQueue(
        world,
        args.world,
        root,
        args.jobs,
        args.threads,
        known={} if args.known_results is None else read_results(Path(args.known_results)),
        record=reports / "runs.jsonl",
    )
    lab = Lab(queue, range(args.seeds), args.samples_per_prompt)
    for name in EXPERIMENTS if ALL in args.experiments else dict.fromkeys(args.experiments):
        print(f"{name}: {EXPERIMENTS[name].__doc__}")
        report = EXPERIMENTS[name](lab)
        command = f"tapo-trl reproduce {name} --world {args.world} --seeds {args.seeds}"
        report.write(reports, name, command)
        write_index(reports, EXPERIMENTS)
        print(report.markdown(command))
        print(f"Written: {reports / name}.md, .json" + (", .png" if report.panels else ""))
