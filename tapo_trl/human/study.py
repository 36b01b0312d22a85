# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""A study is a folder: its questions, prompts, media and pairs, and the votes that people give."""

import hashlib
import json
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..field_types import convert, field_types
from ..files import atomic_write


VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Dimension:
    """
    A question about a pair, which is answered with left, tie or right.

    Args:
        name (`str`): Name of the column: the labels are exported as `label_<name>`.
        question (`str`): The question on the page.
        guideline (`str`, *optional*, defaults to `""`): How to answer it, shown on the page of guidelines.
    """

    name: str
    question: str
    guideline: str = ""

    def __post_init__(self):
        if not self.name.isidentifier():
            raise ValueError(f"`dimensions`: {self.name!r} is no name: use letters, digits and underscores.")


VISUAL_QUALITY = Dimension(
    "visual_quality",
    "Which looks better?",
    "Look at sharpness, details, lighting and layout. Do not look at how well it fits the text.",
)
MOTION_CONSISTENCY = Dimension(
    "motion_consistency",
    "Which moves better?",
    "Motion should be smooth and physically plausible. Things should keep their shape and identity from frame to frame.",
)
TEXT_ALIGNMENT = Dimension(
    "text_alignment",
    "Which shows the text better?",
    "Check each thing that the text names: subjects, their number and colours, action, place and style.",
)


AESTHETICS = Dimension(
    "aesthetics",
    "Which do you like better?",
    "Your own taste counts. Consider the quality, and whether there are artifacts.",
)
# Sections B.2 and C.1 of the paper
VIDEO_DIMENSIONS = [VISUAL_QUALITY, MOTION_CONSISTENCY, TEXT_ALIGNMENT]
IMAGE_DIMENSIONS = [VISUAL_QUALITY, TEXT_ALIGNMENT, AESTHETICS]


@dataclass(frozen=True)
class View:
    """
    What people see of a medium: what training will read of it. Otherwise length, size and frame rate tell which model
    made it, and people judge seconds that a reward model never sees.

    Args:
        height (`int`): Height in pixels.
        width (`int`): Width in pixels.
        num_frames (`int`, *optional*): Number of frames, from the start. Required for videos.
        fps (`float`, *optional*, defaults to `16.0`): Frames per second.
    """

    height: int
    width: int
    num_frames: int | None = None
    fps: float = 16.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")


@dataclass(frozen=True)
class Pair:
    """
    Two media of one prompt, a line of `pairs.jsonl`.

    Args:
        pair_id (`str`): Its name, unique in the study.
        prompt_id (`str`): Name of the prompt.
        prompt (`str`): The prompt.
        media_0 (`str`): File of medium 0, relative to the folder of the study.
        media_1 (`str`): File of medium 1.
        source_0 (`str`): The model that made medium 0.
        source_1 (`str`): The model that made medium 1.
        gold (`dict[str, float]`, *optional*): Known answers by dimension: 1 if medium 0 is better, 0.5 for a tie, 0 if medium 1 is.
        repeat_of (`str`, *optional*): `pair_id` of the pair that this one repeats, with the sides swapped.
    """

    pair_id: str
    prompt_id: str
    prompt: str
    media_0: str
    media_1: str
    source_0: str
    source_1: str
    gold: dict[str, float] | None = None
    repeat_of: str | None = None

    @property
    def media(self) -> tuple[str, str]:
        return self.media_0, self.media_1

    @property
    def sources(self) -> tuple[str, str]:
        return self.source_0, self.source_1


