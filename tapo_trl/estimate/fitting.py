# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Whether a device has memory for a training with and without recomputation of activations, and in which chunks."""

from dataclasses import dataclass

from .memory import Activations
from .report import Row


RESERVE = 0.1
"""Share of a device's memory that is left for what no estimate counts: buffers, the context of the driver, fragmentation."""


@dataclass(frozen=True)
class Chunks:
    """
    How the forward and backward passes of a training are split.

    Args:
        activations ([`Activations`]): Bytes that one latent keeps.
        latents (`int`): Latents of one example, guidance counted twice.
        option (`str`): The option that sets the number of examples in a chunk.
        number (`int`): Its value.
        most (`int`, *optional*): The number of examples beyond which a larger chunk changes nothing.
        is_recomputing (`bool`): `activation_checkpointing` of the training.
        other (`int`): Bytes of all but the activations.
    """

    activations: Activations
    latents: int
    option: str
    number: int
    most: int | None
    is_recomputing: bool
    other: int

    def rows(self) -> list[Row]:
        """Activations of a chunk of the training."""
        return self.activations.rows(self.number * self.latents, self.is_recomputing)

    def bytes_of(self, number: int, recomputes: bool) -> int:
        """Activations of a chunk of `number` examples."""
        return sum(row.value for row in self.activations.rows(number * self.latents, recomputes))

    def largest(self, available: int, recomputes: bool) -> int:
        """Examples in the largest chunk whose activations have so many bytes."""
        number = max(available, 0) // self.bytes_of(1, recomputes)
        return number if self.most is None else min(number, self.most)


def fitting_lines(chunks: Chunks, device_memory: float) -> list[str]:
    """
    What fits a device, in words. Nothing is set: the training goes on with the options that it was given.

    Args:
        chunks ([`Chunks`]): The training.
        device_memory (`float`): Memory of the device in GiB.
    """
    available = int((1 - RESERVE) * device_memory * 2**30) - chunks.other
    kept, recomputed = (chunks.largest(available, recomputes) for recomputes in (False, True))
    now = chunks.largest(available, chunks.is_recomputing) >= chunks.number
    option, setting = chunks.option, str(chunks.is_recomputing).lower()
    lines = [
        f"A device of {device_memory:g} GiB, of which {RESERVE:.0%} is left for what is not estimated:",
        f"{kept:>8,} largest {option} without recomputation (activation_checkpointing: false)",
        f"{recomputed:>8,} largest {option} with recomputation (activation_checkpointing: true)",
        f"{'':>8} This training ({option}: {chunks.number}, activation_checkpointing: {setting}) "
        f"{'fits' if now else 'does not fit'}.",
    ]
    if kept >= chunks.number:
        todo = ": set activation_checkpointing: false" if chunks.is_recomputing else ""
        advice = f"Recomputation is not needed{todo}."
    elif kept:
        advice = (
            f"Recomputation is not needed with {option}: {kept}. Which is faster, that or recomputation with larger chunks, "
            "depends on the device."
        )
    elif recomputed:
        verb = "keep" if chunks.is_recomputing else "set"
        advice = f"Recomputation is needed: {verb} activation_checkpointing: true, with {option} up to {recomputed}."
    else:
        advice = f"Not a single example fits: {chunks.other / 2**30:.2f} GiB are taken by all but the activations."
    return [*lines, f"{'':>8} {advice}"]
