# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Where the time of a training goes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def on_forward(network: nn.Module, add: Callable[[int], None]) -> RemovableHandle:
    """Call `add` with the number of latents of every forward of a diffusers transformer, whose first argument they are."""
    return network.register_forward_pre_hook(
        lambda module, args, kwargs: add(len(next(iter(kwargs.values())))), with_kwargs=True
    )


@dataclass
class Stage:
    """
    What was measured of one stage.

    Args:
        seconds (`float`): time in it, without the stages inside of it.
        calls (`int`): how often it ran.
        latents (`int`): latents that went through its network, guidance not counted twice.
    """

    seconds: float = 0.0
    calls: int = 0
    latents: int = 0


@dataclass
class StageTimer:
    """
    Times nested stages of a program, each without what is nested in it.

    On an accelerator every stage begins and ends with a synchronisation, which slows the program down a little and is why
    a timer has to be switched on.

    Args:
        enabled (`bool`, *optional*, defaults to `False`): without it, nothing is measured and nothing costs time.
        device (`torch.device`, *optional*): where the work is done. The CPU by default.
    """

    enabled: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stages: dict[str, Stage] = field(default_factory=dict)
    _started: float = field(default=0.0, repr=False)
    _inner: list[float] = field(default_factory=list, repr=False)

    @contextmanager
    def stage(self, name: str, latents: int = 0) -> Iterator[None]:
        """
        Args:
            name (`str`): stage that the body of the `with` statement belongs to.
            latents (`int`, *optional*, defaults to `0`): latents that go through a network in it.
        """
        if not self.enabled:
            yield
            return
        start = self._now()
        if not self.stages:
            self._started = start
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = self._now() - start
            stage = self.stages.setdefault(name, Stage())
            stage.seconds += elapsed - self._inner.pop()
            stage.calls += 1
            stage.latents += latents
            if self._inner:
                self._inner[-1] += elapsed

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def table(self) -> str:
        """
        Seconds, calls, latents and share of the time since the first stage began, of each stage and of all else; and the
        share of the networks' forwards in the time of the rollouts.
        """
        total = self._now() - self._started
        rows = sorted(self.stages.items(), key=lambda item: -item[1].seconds)
        other = Stage(seconds=total - sum(stage.seconds for _, stage in rows))
        lines = [f"{'stage':<28}{'seconds':>10}{'calls':>8}{'latents':>9}{'share':>8}"]
        for name, stage in [*rows, ("everything else", other)]:
            numbers = (
                f"{stage.seconds:>10.2f}{stage.calls or '':>8}{stage.latents or '':>9}{stage.seconds / total:>8.1%}"
            )
            lines.append(f"{name:<28}{numbers}")
        lines.append(f"{'all':<28}{total:>10.2f}")
        rollout = [stage.seconds for name, stage in rows if name in ROLLOUT_STAGES]
        forwards = [stage.seconds for name, stage in rows if name in ROLLOUT_FORWARDS]
        if rollout:
            lines.append(f"{sum(forwards) / sum(rollout):.1%} of the time of the rollouts is spent in forwards.")
        return "\n".join(lines)


ROLLOUT_FORWARDS = ("policy", "reward")
ROLLOUT_STAGES = (*ROLLOUT_FORWARDS, "stochastic steps", "selection", "rollout")
