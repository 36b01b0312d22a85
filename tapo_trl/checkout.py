# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path


def find_in_checkout(path: str) -> Path | None:
    """
    Find what is in the repository, but not in an installed package.

    Args:
        path (`str`): A file or folder, relative to the repository's root.

    Returns:
        `Path` or `None`: Beside the package, else in the working directory; `None` if it is in neither.
    """
    roots = (Path(__file__).parents[1], Path.cwd())
    return next((root / path for root in roots if (root / path).exists()), None)
