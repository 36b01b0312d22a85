# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Meta elements, and combinations of their values."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import yaml


DEFAULT_ELEMENTS = Path(__file__).with_name("elements.yaml")


@dataclass(frozen=True)
class Elements:
    """
    Meta elements of prompts (section B.2 of the paper).

    Args:
        values (`dict[str, dict[str, float]]`): Weight of each value, by element.
        templates (`list[str]`): Prompts with the names of elements in braces.
    """

    values: dict[str, dict[str, float]]
    templates: list[str]

    @classmethod
    def load(cls, file: str | Path | None = None) -> "Elements":
        """
        Read a YAML file with `elements`, each a list of values or a mapping from value to weight, and `templates`.

        Args:
            file (`str` or `Path`, *optional*): The file. By default the eight elements that ship with the package.

        Raises:
            ValueError: if the file cannot be used.
        """
        file = DEFAULT_ELEMENTS if file is None else Path(file)
        if not file.is_file():
            raise ValueError(f"`elements`: there is no file {file}.")
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"`elements`: {file} is not valid YAML: {error}") from error
        lists = content.get("elements") if isinstance(content, dict) else None
        if not isinstance(lists, dict) or not lists:
            raise ValueError(f"`elements`: {file} needs a mapping `elements` from names to lists of values.")
        values = {name: _weights(name, entry, file) for name, entry in lists.items()}
        templates = content.get("templates") or [", ".join(f"{{{name}}}" for name in values)]
        templates = [templates] if isinstance(templates, str) else templates
        for template in templates:
            try:
                template.format(**dict.fromkeys(values, ""))
            except (KeyError, IndexError, ValueError, AttributeError) as error:
                raise ValueError(
                    f"`elements`: the template {template!r} in {file} cannot be filled: {error!r}."
                ) from error
        return cls(values, list(templates))

    @property
    def num_combinations(self) -> int:
        return prod(len(values) for values in self.values.values())

    def sample(self, block: int, seed: int) -> Iterator[dict[str, str]]:
        """
        Different combinations of values, without end as long as there are new ones. In each block of `block`, each value of each
        element has its share.

        Args:
            block (`int`): Combinations in which the shares are kept.
            seed (`int`): Seed.
        """
        rng, seen, misses = random.Random(seed), set(), 0
        while len(seen) < self.num_combinations and misses < 100:
            columns = [_shares(values, block, rng) for values in self.values.values()]
            before = len(seen)
            for combination in zip(*columns, strict=True):
                if combination not in seen:
                    seen.add(combination)
                    yield dict(zip(self.values, combination, strict=True))
            misses = misses + 1 if len(seen) == before else 0


def _weights(name: str, entry: list | dict, file: Path) -> dict[str, float]:
    weights = dict.fromkeys(map(str, entry), 1.0) if isinstance(entry, list) else entry
    if not isinstance(weights, dict) or not weights:
        raise ValueError(
            f"`elements`: {name!r} in {file} must be a list of values, or a mapping from value to weight."
        )
    for value, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ValueError(f"`elements`: the weight of {value!r} of {name!r} in {file} must be a positive number.")
    return {str(value): float(weight) for value, weight in weights.items()}


def _shares(values: dict[str, float], number: int, rng: random.Random) -> list[str]:
    """`number` values in random order, each as often as its weight says, up to one."""
    total = sum(values.values())
    exact = {value: number * weight / total for value, weight in values.items()}
    column = [value for value, count in exact.items() for _ in range(int(count))]
    rest = list(exact)
    rng.shuffle(rest)
    rest.sort(key=lambda value: int(exact[value]) - exact[value])  # largest remainder first
    column += rest[: number - len(column)]
    rng.shuffle(column)
    return column
