# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Arguments of the commands that people's preferences are collected with. `tapo-trl COMMAND --help` describes the fields."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

from ..data.dimensions import check_dimension_weights
from ..field_types import convert_fields, option, read_mapping


@dataclass
class StudyFolder:
    """The folder of a study."""

    folder: str = option("Folder of the study. It can also be the first word of the command.", "")

    def __post_init__(self):
        convert_fields(self)
        if not self.folder.strip():
            raise ValueError("`folder` is missing: name the folder of the study.")


@dataclass
class PromptsArguments(StudyFolder):
    """Arguments of `tapo-trl prompts`."""

    elements: str | None = option("YAML file of meta elements. By default the eight that ship with the package.")
    prompts: list[str] | None = option("Prompts of your own, or a .txt file with one per line, in place of elements.")
    num: int = option("Number of prompts.", 100)
    llm: str | None = option("Chat model that writes the prompts: Hub id or folder. With `endpoint`: its name there.")
    endpoint: str | None = option("Address of an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1.")
    api_key_env: str = option("Environment variable with the key of the endpoint.", "LLM_API_KEY")
    media: Literal["images", "videos"] = option("What the prompts are for.", "videos")
    max_words: int = option("Longest prompt, in words.", 60)
    temperature: float = option("Temperature of the language model.", 1.0)
    batch_size: int = option("Prompts that the language model writes at once.", 8)
    attempts: int = option("How often the language model is asked for a prompt before a template writes it.", 3)
    seed: int = option("Seed of a new study.", 0)
    title: str = option("Title of a new study.", "Preferences")
    figure: bool = option("Whether to draw the distribution of the elements, `elements.png`. Needs matplotlib.", True)

    def __post_init__(self):
        super().__post_init__()
        for name in ("num", "max_words", "batch_size", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but it is {getattr(self, name)}.")
        if self.temperature <= 0:
            raise ValueError(f"`temperature` must be positive, but it is {self.temperature}.")
        of_endpoints, of_models = ["api_key_env"], ["temperature", "batch_size", "attempts"]
        if self.prompts is not None:
            others = ["elements", "num", "llm", "endpoint", *of_endpoints, "max_words", *of_models, "figure"]
            _refuse(self, others, "has no effect on `prompts`, which are your own: leave one of the two out")
        if self.llm is None and self.endpoint is None:
            _refuse(self, of_models, "is of language models, and has no effect without `llm` or `endpoint`")
        if self.endpoint is None:
            _refuse(self, of_endpoints, "is of endpoints, and has no effect without `endpoint`")


@dataclass
class AnnotateArguments(StudyFolder):
    """Arguments of `tapo-trl annotate`."""

    host: str = option("Address to listen on. All but loopback needs `annotators`.", "127.0.0.1")
    port: int = option("Port; 0 takes a free one.", 8200)
    annotators: list[str] | None = option(
        "Names of people, such as p01 p02. Each gets a secret link, printed once. By default one person without a link."
    )
    allowed_hosts: list[str] | None = option(
        "Names, besides localhost, under which the page answers without links, such as that of a proxy."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.annotators:
            _refuse(self, ["allowed_hosts"], "is for a page without links, and has no effect with `annotators`")
        if not 0 <= self.port < 65536:
            raise ValueError(f"`port` must be in [0, 65535], but it is {self.port}.")


@dataclass
class VotesArguments(StudyFolder):
    """Arguments of `tapo-trl votes`."""

    output_dir: str | None = option("Write a data set of preference pairs to this folder.")
    min_votes: int = option("Votes that an exported pair needs.", 1)
    min_seconds: float = option("Leave out votes that took less, in seconds.", 0.0)
    min_gold_accuracy: float | None = option(
        "Leave out people with a smaller share of right answers to known pairs, of at least 5."
    )
    min_agreement: float | None = option("Leave out pairs whose people agree less, as the share of equal answers.")
    drop_ties: bool = option("Leave out pairs that are tied over all dimensions, whose label is 0.5 otherwise.", False)
    guidelines: Literal["current", "all"] = option(
        "Which votes count after the questions have changed: those on the present ones, or all.", "current"
    )
    dimension_weights: dict[str, float] | str | None = option(
        "Weights of the dimensions, which say which medium is preferred. All 1 by default."
    )
    splits: dict[str, float] | str | None = option(
        "Shares of the splits; the pairs of a prompt stay together. By default {train: 0.8, validation: 0.1, test: 0.1}."
    )
    license: str | None = option("Licence of the data set, as the Hub names it.")
    push_to_hub: str | None = option("Upload the data set to this repository on the Hub, private unless it exists.")
    parquet_dir: str | None = option("Write the images into parquet files in this folder, too. Not for videos.")
    output_file: str | None = option("Write the statistics to this .json file.")
    figure: str | None = option("Draw the win rates to this PNG file. Needs matplotlib.")
    prior: float = option("Prior of the Bradley-Terry scores, in ties against a mean source.", 0.5)

    def __post_init__(self):
        super().__post_init__()
        for name in ("dimension_weights", "splits"):
            read_mapping(self, name)
        if self.dimension_weights is not None:
            check_dimension_weights(self.dimension_weights)
        if self.splits is not None:
            check_splits(self.splits)
        for name in ("min_seconds", "prior"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be at least 0, but it is {getattr(self, name)}.")
        for name in ("min_gold_accuracy", "min_agreement"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], but it is {value}.")
        if self.output_dir is None:
            filters = ("min_votes", "min_seconds", "min_gold_accuracy", "min_agreement", "drop_ties")
            others = ("dimension_weights", "splits", "license", "push_to_hub", "parquet_dir")
            _refuse(self, [*filters, *others], "is of exports, and has no effect without `output_dir`")


@dataclass
class MediaArguments(StudyFolder):
    """How the media of a study are made and paired."""

    batch_size: int = option("Prompts at once.", 1)
    retry_failed: bool = option("Whether to try again what failed before.", False)
    view: dict[str, float] | str | None = option(
        "What people see of a medium, such as {height: 480, width: 832, num_frames: 81, fps: 16}: what training will read. By "
        "default that of study.yaml."
    )
    votes_per_pair: int | None = option("People who see each pair. By default that of study.yaml.")
    gold: int = option(
        "Pairs with a known answer: a medium against one of the same model that shows another prompt.", 0
    )
    repeats: int = option("Pairs that each person sees twice, with the sides swapped.", 0)

    def __post_init__(self):
        super().__post_init__()
        read_mapping(self, "view")
        for name, least in (("batch_size", 1), ("gold", 0), ("repeats", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, but it is {getattr(self, name)}.")


@dataclass
class PairsArguments(MediaArguments):
    """Arguments of `tapo-trl pairs`."""

    model_a: str | None = option("First model: Hub id or folder of a text-to-image or text-to-video pipeline.")
    model_b: str | None = option("Second model. By default the first one.")
    lora_a: str | None = option("LoRA for the first model.")
    lora_b: str | None = option("LoRA for the second model.")
    name_a: str = option("Name of the first model in results.", "a")
    name_b: str = option("Name of the second model in results.", "b")
    kwargs_a: dict[str, Any] | str | None = option("Arguments of the call of the first pipeline.")
    kwargs_b: dict[str, Any] | str | None = option(
        "Arguments of the call of the second pipeline; the first's by default."
    )
    seed_b: int = option(
        "Added to the seeds of the second model. With another one, a model can be paired with itself.", 0
    )
    fps: float = option("Frames per second of videos.", 16.0)
    dtype: str = option("Precision of the weights.", "bfloat16")
    same_source: int = option("Pairs of each model with itself, with two seeds, for this many prompts.", 0)

    def __post_init__(self):
        super().__post_init__()
        for name in ("kwargs_a", "kwargs_b"):
            read_mapping(self, name)
        if self.model_a is None:
            raise ValueError("`model_a` is missing: name a pipeline.")
        if self.same_source < 0:
            raise ValueError(f"`same_source` must be at least 0, but it is {self.same_source}.")
        if not 0 < self.fps < math.inf:
            raise ValueError(f"`fps` must be positive, but it is {self.fps}.")
        if self.name_a == self.name_b:
            raise ValueError("`name_a` and `name_b` must differ.")
        if (
            self.seed_b == 0
            and (self.model_b or self.model_a, self.lora_b) == (self.model_a, self.lora_a)
            and self.kwargs_b
            in (
                None,
                self.kwargs_a,
            )
        ):
            raise ValueError("Both models are the same: give `model_b`, `lora_b`, `kwargs_b` or `seed_b`.")


@dataclass
class StudyArguments(MediaArguments):
    """Arguments of `tapo-trl study`."""

    methods: str | None = option("YAML file of the methods. Without it, the results of the study are printed.")
    compare: Literal["all", "first"] = option(
        "Compare each method with each other one, or the first one with each other one.", "all"
    )
    figure: str | None = option("Draw the win rates to this PNG file. Needs matplotlib.")
    output_file: str | None = option("Write the results to this .json file.")

    def __post_init__(self):
        super().__post_init__()
        if self.methods is not None:
            _refuse(self, ["figure", "output_file"], "is of the results, which are printed without `methods`")
        else:
            own = [field.name for field in fields(MediaArguments) if field.name != "folder"]
            _refuse(self, [*own, "compare"], "has no effect without `methods`")


@dataclass
class RoundsArguments(StudyFolder):
    """Arguments of `tapo-trl rounds`."""

    model_name_or_path: str | None = option("Pipeline that the first round starts from.")
    prompts: list[str] | None = option("Prompts, or a .txt file with one per line.")
    rounds: int = option("Number of rounds.", 1)
    media: Literal["images", "videos"] = option("What the pipeline makes.", "videos")
    slrm_config: str | None = option("YAML recipe of `tapo-trl slrm`. Model, data and folder are those of the round.")
    tapo_config: str | None = option(
        "YAML recipe of `tapo-trl tapo`. Model, reward and folder are those of the round."
    )
    pairs_config: str | None = option("YAML recipe of `tapo-trl pairs`, such as with `kwargs_a` and `dtype`.")
    votes_config: str | None = option("YAML recipe of `tapo-trl votes`, such as with `min_votes`.")
    annotate: str | None = option(
        "Command that gives the votes, with {study} for the folder of the study. By default the loop stops until people have voted."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.model_name_or_path is None or not self.prompts:
            raise ValueError("`model_name_or_path` and `prompts` are both needed.")
        if self.slrm_config is None or self.tapo_config is None:
            raise ValueError("`slrm_config` and `tapo_config` are both needed.")
        if self.rounds < 1:
            raise ValueError(f"`rounds` must be at least 1, but it is {self.rounds}.")


def check_splits(splits: Any) -> None:
    """
    Raises:
        ValueError: if there are no splits, or the share of one is not a positive number.
    """
    shares = splits.values() if isinstance(splits, dict) else ()
    numbers = (
        isinstance(share, (int, float)) and not isinstance(share, bool) and 0 < share < math.inf for share in shares
    )
    if not shares or not all(numbers):
        raise ValueError(
            f"`splits` must give a positive share per split, such as `{{'train': 0.9, 'test': 0.1}}`, but it is {splits}. Leave "
            "out a split to have none."
        )


def _refuse(args: Any, names: Iterable[str], reason: str) -> None:
    defaults = {field.name: field.default for field in fields(args)}
    for name in names:
        if getattr(args, name) != defaults[name]:
            raise ValueError(f"`{name}` {reason}.")