@dataclass
class Study:
    """
    The settings of a study, which are in `study.yaml` in its folder.

    Args:
        title (`str`, *optional*, defaults to `"Preferences"`): Title of the page.
        guidelines (`str`, *optional*, defaults to `""`): Text above the questions on the page of guidelines.
        dimensions (`list[Dimension]`, *optional*): The questions. Visual quality, motion consistency and text alignment by default, as in
            the paper (section B.2).
        votes_per_pair (`int`, *optional*): People who see each pair. All by default.
        gold_every (`int`, *optional*, defaults to `10`): A person sees a pair with known answers once in so many pairs, while there are any.
        min_seconds (`float`, *optional*, defaults to `1.0`): Votes that took less time are reported, and can be left out of exports.
        view (`View`, *optional*): What people see of a medium. The whole file by default.
        seed (`int`, *optional*, defaults to `0`): Seed of sides, order and generated media.
        folder (`Path`, *optional*): The folder. Set by [`Study.load`].
    """

    title: str = "Preferences"
    guidelines: str = ""
    dimensions: list[Dimension] = field(default_factory=lambda: list(VIDEO_DIMENSIONS))
    votes_per_pair: int | None = None
    gold_every: int = 10
    min_seconds: float = 1.0
    view: View | None = None
    seed: int = 0
    folder: Path = Path()

    def __post_init__(self):
        self.dimensions = [_build(Dimension, value, "dimensions") for value in self.dimensions]
        if self.view is not None:
            self.view = _build(View, self.view, "view")
        if not self.dimensions:
            raise ValueError("`dimensions` is empty: a study needs a question.")
        if len(set(self.dimension_names)) < len(self.dimensions):
            raise ValueError(f"`dimensions` has a name twice: {self.dimension_names}.")
        for name in ("votes_per_pair", "gold_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    @classmethod
    def load(cls, folder: str | Path) -> "Study":
        """
        Read the settings of a study.

        Args:
            folder (`str` or `Path`): Its folder.

        Raises:
            ValueError: if the folder has no `study.yaml`, or one that cannot be used.
        """
        file = Path(folder) / "study.yaml"
        if not file.is_file():
            raise ValueError(
                f"{folder} is no study: it has no study.yaml. `tapo-trl prompts {folder} ...` starts one."
            )
        try:
            settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            if not isinstance(settings, dict):
                raise ValueError("it must be a mapping of settings to values")
            study = _build(cls, settings, file.name)
        except (yaml.YAMLError, ValueError, TypeError) as error:
            raise ValueError(f"{file} cannot be used: {error}") from error
        study.folder = Path(folder)
        return study

    def save(self, folder: str | Path) -> None:
        """Write `study.yaml` into a folder, which is made if it does not exist."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in asdict(self).items() if key != "folder"}
        with atomic_write(self.folder / "study.yaml") as aside:
            aside.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")

    @property
    def dimension_names(self) -> list[str]:
        return [dimension.name for dimension in self.dimensions]

    @property
    def guideline_hash(self) -> str:
        """Short hash of all that tells people how to answer. Votes under another one must not be pooled silently."""
        text = json.dumps([self.guidelines, [asdict(dimension) for dimension in self.dimensions]])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def read_prompts(self) -> list[dict[str, Any]]:
        """The rows of `prompts.jsonl`: `prompt_id`, `prompt` and `meta`."""
        rows = read_jsonl(self.folder / "prompts.jsonl", required=("prompt_id", "prompt"))
        if not rows:
            raise ValueError(f"{self.folder} has no prompts: `tapo-trl prompts {self.folder} ...` writes them.")
        return rows

    def read_pairs(self) -> list[Pair]:
        """
        The pairs of `pairs.jsonl`.

        Raises:
            ValueError: if there are none, a row cannot be used, or a name is there twice.
        """
        file = self.folder / "pairs.jsonl"
        required = ("pair_id", "prompt_id", "prompt", "media_0", "media_1", "source_0", "source_1")
        pairs = [_build(Pair, row, f"{file}, line {line}") for line, row in enumerate(read_jsonl(file, required), 1)]
        if not pairs:
            raise ValueError(f"{self.folder} has no pairs: `tapo-trl pairs {self.folder} ...` writes them.")
        counts = Counter(pair.pair_id for pair in pairs)
        doubled = [name for name, number in counts.items() if number > 1]
        if doubled:
            raise ValueError(f"{file} has a `pair_id` twice: {doubled[:3]}.")
        for pair in pairs:
            self._check_pair(pair, counts, file)
        return pairs

    def _check_pair(self, pair: Pair, names: Container[str], file: Path) -> None:
        for name, value in vars(pair).items():
            if name != "gold" and value is not None and not isinstance(value, str):
                raise ValueError(
                    f"{file}, pair {pair.pair_id}: `{name}` must be text in quotation marks, but is {value!r}."
                )
        if self.view is not None and self.view.num_frames is None and any(map(is_video, pair.media)):
            raise ValueError(f"{self.folder / 'study.yaml'}: `view` needs `num_frames`, since the study has videos.")
        for medium in pair.media:
            path = Path(medium)
            if path.is_absolute() or ".." in path.parts or path.suffix.lower() not in VIDEO_SUFFIXES + IMAGE_SUFFIXES:
                raise ValueError(
                    f"{file}, pair {pair.pair_id}: {medium!r} must be an image or a video inside of the study's folder."
                )
        if pair.repeat_of is not None and pair.repeat_of not in names:
            raise ValueError(f"{file}, pair {pair.pair_id} repeats {pair.repeat_of!r}, which does not exist.")
        unknown = set(pair.gold or {}) - set(self.dimension_names)
        if unknown:
            raise ValueError(
                f"{file}, pair {pair.pair_id}: `gold` names {sorted(unknown)}, which study.yaml does not ask."
            )

    def write_pairs(self, pairs: Sequence[Pair]) -> None:
        """Write `pairs.jsonl`."""
        rows = ({key: value for key, value in asdict(pair).items() if value is not None} for pair in pairs)
        write_jsonl(self.folder / "pairs.jsonl", rows)


def is_video(medium: str | Path) -> bool:
    """Whether a file is a video, by its suffix."""
    return Path(medium).suffix.lower() in VIDEO_SUFFIXES


def _build(kind: type, value: Any, place: str) -> Any:
    """An instance of a dataclass from a mapping, with its values in the types of the fields."""
    if isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected a mapping, got {value!r}.")
    hints = field_types(kind)
    unknown = sorted(set(value) - set(hints) | set(value) & {"folder"})
    if unknown:
        raise ValueError(
            f"{place}: unknown key {unknown[0]!r}; there are {[name for name in hints if name != 'folder']}."
        )
    try:
        values = {
            key: part if key in ("dimensions", "view") else convert(key, part, hints[key])
            for key, part in value.items()
        }
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error


def read_jsonl(file: Path, required: Iterable[str] = ()) -> list[dict[str, Any]]:
    """
    The rows of a JSONL file; none if there is no file.

    Raises:
        ValueError: if a line is no JSON object or lacks a key; names the line.
    """
    if not file.exists():
        return []
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text: {error}") from error
    rows = []
    # Not `splitlines`, which also splits at characters that a prompt may have, such as U+2028
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}, is no JSON: {error}") from error
        missing = [key for key in required if key not in row] if isinstance(row, dict) else list(required)
        if not isinstance(row, dict) or missing:
            raise ValueError(f"{file}, line {number}, lacks {missing}.")
        rows.append(row)
    return rows


def write_jsonl(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file, whole or not at all."""
    with atomic_write(file) as aside:
        aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
