# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Rounds of the loop: samples, votes, reward model, alignment."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import atomic_write
from .study import Study
from .votes import current_votes, read_events


class WaitForVotes(Exception):
    """A round cannot go on before people have voted."""


@dataclass
class Rounds:
    """
    Rounds of "sample, annotate, SLRM, TAPO". Each step is a command of its own, and is not run again once it is done, so that the loop can be
    stopped anywhere.

    Args:
        folder (`Path`): Folder of the rounds.
        model (`str`): Pipeline that the first round starts from. Each later one starts from the one before with its LoRA merged.
        prompts (`list[str]`): Prompts, or a .txt file.
        configs (`dict[str, str]`): YAML recipes of the commands `slrm` and `tapo`, and optionally of `pairs` and `votes`.
        annotate (`str`, *optional*): A command that gives the votes, with `{study}` for the folder of the study. By default the loop
            stops until people have voted.
        media (`str`, *optional*, defaults to `"videos"`): `"images"` or `"videos"`, which gives the questions.
        run (`Callable`, *optional*): What runs a command line, `list[str] -> None`.
    """

    folder: Path
    model: str
    prompts: list[str]
    configs: dict[str, str]
    annotate: str | None = None
    media: str = "videos"
    run: Callable[[Sequence[str]], Any] = lambda command: subprocess.run(command, check=True)

    def steps(self, number: int) -> Iterator[tuple[str, list[str]]]:
        """Name and command line of each step of a round, counted from 1. The step `annotate` has no command if people are waited for."""
        here = self.folder / f"round_{number}"
        study, data, slrm, tapo = (str(here / name) for name in ("study", "data", "slrm", "tapo"))
        model = self.model if number == 1 else str(self.folder / f"round_{number - 1}" / "model")
        seed = ["--seed", str(number)]  # other samples in each round
        yield (
            "prompts",
            [*self._command("prompts"), "--folder", study, "--prompts", *self.prompts, "--media", self.media, *seed],
        )
        # The model against itself, with two seeds: the votes then tell samples apart, and not models
        again = ["--model_a", model, "--model_b", model, "--seed_b", "1"]
        yield "pairs", [*self._command("pairs"), "--folder", study, *again]
        yield "annotate", [part.replace("{study}", study) for part in shlex.split(self.annotate or "")]
        yield "votes", [*self._command("votes"), "--folder", study, "--output_dir", data]
        of_model = ["--model_name_or_path", model]
        yield "slrm", [*self._command("slrm"), *of_model, "--dataset_name", data, "--output_dir", slrm]
        yield "tapo", [*self._command("tapo"), *of_model, "--reward_model", slrm, "--output_dir", tapo]
        merged = str(here / "model")
        yield "merge", [*self._command("merge"), *of_model, "--lora", tapo, "--output_dir", merged]

    def _command(self, name: str) -> list[str]:
        config = ["--config", self.configs[name]] if name in self.configs else []
        return [sys.executable, "-m", "tapo_trl.cli", name, *config]

    def do(self, number: int) -> None:
        """
        Run the steps of a round that are not done.

        Raises:
            WaitForVotes: if people have to vote first.
            subprocess.CalledProcessError: if a step fails.
        """
        here = self.folder / f"round_{number}"
        for name, command in self.steps(number):
            marker = here / f"{name}.done"
            if marker.exists():
                continue
            here.mkdir(parents=True, exist_ok=True)
            if command:
                self.run([*command, *_resume(here / name)] if name in ("slrm", "tapo") else command)
            if name == "annotate":
                self._check_votes(here / "study")
            with atomic_write(marker) as aside:
                aside.write_text(json.dumps({"command": command}, indent=2), encoding="utf-8")

    def _check_votes(self, folder: Path) -> None:
        study = Study.load(folder)
        events = read_events(folder / "votes.jsonl", study.dimension_names, study.guideline_hash)
        answered = {event["pair_id"] for event in current_votes(events, ("vote", "skip"))}
        # A repetition does not come up for people who skipped its original, and is not exported
        pairs = [pair for pair in study.read_pairs() if pair.repeat_of is None]
        missing = [pair for pair in pairs if pair.pair_id not in answered]
        if missing:
            raise WaitForVotes(
                f"{len(missing)} pairs of {folder} have no vote yet. `tapo-trl annotate {folder}` shows them. Then run this command again."
            )


def _resume(folder: Path) -> list[str]:
    """A training that was interrupted goes on from its last checkpoint."""
    return ["--resume_from_checkpoint", "true"] if list(folder.glob("checkpoint-*")) else []
