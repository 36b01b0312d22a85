# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
What a training command would do, found out on the meta device: shapes, tokens, parameters, forwards and an estimate of the
memory. No weight is loaded and no data set is opened. This is the report; `dry_run_pairs.py` and `dry_run_rollouts.py` have
those of the commands.
"""

from dataclasses import dataclass, field

from accelerate import PartialState


ESTIMATE_NOTE = (
    "The memory is an estimate from shapes, not a measurement: temporary buffers, the CUDA context and fragmentation come "
    "on top, and sharding (DeepSpeed, FSDP) is not counted. Text encoders are in memory only before the training."
)


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
        sample_tokens (`int`): Tokens of an image or a video in the transformer.
        text_tokens (`int`): Tokens of a prompt.
        parameters (`dict[str, int]`): Number of parameters of each network.
        unit (`str`): What a batch consists of, `"prompt"` or `"pair"`.
        per_step (`int`): Units per optimizer step on one process.
        forwards (`list[Row]`): Latents that go through a network for one unit.
        memory (`list[Row]`): Estimated bytes of one process.
        notes (`list[str]`): Remarks.
    """

    title: str
    size: tuple[int, ...]
    latent_shape: tuple[int, ...]
    sample_tokens: int
    text_tokens: int
    parameters: dict[str, int]
    unit: str
    per_step: int
    forwards: list[Row]
    memory: list[Row]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        height, width, *frames = self.size
        size = "".join(f"{number} frames of " for number in frames) + f"{height} x {width} pixels (height x width)"
        lines = [
            f"Dry run of {self.title}. Nothing was loaded or trained.",
            "",
            f"samples    {size}",
            f"latents    {' x '.join(map(str, self.latent_shape))}",
            f"tokens     {self.sample_tokens:,} of a sample + {self.text_tokens:,} of its prompt",
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
            *self.notes,
        ]
        return "\n".join(lines).rstrip() + "\n"


def print_dry_run(report: DryRun) -> None:
    """Prints the report on one process of several."""
    if PartialState().is_main_process:
        print(report)
