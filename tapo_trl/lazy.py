# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Packages that import their modules when they are used: `import tapo_trl` should not take seconds."""

import importlib
from collections.abc import Callable
from typing import Any


def lazy_exports(
    package: str, modules: dict[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """
    The `__getattr__`, `__dir__` and `__all__` of a package.

    Args:
        package (`str`): its `__name__`.
        modules (`dict[str, tuple[str, ...]]`): names that each of its modules gives, by the module's relative name.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(module_of[name], package), name)

    return __getattr__, lambda: sorted(module_of), sorted(module_of)
