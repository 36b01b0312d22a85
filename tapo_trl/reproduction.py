# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
The reproduction of the paper's tables and figures. Its modules are part of a checkout, in `benchmarks/reproduction`, and not of
an installed package.
"""

from .checkout import find_in_checkout
from .lazy import lazy_exports


_folder = find_in_checkout("benchmarks/reproduction")
if _folder is None:
    raise ImportError(
        "`tapo_trl.reproduction` and `tapo-trl reproduce` need a checkout of the repository: clone it, and start from its root."
    )
__path__ = [str(_folder)]

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".experiments": ("EXPERIMENTS", "Experiment"),
        ".lab": ("Lab",),
        ".runs": ("Run", "RunQueue"),
        ".world": ("World", "load_world"),
    },
)
