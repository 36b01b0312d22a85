# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Public benchmarks: their prompts, the files that their own tools expect, and their scores; and rewards of samples."""

from ..lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".prompts": ("BENCHMARKS", "Benchmark", "load_prompts"),
        ".results": ("read_compbench", "read_geneval", "read_vbench", "vbench_total"),
        ".sampling": ("sample_benchmark",),
    },
)
