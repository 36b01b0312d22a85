# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Trainings that are made once: each has a folder, and a result that says what it cost and how good it is."""

import hashlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm

from tapo_trl.files import atomic_write

from .world import World, load_world


RESULT, RECIPE, LOG, PROMPTS = "result.json", "recipe.yaml", "log.txt", "prompts.txt"

REWARD_COMMAND = "slrm"
BASE_COMMAND = "base"
PROMPTS_COMMAND = "hard_prompts"

SAMPLES_PER_PROMPT = 2
"""Samples of each held-out prompt that are judged, where nothing else is said."""


@dataclass(frozen=True, eq=False)
class Run:
    """
    A training, or what is made of the base model without one.

    Args:
        command (`str`): of `tapo-trl`; or `"base"`, which judges the base; or `"hard_prompts"`, which selects prompts.
        label (`str`): what it is called while it is made.
        recipe (`str`): recipe that the options change.
        options (`Mapping[str, Any]`): fields of the recipe. `None` takes one out. For a [`Run`], what it makes is the value.
        seed (`int`): seed of the training.
        is_probe (`bool`): whether it stops after a step and is not judged: it tells what a step costs.
        samples_per_prompt (`int`): samples of each held-out prompt that are judged.
    """

    command: str
    label: str
    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    is_probe: bool = False
    samples_per_prompt: int = SAMPLES_PER_PROMPT

    @cached_property
    def folder(self) -> str:
        """Its folder below the root: another one for every recipe, option, seed and number of samples."""
        values = [self._merged(lambda need: need.folder), self.seed, self.is_probe]
        if self.samples_per_prompt != SAMPLES_PER_PROMPT:
            values.append(self.samples_per_prompt)
        text = json.dumps(values, sort_keys=True)
        return f"{self.command}/{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def _merged(self, place: Callable[["Run"], str]) -> dict[str, Any]:
        """The recipe with the options, where a run becomes what it makes at its place."""
        recipe = _parse(Path(self.recipe).read_text(encoding="utf-8-sig")) | dict(self.options)
        return {
            name: value._made_at(place(value)) if isinstance(value, Run) else value
            for name, value in recipe.items()
            if value is not None
        }

    def _made_at(self, place: str) -> str | list[str]:
        """What a recipe names: reward models, or a file of prompts."""
        return f"{place}/{PROMPTS}" if self.command == PROMPTS_COMMAND else [place]

    @property
    def needs(self) -> list["Run"]:
        """The runs whose folders it reads."""
        return [value for value in self.options.values() if isinstance(value, Run)]

    def with_options(self, label: str | None = None, **options) -> "Run":
        return replace(self, label=label or self.label, options={**self.options, **options})

    def with_seed(self, seed: int) -> "Run":
        return replace(self, seed=seed)

    @property
    def probe(self) -> "Run":
        """The same for a single step, with seed 0."""
        one_step = self.with_options(max_steps=1)
        return replace(one_step, seed=0, is_probe=True, samples_per_prompt=SAMPLES_PER_PROMPT)

    def write_recipe(self, root: Path) -> Path:
        """Write the whole recipe into its folder, for `tapo-trl COMMAND --config` and for whoever wants to know."""
        folder = root / self.folder
        recipe = self._merged(lambda need: str(root / need.folder))
        recipe |= {"seed": self.seed, "output_dir": str(folder)}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / RECIPE
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return path


@dataclass
class RunQueue:
    """
    Makes runs, each once, several at a time. What is finished stays in `root`, so that an interrupted queue goes on where
    it stopped.

    Args:
        world ([`World`]): the models, the data and the judges.
        world_name (`str`): what [`load_world`] found it by.
        root (`Path`): where the runs are kept.
        jobs (`int`, *optional*, defaults to `1`): runs at once, each in a process of its own.
        threads (`int`, *optional*, defaults to `1`): threads of each.
        known (`dict[str, dict]`, *optional*): results of runs that were made elsewhere, by folder, see [`read_results`].
        record (`Path`, *optional*): where the results of all runs that were asked for are written down.
    """

    world: World
    world_name: str
    root: Path
    jobs: int = 1
    threads: int = 1
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    record: Path | None = None
    _recorded: set[str] = field(default_factory=set, init=False)

    def result(self, run: Run) -> dict[str, Any] | None:
        """What a finished run gave, `None` for any other."""
        file = self.root / run.folder / RESULT
        return json.loads(file.read_text()) if file.is_file() else self.known.get(run.folder)

    def _is_here(self, run: Run) -> bool:
        """Whether a run was made here, so that others can read what it made."""
        return (self.root / run.folder / RESULT).is_file()

    def make(self, runs: Iterable[Run]) -> list[dict[str, Any]]:
        """
        Make what is not finished yet of these runs and of those that they need.

        Returns:
            `list[dict]`: their results, in order.

        Raises:
            RuntimeError: if a run failed. Others that had begun are finished first.
        """
        runs = list(runs)
        missing = [run for run in runs if self.result(run) is None]
        waiting = {run.folder: run for run in _with_needs(missing) if not self._is_here(run)}
        if waiting:
            self._make(waiting)
        results = [self.result(run) for run in runs]
        new = {run: result for run, result in zip(runs, results, strict=True) if run.folder not in self._recorded}
        if self.record is not None and new:
            write_results(self.record, new)
            self._recorded |= {run.folder for run in new}
        return results

    def _make(self, waiting: dict[str, Run]) -> None:
        os.environ["OMP_NUM_THREADS"] = str(self.threads)  # read by the processes that start now
        started, failed = {}, []
        progress = tqdm(total=len(waiting), desc="runs", unit="run", dynamic_ncols=True)
        with ProcessPoolExecutor(self.jobs, get_context("spawn")) as pool:
            while (waiting and not failed) or started:
                ready = [run for run in waiting.values() if all(map(self._is_here, run.needs))]
                for run in [] if failed else ready[: self.jobs - len(started)]:
                    arguments = (run, self.world_name, self.root, self.threads)
                    started[pool.submit(execute, *arguments)] = waiting.pop(run.folder)
                progress.set_postfix_str(", ".join(run.label for run in started.values()))
                finished, _ = wait(started, return_when=FIRST_COMPLETED)
                for future in finished:
                    run = started.pop(future)
                    if future.exception() is not None:
                        failed.append((run, future.exception()))
                    progress.update()
        progress.close()
        if failed:
            run, error = failed[0]
            raise RuntimeError(
                f"The run `{run.label}` failed: {error}. See {self.root / run.folder / LOG}; the same command goes on with "
                "what is missing."
            ) from error


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """What [`write_results`] wrote, by the folder of the run."""
    lines = file.read_text(encoding="utf-8-sig").splitlines()
    return {entry["folder"]: entry["result"] for entry in map(json.loads, lines)}


