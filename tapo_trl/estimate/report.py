# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass, field
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .fitting import Chunks


@dataclass
class Row:
    """A line of a table: a name, a number, and where the number comes from."""

    name: str
    value: int
    formula: str


@dataclass
class DryRun:
    """
    What a dry run found.

    Args:
        title (`str`): Command, pipeline and where its configuration is from.
        size (`tuple[int, ...]`): Height, width and, for video, frames of a sample.
        latent_shape (`tuple[int, ...]`): Shape of one latent.
        tokens (`tuple[int, int]`): Tokens of a sample and of a prompt in the transformer.
        parameters (`dict[str, int]`): Number of parameters of each network.
        unit (`str`): What a batch consists of, `"prompt"` or `"pair"`.
        per_step (`int`): Units per optimizer step on one process.
        forwards (`list[Row]`): Latents that go through a network for one unit.
        memory (`list[Row]`): Estimated bytes of one process.
        notes (`list[str]`): Remarks.
        chunks ([`~estimate.fitting.Chunks`], *optional*): The forward and backward passes, if their activations are estimated.
        fitting (`list[str]`): What fits a device.
    """

    title: str
    size: tuple[int, ...]
    latent_shape: tuple[int, ...]
    tokens: tuple[int, int]
    parameters: dict[str, int]
    unit: str
    per_step: int
    forwards: list[Row]
    memory: list[Row]
    notes: list[str] = field(default_factory=list)
    chunks: "Chunks | None" = None
    fitting: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        height, width, *frames = self.size
        size = "".join(f"{number} frames of " for number in frames) + f"{height} x {width} pixels (height x width)"
        lines = [
            f"Dry run of {self.title}. Nothing was loaded or trained.",
            "",
            f"samples    {size}",
            f"latents    {' x '.join(map(str, self.latent_shape))}",
            "tokens     {:,} of a sample + {:,} of its prompt".format(*self.tokens),
            *(
                f"{'parameters' if index == 0 else '':<11}{number:>14,} {name}"
                for index, (name, number) in enumerate(self.parameters.items())
            ),
            "",
            f"Latents through a network for one {self.unit}, of which an optimizer step has {self.per_step} on each process:",
            *(f"{row.value:>8,} {row.name:<42}{row.formula}" for row in self.forwards),
            "",
            "Estimate of the memory of one process, in GiB (1024^3 bytes):",
            *(f"{row.value / 2**30:>8.2f} {row.name:<42}{row.formula}" for row in self.memory),
            "",
            *self.fitting,
            *self.notes,
        ]
        return "\n".join(lines).rstrip() + "\n"
