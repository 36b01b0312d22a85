# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""A run that stops in the middle of an epoch and goes on ends exactly where the unbroken one does, under every engine."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.comparing import differences, read, tensor_files
from tests.distributed.conftest import engine_param


pytestmark = pytest.mark.distributed

CASES = [
    engine_param(engine, *runs, run=runs[0])
    for engine in ("ddp", "zero2", "zero3", "fsdp2")
    for runs in (
        ("ema", "ema_resumed"),
        ("adam_bf16", "resumed_bf16"),
        ("slrm_adam", "slrm_resumed"),
        ("nft_adam", "nft_resumed"),
    )
]


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))


@pytest.mark.parametrize(("engine", "unbroken", "resumed"), CASES)
class TestResume:
    def test_last_checkpoints_are_equal(self, results, engine, unbroken, resumed):
        folder = results(engine).folder
        expected = tensor_files(folder / unbroken / "checkpoint-5")
        found = tensor_files(folder / resumed / "checkpoint-5")
        assert expected.keys() == found.keys()
        assert len(expected) >= 3
        for name in expected:
            assert differences(read(expected[name]), read(found[name])) == [], name

    def test_final_models_are_equal(self, results, engine, unbroken, resumed):
        folder = results(engine).folder
        expected, found = (
            {path.relative_to(folder / run): path for path in (folder / run / "final").rglob("*.safetensors")}
            for run in (unbroken, resumed)
        )
        assert expected.keys() == found.keys() and expected
        for name in expected:
            assert differences(load_file(expected[name]), load_file(found[name])) == [], name

    def test_the_step_after_the_checkpoint_was_trained_again(self, results, engine, unbroken, resumed):
        folder = results(engine).folder
        before, after = (tensor_files(path) for path in checkpoints(folder / resumed)[-2:])
        assert any(differences(read(before[name]), read(after[name])) for name in before if "safetensors" in name)
        logs = [results(engine).facts[run]["log_history"] for run in (unbroken, resumed)]
        expected, found = (next(entry for entry in log if entry["step"] == 5) for log in logs)
        assert found["loss"] == expected["loss"]
        assert found["grad_norm"] == expected["grad_norm"]