def write_results(file: Path, results: Mapping[Run, dict[str, Any]]) -> None:
    """
    Add results to a file of lines in JSON, or replace them.

    Args:
        file (`Path`): the file.
        results (`Mapping[Run, dict]`): by run. Numbers are written with five digits.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    kept = {json.loads(line)["folder"]: line for line in lines}
    for run, result in results.items():
        entry = {"folder": run.folder, "label": run.label, "seed": run.seed, "result": _rounded(result)}
        kept[run.folder] = json.dumps(entry, separators=(",", ":"))
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as aside:
        aside.write_text("".join(f"{line}\n" for line in kept.values()), encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value


@cache
def _parse(recipe: str) -> dict[str, Any]:
    return yaml.safe_load(recipe)


def _with_needs(runs: Iterable[Run]) -> list[Run]:
    """The runs behind those that they need, each once."""
    ordered: dict[str, Run] = {}
    for run in runs:
        for part in [*_with_needs(run.needs), run]:
            ordered.setdefault(part.folder, part)
    return list(ordered.values())


def execute(run: Run, world_name: str, root: Path, threads: int) -> None:
    """Train, judge and write the result of a run, which is the last file that appears."""
    import torch

    torch.set_num_threads(threads)
    world, folder = load_world(world_name), root / run.folder
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    path = run.write_recipe(root)
    start = time.perf_counter()
    with _printing_to(folder / LOG):
        result = {"command": f"tapo-trl {run.command} --config {path}", "forwards": _train(run, path)}
        result["train_seconds"] = time.perf_counter() - start
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        if run.command == REWARD_COMMAND:
            from .measure import measure_checkpoints, measure_reward_model

            if "save_steps" in run.options:
                result["checkpoints"] = measure_checkpoints(folder, world.pairs)
            else:
                result["pairs"] = {split: measure_reward_model(folder, file) for split, file in world.pairs.items()}
        elif run.command == PROMPTS_COMMAND:
            from .measure import hard_prompts

            prompts = hard_prompts(world, recipe, run.samples_per_prompt)
            (folder / PROMPTS).write_text("\n".join(prompts) + "\n", encoding="utf-8")
        elif not run.is_probe:
            from .measure import measure_policy

            trained = None if run.command == BASE_COMMAND else folder
            result["judges"] = measure_policy(world, recipe, trained, run.samples_per_prompt)
    with atomic_write(folder / RESULT) as aside:
        aside.write_text(json.dumps(result, indent=1) + "\n")


@contextmanager
def _printing_to(file: Path) -> Iterator[None]:
    """
    All that the process prints goes to a file, the traceback of an error included. The descriptors are replaced, not `sys.stderr`,
    because handlers of logging keep the stream that was there when they were made.
    """
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    terminal = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    with file.open("wb") as log:
        for descriptor in terminal:
            os.dup2(log.fileno(), descriptor)
    try:
        yield
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        for stream in streams:
            stream.flush()
        for descriptor, kept in terminal.items():
            os.dup2(kept, descriptor)
            os.close(kept)


def _train(run: Run, recipe: Path) -> dict[str, int]:
    """Train, and count the forwards."""
    if run.command in (BASE_COMMAND, PROMPTS_COMMAND):
        return {"policy": 0, "reward": 0}
    from tapo_trl.cli.main import command_module
    from tapo_trl.scripts.utils import save_or_push

    from .forward_counter import ForwardCounter

    command = command_module(run.command)
    script_args, training_args, model_args = command.make_parser().parse_args_and_config(["--config", str(recipe)])
    trainer, counter = command.make_trainer(script_args, training_args, model_args), ForwardCounter()
    if run.command != REWARD_COMMAND:
        counter.watch(trainer)
    trainer.train()
    save_or_push(trainer)
    trainer.end()
    return {"policy": counter.policy_forwards, "reward": counter.reward}
