# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Live votes: people choose the best and the worst of a prompt's samples, while online Diffusion-DPO waits."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..data.videos import write_video
from ..files import atomic_write
from ..media.pictures import images_to_pil
from .assignment import LEASE_SECONDS
from .votes import SKIP_REASONS, current_votes, read_event_lines


logger = logging.get_logger(__name__)

CHOICES = "choices.jsonl"
BEST, WORST, OTHER = 1.0, 0.0, 0.5


def check_choice(event: dict[str, Any], num_samples: int) -> None:
    """
    Args:
        event (`dict`): What somebody did: a vote has `best` and `worst`, numbers of samples; a skip has a `reason`.
        num_samples (`int`): Number of samples.

    Raises:
        ValueError: if it cannot be used; says why.
    """
    if not isinstance(event.get("id"), str) or not 0 < len(event["id"]) <= 200:
        raise ValueError("`id` must be a text of at most 200 characters.")
    if event["kind"] == "skip" and event.get("reason") not in SKIP_REASONS:
        raise ValueError(f"`reason` must be one of {', '.join(SKIP_REASONS)}.")
    if event["kind"] == "vote":
        chosen = [event.get("best"), event.get("worst")]
        if any(isinstance(number, bool) or not isinstance(number, int) for number in chosen):
            raise ValueError("`best` and `worst` must be numbers of samples.")
        if chosen[0] == chosen[1] or not all(0 <= number < num_samples for number in chosen):
            raise ValueError(f"`best` and `worst` must be two different ones of {num_samples} samples.")


