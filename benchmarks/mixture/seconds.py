# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
What a row costs each method: processor seconds per 1,000 rows through the policy's network, rewards and losses included.

    python -m benchmarks.mixture.seconds --work_dir runs/mixture

Every method with final trainings is trained for a short time, one after the other, and all of them again: a machine that gets slower is
slower for all. Writes `seconds.json`, by which the report compares methods at equal seconds.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from .study import HERE, METHODS, Run, best, read_runs, train


FILE = HERE / "seconds.json"
NUM_ROUNDS = 3
NUM_ROWS = 6_000


def finished() -> list[str]:
    """Methods with final trainings."""
    finals = {row["method"] for row in read_runs().values() if row["key"].endswith("test") and row["curve"]}
    return [name for name in METHODS if name in finals]


def seconds_of(run: Run, work: Path) -> float:
    """Processor seconds per 1,000 rows, without the update that comes first."""
    _, first, *_, last = train(replace(run, budget=NUM_ROWS), work, split=0)
    return 1000 * (last["seconds"] - first["seconds"]) / (last["forwards"] - first["forwards"])


def measure(names: Sequence[str], work: Path, file: Path) -> None:
    """Write what each round measured, by method."""
    measured: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(NUM_ROUNDS):
        for name, values in measured.items():
            values.append(round(seconds_of(best(name), work), 4))
            print(name, values[-1], flush=True)
    file.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def read_seconds(file: Path) -> dict[str, float]:
    """The median of the rounds, by method."""
    measured = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {name: median(values) for name, values in measured.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/mixture"), help="Base and reward models.")
    torch.set_num_threads(1)
    measure(finished(), parser.parse_args().work_dir, FILE)


if __name__ == "__main__":
    main()
