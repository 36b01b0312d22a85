# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Limits that keep the package readable."""

import ast
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig

import tapo_trl
from tapo_trl import (
    DiffusionDPOTrainer,
    DiffusionNFTTrainer,
    FlowGRPOTrainer,
    OnlineDiffusionDPOTrainer,
    SLRMTrainer,
    TAPOConfig,
    TAPOTrainer,
)
from tests.testing_utils import tiny_sd3_pipeline


PACKAGE = Path(tapo_trl.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST_MODULE, LONGEST_FUNCTION = 450, 60
MOST_FILES_TO_THE_LOSS = 24


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


@pytest.mark.parametrize("trainer", [TAPOTrainer, FlowGRPOTrainer, OnlineDiffusionDPOTrainer, DiffusionNFTTrainer])
def test_chain_of_online_trainers(trainer):
    names = [own.__name__ for own in trainer.__mro__]
    assert names == [trainer.__name__, "RolloutTrainer", "DiffusionTrainer", "_BaseTrainer", "Trainer", "object"]


def test_chain_of_the_others():
    chain = ["PreferenceTrainer", "DiffusionTrainer", "_BaseTrainer", "Trainer", "object"]
    assert [own.__name__ for own in DiffusionDPOTrainer.__mro__][1:] == chain
    assert [own.__name__ for own in SLRMTrainer.__mro__][1:] == [*chain[:2], "RewardTrainer", *chain[2:]]


def test_files_from_the_constructor_to_the_first_loss(tmp_path, monkeypatch):
    """The files of the package that a reader goes through: those whose functions are called. Imports do not count."""
    entered, compute_loss = set(), TAPOTrainer.compute_loss

    def on_call(frame, event, argument, folder=f"{PACKAGE}/"):
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(folder) and frame.f_code.co_name != "<module>":
            entered.add(file.removeprefix(folder))

    def first_loss(trainer, *args, **kwargs):
        loss = compute_loss(trainer, *args, **kwargs)
        sys.setprofile(None)
        return loss

    monkeypatch.setattr(TAPOTrainer, "compute_loss", first_loss)
    args = TAPOConfig(
        str(tmp_path),
        resolution=32,
        max_sequence_length=8,
        num_inference_steps=4,
        num_sde_steps=2,
        num_candidates=2,
        max_steps=1,
        bf16=False,
        report_to="none",
        cache_dir=str(tmp_path),
    )
    pipeline, prompts = tiny_sd3_pipeline(), Dataset.from_dict({"prompt": ["a cat", "a dog"] * 4})
    sys.setprofile(on_call)
    try:
        trainer = TAPOTrainer(
            pipeline, lambda images, prompts: images.mean((1, 2, 3)), args, prompts, peft_config=LoraConfig(r=2)
        )
        trainer.train()
    finally:
        sys.setprofile(None)
    entered.discard("moved.py")  # looks for modules while others are imported
    assert {"trainer/tapo_trainer.py", "rollouts/pairs.py", "losses.py"} <= entered
    assert len(entered) <= MOST_FILES_TO_THE_LOSS, " ".join(sorted(entered))
