# Copyright 2026 The tapo_trl authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""`tapo-trl reproduce`: makes the tables and figures of the paper in a world of one's own."""

from argparse import ArgumentParser, Namespace
from pathlib import Path


ALL = "all"


class ReproduceParser(ArgumentParser):
    """Parser of `tapo-trl reproduce`, which takes no recipe: those of the world say what is trained."""

    def parse_args_and_config(self, args: list[str]) -> tuple[Namespace]:
        args = self.parse_args(args)
        for name in ("seeds", "jobs", "threads", "samples_per_prompt"):
            if getattr(args, name) < 1:
                self.error(f"`--{name}` must be at least 1, got {getattr(args, name)}.")
        return (args,)


def make_parser() -> ReproduceParser:
    """Parser of `tapo-trl reproduce`."""
    from ..reproduction import EXPERIMENTS

    parser = ReproduceParser(
        prog="tapo-trl reproduce",
        description="Measure the paper's tables and figures again. Trainings that are finished are not made twice: an "
        "interrupted command goes on where it stopped.",
        allow_abbrev=False,
    )
    parser.add_argument("experiments", nargs="+", choices=[*EXPERIMENTS, ALL], help="What to measure.")
    parser.add_argument(
        "--world", default="emoji", help="Folder with a `world.py`, or the name of one in `examples`. Default: emoji."
    )
    parser.add_argument("--seeds", type=int, default=3, help="Training seeds of every number. Default: 3.")
    parser.add_argument("--jobs", type=int, default=1, help="Trainings at once. Default: 1.")
    parser.add_argument("--threads", type=int, default=1, help="Processor threads of each. Default: 1.")
    parser.add_argument(
        "--samples_per_prompt", type=int, default=2, help="Samples of each held-out prompt to judge. Default: 2."
    )
    parser.add_argument("--runs_dir", type=Path, default=Path("runs/paper"), help="Where trainings are kept.")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("benchmarks/paper"), help="Where the reports are written."
    )
    return parser


def main(args: Namespace) -> None:
    """
    Makes the trainings that are missing, and writes each report as soon as it is complete.

    Args:
        args (`Namespace`): The experiments, the world and the number of seeds.
    """
    from ..metrics.plots import check_matplotlib
    from ..reproduction import EXPERIMENTS, Lab, RunQueue, load_world

    check_matplotlib()
    world = load_world(args.world)
    root = args.runs_dir / world.name
    queue = RunQueue(world, args.world, root, args.jobs, args.threads, args.samples_per_prompt)
    lab = Lab(queue, seeds=range(args.seeds))
    for name in EXPERIMENTS if ALL in args.experiments else dict.fromkeys(args.experiments):
        print(f"{name}: {EXPERIMENTS[name].__doc__}")
        report = EXPERIMENTS[name](lab)
        command = f"tapo-trl reproduce {name} --world {args.world} --seeds {args.seeds}"
        report.write(args.output_dir / world.name, name, command)
        print(report.markdown(command))
        print(f"Written: {args.output_dir / world.name / name}.md, .json, .png")
