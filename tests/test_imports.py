# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Imports run one way: a module imports from its own layer and from those above it in `LAYERS`."""

import ast
from pathlib import Path

import pytest

import tapo_trl


PACKAGE = Path(tapo_trl.__file__).parent
LAYERS = [
    {"version", "lazy", "moved", "checkout", "field_types", "files", "method_card", "profiling", "seeding"},
    {"schedulers", "losses"},
    {"networks"},
    {"policies"},
    {"data"},
    {"rewards"},
    {"rollouts", "metrics"},
    {"media", "runs"},
    {"callbacks", "evaluation"},
    {"human"},
    {"trainer"},
    {"estimate", "benchmark"},
    {"scripts", "cli"},
    {"reproduction"},
]
LAYER_OF = {name: index for index, names in enumerate(LAYERS) for name in names}
MODULES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def imported_names(path: Path) -> set[str]:
    """First parts of what a module imports from the package when it runs, without imports for type checkers."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    package = ["tapo_trl", *path.relative_to(PACKAGE).parts[:-1]]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            full = [*base, *(node.module or "").split("."), *(alias.name for alias in node.names)]
            full = [part for part in full if part]
            names |= {full[1]} if full[0] == "tapo_trl" else set()
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = LAYER_OF[path.relative_to(PACKAGE).parts[0].removesuffix(".py")]
    back = {name for name in imported_names(path) if LAYER_OF.get(name, -1) > own}
    assert not back


def test_a_wrong_import_is_found(tmp_path, monkeypatch):
    (tmp_path / "policies").mkdir()
    module = tmp_path / "policies" / "new.py"
    module.write_text("def f():\n    from ..trainer.base import DiffusionTrainer\n")
    monkeypatch.setattr("tests.test_imports.PACKAGE", tmp_path)
    with pytest.raises(AssertionError, match="trainer"):
        test_imports_run_one_way(module)