class HumanReward:
    """
    A reward of people for [`OnlineDiffusionDPOTrainer`]: 1 for the best sample of a prompt, 0 for the worst, 0.5 for the others. It
    writes the samples into a folder, which `tapo-trl annotate` shows, and waits. What people have chosen is kept by the
    content of the samples, so that a resumed training, which draws the same samples, does not ask again.

    Args:
        folder (`str` or `Path`): Folder of the samples and choices.
        fps (`float`, *optional*, defaults to `16.0`): Frames per second of videos.
        poll_seconds (`float`, *optional*, defaults to `1.0`): Seconds between two looks at the choices.
        timeout (`float`, *optional*): Seconds after which waiting is an error. By default it waits as long as it takes.
        sleep (`Callable`, *optional*): What waits, `seconds -> None`.
    """

    __name__ = "human"

    def __init__(
        self,
        folder: str | Path,
        fps: float = 16.0,
        poll_seconds: float = 1.0,
        timeout: float | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.folder, self.fps, self.poll_seconds, self.timeout, self.sleep = (
            Path(folder),
            fps,
            poll_seconds,
            timeout,
            sleep,
        )
        (self.folder / "groups").mkdir(parents=True, exist_ok=True)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str], **columns: Any) -> torch.Tensor:
        """
        Ask, and wait for the answers.

        Args:
            images (`torch.Tensor` of shape `(N, 3, H, W)`, or `(N, 3, F, H, W)` of videos): Samples in [0, 1].
            prompts (`Sequence[str]`): Their prompts. Samples of one prompt are compared.

        Returns:
            `torch.Tensor` of shape `(N,)`: 1, 0.5 or 0. All 0.5 for a prompt that was skipped.

        Raises:
            TimeoutError: if the answers take longer than `timeout`.
            ValueError: if a prompt has only one sample.
        """
        images = images.detach().float().clamp(0, 1).cpu()
        groups = {
            prompt: [row for row, other in enumerate(prompts) if other == prompt] for prompt in dict.fromkeys(prompts)
        }
        for prompt, rows in groups.items():
            if len(rows) < 2:
                raise ValueError(
                    f"People choose between samples of one prompt, but there is one of {prompt!r}: raise `num_generations`."
                )
        names = {prompt: self._offer(images[rows], prompt) for prompt, rows in groups.items()}
        chosen = self._wait(list(names.values()))
        scores = torch.full((len(images),), OTHER)
        for prompt, rows in groups.items():
            choice = chosen[names[prompt]]
            if choice["kind"] == "vote":
                scores[rows[choice["best"]]], scores[rows[choice["worst"]]] = BEST, WORST
        return scores

    def _offer(self, samples: torch.Tensor, prompt: str) -> str:
        """Write the samples of a prompt, unless they are there. Their name follows from prompt and pixels."""
        pixels = (samples * 255).round().byte()
        digest = hashlib.sha256(prompt.encode() + bytes(str(tuple(pixels.shape)), "ascii") + pixels.numpy().tobytes())
        name = digest.hexdigest()[:16]
        folder = self.folder / "groups" / name
        if not (folder / "group.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            media = []
            for number, sample in enumerate(samples):
                media.append(f"{number}.mp4" if sample.ndim == 4 else f"{number}.png")
                if sample.ndim == 4:
                    write_video(folder / media[-1], sample, self.fps)
                else:
                    images_to_pil(sample[None])[0].save(folder / media[-1])
            with atomic_write(folder / "group.json") as aside:  # last: now the page shows them
                aside.write_text(json.dumps({"prompt": prompt, "media": media, "time": time.time()}), encoding="utf-8")
        return name

    def _wait(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        waited, told = 0.0, False
        while True:
            used = {name: self.folder / "groups" / name / "used.json" for name in names}
            chosen = {
                name: json.loads(file.read_text(encoding="utf-8")) for name, file in used.items() if file.exists()
            }
            events = current_votes(read_event_lines(self.folder / CHOICES), ("vote", "skip"))
            chosen = {event["pair_id"]: event for event in events if event["pair_id"] in used} | chosen
            if len(chosen) == len(used):
                break
            if not told:
                logger.warning(
                    f"Training waits for people: {len(used) - len(chosen)} prompts in {self.folder}. `tapo-trl annotate {self.folder}` "
                    "shows them."
                )
                told = True
            if self.timeout is not None and waited >= self.timeout:
                raise TimeoutError(
                    f"Nobody has chosen within {self.timeout:g} seconds: {len(used) - len(chosen)} prompts in {self.folder} wait."
                )
            self.sleep(self.poll_seconds)
            waited += self.poll_seconds
        for name, file in used.items():
            if not file.exists():  # from now on it cannot be undone
                with atomic_write(file) as aside:
                    aside.write_text(json.dumps(chosen[name]), encoding="utf-8")
        return chosen


@dataclass(frozen=True)
class Group:
    """Samples of a prompt: `pair_id` is their name, `media` their files, relative to the folder."""

    pair_id: str
    prompt: str
    media: tuple[str, ...]
    is_used: bool  # training has taken the choice, which cannot be undone any more


def _read_group(folder: Path) -> tuple[float, Group]:
    """The time at which a group came, and the group."""
    content = json.loads((folder / "group.json").read_text(encoding="utf-8"))
    media = tuple(str(Path("groups", folder.name, name)) for name in content["media"])
    return content["time"], Group(folder.name, content["prompt"], media, is_used=False)


class LiveGroups:
    """
    Hands out groups as [`~human.assignment.Assignment`] hands out pairs: to whoever comes first, each to one person.

    Args:
        folder (`str` or `Path`): Folder of a [`HumanReward`].
        events (`Sequence[dict]`): What has been done so far.
        clock (`Callable`, *optional*): Seconds; by default those of a monotonic clock.
    """

    def __init__(self, folder: Path, events: Sequence[dict[str, Any]], clock: Callable[[], float] = time.monotonic):
        self.folder, self.clock = Path(folder), clock
        self.done: dict[str, dict[str, Any]] = {}  # last event that counts, by group
        self.history: dict[str, list[str]] = {}
        self.leases: dict[str, tuple[str, float]] = {}
        self._groups: dict[str, tuple[float, Group]] = {}  # with the time at which they came
        for event in events:
            self.record(event)

    @property
    def pairs(self) -> dict[str, Group]:
        """The groups that are there now, oldest first."""
        folder = self.folder / "groups"
        names = os.listdir(folder)
        # A group never changes, but that training takes its choice: each is read once
        groups = {name: self._groups[name] for name in names if name in self._groups}
        for name in names:
            if name not in groups and (folder / name / "group.json").exists():
                groups[name] = _read_group(folder / name)
            if name in groups and not groups[name][1].is_used and (folder / name / "used.json").exists():
                groups[name] = groups[name][0], replace(groups[name][1], is_used=True)
        self._groups = dict(sorted(groups.items(), key=lambda entry: (entry[1][0], entry[0])))
        return {name: group for name, (_, group) in self._groups.items()}

    def record(self, event: dict[str, Any]) -> None:
        """Take note of an event that has been written."""
        name, history = event["pair_id"], self.history.setdefault(event["annotator"], [])
        self.leases.pop(name, None)
        self.done.pop(name, None)
        if name in history:
            history.remove(name)
        if event["kind"] != "undo":
            self.done[name] = event
            history.append(name)

    def next(self, annotator: str) -> Group | None:
        """The next group of a person, reserved for some minutes."""
        now = self.clock()
        self.leases = {name: lease for name, lease in self.leases.items() if lease[1] > now}
        free = [
            group
            for name, group in self.pairs.items()
            if name not in self.done and not group.is_used and self.leases.get(name, (annotator,))[0] == annotator
        ]
        held = [group for group in free if group.pair_id in self.leases]
        group = next(iter([*held, *free]), None)
        if group is not None:
            self.hold(annotator, group)
        return group

    def hold(self, annotator: str, group: Group) -> None:
        """Show a person this group next."""
        self.leases[group.pair_id] = annotator, self.clock() + LEASE_SECONDS

    def last(self, annotator: str) -> Group | None:
        """The group that a person chose from last, if training has not taken the choice yet."""
        history = self.history.get(annotator, [])
        group = self.pairs.get(history[-1]) if history else None
        return None if group is None or group.is_used else group

    def progress(self, annotator: str) -> tuple[int, int]:
        """Groups that are done, and all there are."""
        pairs = self.pairs
        done = sum(name in self.done or group.is_used for name, group in pairs.items())
        return done, len(pairs)
