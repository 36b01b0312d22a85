# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import subprocess
import zipfile

import pytest

from tapo_trl.rewards.pretrained import instructions
from tapo_trl.rewards.pretrained.instructions import instruction_path, prepare_instruction, read_instruction


MODULE = '''
import nothing_that_is_here
INSTRUCTION = """
Rate it.  \\n\\tPrompt - {text_prompt}
"""
other = 3
prompt_with_special_token = "\\nSay: <|Reward|>\\n"
raise SystemExit("this must not run")
'''
TEXT = "\nRate it.  \n\tPrompt - {text_prompt}\n\nSay: <|Reward|>\n"


@pytest.fixture(autouse=True)
def own_home(monkeypatch, tmp_path):
    monkeypatch.setattr("tapo_trl.files.HF_HOME", str(tmp_path / "home"))


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "hpsv3-1.0.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hpsv3/dataset/data_collator_qwen.py", MODULE)
    return path


def test_wheel_is_parsed_and_not_imported(wheel):
    path = prepare_instruction("hpsv3", wheel)
    assert path == instruction_path("hpsv3") and path.read_bytes().decode() == TEXT
    assert read_instruction("hpsv3") == TEXT
    assert [file.name for file in path.parent.iterdir()] == ["hpsv3.txt"]


def test_files_can_be_given(wheel, tmp_path):
    assert read_instruction("hpsv3", wheel) == TEXT
    module = tmp_path / "prompt_template.py"
    module.write_text("DETAILED_PROMPT_WITH_SPECIAL_TOKEN = '{text_prompt}: <|VQ_reward|>'\n")
    assert read_instruction("videoreward", module) == "{text_prompt}: <|VQ_reward|>"
    text = tmp_path / "own.txt"
    text.write_bytes(TEXT.replace("\n", "\r\n").encode())
    assert read_instruction("hpsv3", text) == TEXT.replace("\n", "\r\n")


def test_download(monkeypatch, wheel):
    commands = []

    def run(command, **options):
        commands.append(command)
        (command[-1] / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(instructions.subprocess, "run", run)
    prepare_instruction("hpsv3")
    assert read_instruction("hpsv3") == TEXT
    assert commands[0][1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in commands[0] and "hpsv3==1.0.0" in commands[0]


def test_download_that_fails(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "first line\nERROR: no network\n")
    monkeypatch.setattr(instructions.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(OSError, match=r"`hpsv3==1.0.0` could not be downloaded: ERROR: no network.*--source FILE"):
        prepare_instruction("hpsv3")
    assert not instruction_path("hpsv3").exists()


def test_file_of_an_address(monkeypatch, tmp_path):
    module = tmp_path / "prompt_template.py"
    module.write_text("DETAILED_PROMPT_WITH_SPECIAL_TOKEN = '{text_prompt}'\n")
    addresses = []

    def urlopen(address, timeout):
        addresses.append(address)
        return module.open("rb")

    monkeypatch.setattr(instructions.urllib.request, "urlopen", urlopen)
    assert prepare_instruction("videoreward").read_text() == "{text_prompt}"
    assert addresses[0].endswith("/prompt_template.py") and len(addresses[0].split("/")[-2]) == 40

    def refuse(address, timeout):
        raise OSError("no route")

    monkeypatch.setattr(instructions.urllib.request, "urlopen", refuse)
    with pytest.raises(OSError, match=r"could not be fetched: no route. Get it on another machine"):
        prepare_instruction("videoreward")
    assert read_instruction("videoreward") == "{text_prompt}"  # the old one is still there


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.py", "INSTRUCTION = '{text_prompt}'", "has no string constant `prompt_with_special_token`"),
        ("a.py", "INSTRUCTION = f'{text_prompt}'", "has no string constant `INSTRUCTION`"),
        ("a.py", "INSTRUCTION = 'a", "is not the original of the reward `hpsv3`"),
        ("a.whl", "no zip", "is not the original of the reward `hpsv3`"),
        ("a.txt", "no place for it", "lacks `{text_prompt}`"),
        ("a.txt", "{text_prompt} {other}", "no braces but `{text_prompt}`"),
        ("a.txt", "{text_prompt} {", "no braces but"),
        ("a.txt", "{text_prompt.prompt}", "no braces but"),
        ("a.txt", "\udcff{text_prompt}", "is no text"),
    ],
)
def test_other_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read_instruction("hpsv3", path)


def test_a_wheel_without_the_module(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other.py", "")
    with pytest.raises(ValueError, match="is not the original of the reward `hpsv3`"):
        prepare_instruction("hpsv3", tmp_path / "other.whl")


def test_rewards_without_instructions():
    with pytest.raises(ValueError, match="`clip` needs no instruction: hpsv3, videoreward do"):
        prepare_instruction("clip")


def test_missing():
    with pytest.raises(ValueError, match="`tapo-trl rewards --prepare hpsv3`"):
        read_instruction("hpsv3")
    with pytest.raises(ValueError, match="There is no file `none.whl`"):
        prepare_instruction("hpsv3", "none.whl")
