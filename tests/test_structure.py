# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Limits that keep the package readable."""

import ast
from pathlib import Path

import pytest

import tapo_trl
from tapo_trl import DiffusionDPOTrainer, FlowGRPOTrainer, OnlineDiffusionDPOTrainer, SLRMTrainer, TAPOTrainer


PACKAGE = Path(tapo_trl.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST_MODULE, LONGEST_FUNCTION = 450, 60


def lines_of_body(function: ast.FunctionDef) -> int:
    """Lines of a function without its signature and its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_length(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_MODULE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert lines_of_body(node) <= LONGEST_FUNCTION, node.name


@pytest.mark.parametrize("trainer", [TAPOTrainer, FlowGRPOTrainer, OnlineDiffusionDPOTrainer])
def test_chain_of_online_trainers(trainer):
    names = [own.__name__ for own in trainer.__mro__]
    assert names == [trainer.__name__, "RolloutTrainer", "DiffusionTrainer", "_BaseTrainer", "Trainer", "object"]


def test_chain_of_the_others():
    chain = ["PreferenceTrainer", "DiffusionTrainer", "_BaseTrainer", "Trainer", "object"]
    assert [own.__name__ for own in DiffusionDPOTrainer.__mro__][1:] == chain
    assert [own.__name__ for own in SLRMTrainer.__mro__][1:] == [*chain[:2], "RewardTrainer", *chain[2:]]
