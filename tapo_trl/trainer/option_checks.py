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

"""Refusing options that cannot act."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from diffusers import DiffusionPipeline
from transformers import TrainingArguments


def check_without_effect(args: TrainingArguments, names: Iterable[str], reason: str) -> None:
    """
    Check that options that have no effect are at their defaults.

    Args:
        args ([`~transformers.TrainingArguments`]): the configuration.
        names (`Iterable[str]`): its fields.
        reason (`str`): why they have none, as the end of a sentence.

    Raises:
        ValueError: if one has another value.
    """
    defaults = {own.name: own.default for own in fields(args)}
    for name in names:
        value = getattr(args, name)
        if value != defaults[name]:
            raise ValueError(f"`{name}={value!r}` has no effect {reason}: leave it unset ({defaults[name]!r}).")


def check_arguments_of_trainer(args: TrainingArguments, model: Any) -> None:
    """
    Check what depends on the trainer's `model`, and options of `Trainer` that something here replaces.

    Args:
        args ([`~transformers.TrainingArguments`]): the configuration.
        model (`Any`): what the trainer got.

    Raises:
        ValueError: if an option would have no effect.
    """
    if isinstance(model, DiffusionPipeline):
        check_without_effect(args, ["model_init_kwargs"], "because `model` is a pipeline that is loaded already")
    check_without_effect(
        args,
        ["enable_jit_checkpoint"],
        "because on SIGTERM these trainers save a checkpoint and stop in any case, at the end of the step",
    )
