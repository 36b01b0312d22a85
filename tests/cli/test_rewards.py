# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest

from tapo_trl.cli.main import main
from tapo_trl.rewards import list_rewards
from tapo_trl.rewards.pretrained.instructions import read_instruction


def test_table(capsys):
    main(["rewards"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(list_rewards())]] == list_rewards()
    hpsv3 = next(line for line in lines if line.startswith("hpsv3 "))
    assert "14.4 GiB" in hpsv3 and "MizzenAI/HPSv3" in hpsv3 and "MIT" in hpsv3


def test_prepare(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tapo_trl.files.HF_HOME", str(tmp_path))
    module = tmp_path / "data_collator_qwen.py"
    module.write_text("INSTRUCTION = 'Rate {text_prompt}'\nprompt_with_special_token = ': <|Reward|>'\n")
    main(["rewards", "--prepare", "hpsv3", "--source", str(module)])
    assert "The instruction of the reward `hpsv3` is in " in capsys.readouterr().out
    assert read_instruction("hpsv3") == "Rate {text_prompt}: <|Reward|>"


def test_source_without_prepare():
    with pytest.raises(SystemExit):
        main(["rewards", "--source", "a.whl"])
