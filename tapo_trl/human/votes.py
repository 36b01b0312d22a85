# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Votes in an append-only file. A vote is on disk before its sender gets an answer."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .log import AppendLog


logger = logging.get_logger(__name__)

KINDS = ("vote", "undo", "skip")
SKIP_REASONS = ("broken", "offensive", "cannot judge")
FIRST, TIE, SECOND = 1.0, 0.5, 0.0  # medium 0 is better, neither, medium 1 is better


def check_event(event: dict[str, Any], dimensions: Iterable[str]) -> None:
    """
    Args:
        event (`dict`): What somebody did: `id`, `kind`, `annotator` and `pair_id`; a vote also has `labels`, a number by dimension (1 if medium
            0 is better, 0.5 for a tie, 0 if medium 1 is), a skip a `reason`.
        dimensions (`Iterable[str]`): The questions.

    Raises:
        ValueError: if it cannot be used; says why.
    """
    for key in ("id", "annotator", "pair_id"):
        if not isinstance(event.get(key), str) or not 0 < len(event[key]) <= 200:
            raise ValueError(f"`{key}` must be a text of at most 200 characters.")
    if event.get("kind") not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}.")
    if event["kind"] == "skip" and event.get("reason") not in SKIP_REASONS:
        raise ValueError(f"`reason` must be one of {', '.join(SKIP_REASONS)}.")
    if event["kind"] == "vote":
        labels, dimensions = event.get("labels"), list(dimensions)
        if not isinstance(labels, dict) or sorted(labels) != sorted(dimensions):
            raise ValueError(f"`labels` must answer each of {dimensions}.")
        if any(isinstance(label, bool) or label not in (FIRST, TIE, SECOND) for label in labels.values()):
            raise ValueError("Each of `labels` must be 1 (medium 0 is better), 0.5 (tie) or 0 (medium 1 is better).")


class VoteStore(AppendLog):
    """
    The votes of a study, open for writing by one process, see [`~human.log.AppendLog`]. An event whose `id` is known is not written again.

    Args:
        file (`str` or `Path`): The file, such as `votes.jsonl`. Made if it does not exist.
    """

    def __init__(self, file: str | Path):
        super().__init__(file, "id", required=("kind", "annotator", "pair_id"))


def read_event_lines(file: str | Path) -> list[dict[str, Any]]:
    """
    The rows of a file of events, also while a server writes it. Part of a last line, which a killed process leaves, was never acknowledged
    and is left out.

    Args:
        file (`str` or `Path`): The file.

    Raises:
        ValueError: if another line is damaged; names the line.
    """
    file = Path(file)
    *lines, last = (file.read_bytes() if file.exists() else b"").split(b"\n")
    events = []
    for number, line in enumerate([*lines, last] if last else lines, 1):
        try:
            event = json.loads(line)
        except ValueError as error:
            if number > len(lines):
                logger.warning(f"{file}: the last line is incomplete. It was never acknowledged, and is left out.")
                break
            raise ValueError(f"{file}, line {number}, is no vote: {error}") from error
        events.append(event if isinstance(event, dict) else {})
    return events


def read_events(file: str | Path, dimensions: Iterable[str], guideline: str | None = None) -> list[dict[str, Any]]:
    """
    The votes, skips and undos of a study, see [`read_event_lines`].

    Args:
        file (`str` or `Path`): The file.
        dimensions (`Iterable[str]`): The questions.
        guideline (`str`, *optional*): Hash of the present questions and guidelines. Votes under another one may then answer other questions.

    Raises:
        ValueError: if a line is damaged or an event cannot be used; names the line.
    """
    dimensions, events = list(dimensions), read_event_lines(file)
    for number, event in enumerate(events, 1):
        is_earlier = guideline is not None and event.get("guideline", guideline) != guideline
        labels = event.get("labels")
        try:
            check_event(event, labels if is_earlier and isinstance(labels, dict) else dimensions)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}, is no vote: {error}") from error
    return events


def current_votes(events: Iterable[dict[str, Any]], kinds: Iterable[str] = ("vote",)) -> list[dict[str, Any]]:
    """
    What counts of a list of events: the last one of each person on each pair, unless it is an undo.

    Args:
        events (`Iterable[dict]`): Events, in the order in which they were written.
        kinds (`Iterable[str]`, *optional*, defaults to `("vote",)`): Which kinds to return, of `"vote"` and `"skip"`.
    """
    last = {(event["annotator"], event["pair_id"]): event for event in events}
    return [event for event in last.values() if event["kind"] in tuple(kinds)]
