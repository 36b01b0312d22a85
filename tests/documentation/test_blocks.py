# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
Every `bash` and `python` block of the documentation runs, but for those that `substitutions.EXEMPT` gives a reason for. Commands of other
tools, in environments of their own, are in `sh` blocks.
"""

import os
import re
import shutil
import sys
import traceback
from pathlib import Path

import pytest

from tests.documentation import sandbox, substitutions
from tests.documentation.sandbox import ROOT, blocks_of, commands_of
from tests.documentation.substitutions import reason_not_to_run
from tests.processes import start


FILES = ("*.md", "docs/*.md", "examples/*.ipynb", "examples/*/*.md", "benchmarks/*.md")
PAGES = {str(page.relative_to(ROOT)): blocks_of(page) for pattern in FILES for page in sorted(ROOT.glob(pattern))}
BASH = {
    f"{page} {number}": list(commands_of(block.text))
    for page, blocks in PAGES.items()
    for number, block in enumerate(blocks)
    if block.language == "bash"
}
NOT_IN_CI = ("examples/moving_emoji/", "examples/words/", "benchmarks/")
PYTHON = {page: [block.text for block in blocks if block.language == "python"] for page, blocks in PAGES.items()}


def run_in(folder, function, *args):
    """In a process of its own, in `folder`, with what is printed in a file there."""
    log = folder / "log.txt"
    process = start(_run, folder, log, function, args)
    process.join()
    assert process.exitcode == 0, log.read_text()[-4000:]


def _run(folder, log, function, args):
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        function(*args)
    except SystemExit as exit:
        sys.exit(exit.code)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sandbox")
    run_in(folder, sandbox.build, folder)
    return folder


@pytest.fixture
def folder(built, tmp_path):
    """A sandbox of the test's own: what one command writes is not there for the next."""
    yield Path(shutil.copytree(built, tmp_path / "sandbox"))
    shutil.rmtree(tmp_path / "sandbox")


def test_the_pages_are_found():
    assert {"README.md", "docs/cli.md", "docs/resuming.md"} <= PAGES.keys()
    assert sum(map(len, BASH.values())) > 40 and sum(map(len, PYTHON.values())) > 25


def test_every_exemption_is_needed():
    texts = [" ".join(command) for commands in BASH.values() for command in commands]
    texts += [block for blocks in PYTHON.values() for block in blocks]
    unused = [pattern for pattern in substitutions.EXEMPT if not any(re.match(pattern, text) for text in texts)]
    assert not unused


def marked(block):
    return pytest.param(block, marks=pytest.mark.exhaustive if block.startswith(NOT_IN_CI) else ())


@pytest.mark.slow
@pytest.mark.parametrize("block", map(marked, BASH))
def test_commands(folder, block):
    reasons = [reason_not_to_run(" ".join(words)) for words in BASH[block]]
    if None not in reasons:
        pytest.skip("; ".join(dict.fromkeys(reasons)))
    for words, reason in zip(BASH[block], reasons, strict=True):
        if reason is None:
            run_in(folder, sandbox.run_command, words)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, blocks in PYTHON.items() if blocks])
def test_python(folder, page):
    blocks = [block for block in PYTHON[page] if reason_not_to_run(block) is None]
    run_in(folder, sandbox.run_python, blocks, page)
