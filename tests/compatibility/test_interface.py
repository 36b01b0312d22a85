# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What users of version 0.1 rely on: `interface_0_1.json` was written by that version."""

import dataclasses
import importlib
import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import tapo_trl
from tapo_trl.cli.main import command_module
from tapo_trl.moved import MOVED


# Without a successor: huggingface_hub repeats requests itself
GONE = {"tapo_trl.trainer.hub": {"with_retries", "is_transient", "retry_after"}}
BEFORE = json.loads((Path(__file__).parent / "interface_0_1.json").read_text())


def test_public_names():
    assert set(BEFORE["all"]) <= set(tapo_trl.__all__)


@pytest.mark.parametrize("name", BEFORE["signatures"])
def test_signatures(name):
    parameters = inspect.signature(getattr(tapo_trl, name).__init__).parameters.values()
    found = [
        str(parameter).split(":")[0]
        if parameter.default is parameter.empty
        else f"{parameter.name}={parameter.default!r}"
        for parameter in parameters
    ]
    before = BEFORE["signatures"][name]
    assert found[: len(before)] == before
    assert all("=" in parameter for parameter in found[len(before) :])  # what is new is optional, and comes last


@pytest.mark.parametrize("name", BEFORE["configs"])
def test_fields_and_defaults_of_configs(name):
    fields = {
        field.name: repr(field.default if field.default_factory is dataclasses.MISSING else field.default_factory())
        for field in dataclasses.fields(getattr(tapo_trl, name))
    }
    assert {key: fields.get(key) for key in BEFORE["configs"][name]} == BEFORE["configs"][name]


@pytest.mark.parametrize("command", BEFORE["flags"])
def test_flags_and_defaults_of_commands(command):
    parser = command_module(command).make_parser()
    flags = {flag: repr(action.default) for action in parser._actions for flag in action.option_strings}
    assert {flag: flags.get(flag) for flag in BEFORE["flags"][command]} == BEFORE["flags"][command]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("module", BEFORE["modules"])
def test_old_modules(module):
    found = importlib.import_module(module)
    missing = {name for name in BEFORE["modules"][module] if not hasattr(found, name)}
    assert missing == GONE.get(module, set())


def test_old_module_warns():
    code = "from tapo_trl.trainer.callbacks import EMACallback; import tapo_trl; assert EMACallback is tapo_trl.EMACallback"
    run = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True)
    assert "`tapo_trl.trainer.callbacks` is now `tapo_trl.callbacks`" in run.stderr


def test_every_moved_module_was_one():
    assert {f"tapo_trl.{name}" for name in MOVED} <= set(BEFORE["modules"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pickles_of_old_modules():
    # Protocol 0 writes the path as text
    data = pickle.dumps(tapo_trl.EMACallback, protocol=0).replace(
        b"tapo_trl.callbacks.ema", b"tapo_trl.trainer.callbacks"
    )
    assert pickle.loads(data) is tapo_trl.EMACallback
