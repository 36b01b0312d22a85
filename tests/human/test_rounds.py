# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tapo_trl.cli.main import main
from tapo_trl.human.rounds import Rounds, WaitForVotes
from tapo_trl.human.study import Study
from tapo_trl.human.votes import VoteStore

from .studies import make_study, vote


STEPS = ["prompts", "pairs", "annotate", "votes", "slrm", "tapo", "merge"]


class Runner:
    """Takes note of the commands, and makes the study that `pairs` would make."""

    def __init__(self, folder, fails=None):
        self.folder, self.fails, self.names = folder, fails, []

    def __call__(self, command):
        name = command[3] if command[1] == "-m" else command[0]
        self.names.append(name)
        if name == self.fails:
            raise subprocess.CalledProcessError(1, command)
        if name == "pairs":
            make_study(Path(command[command.index("--folder") + 1]), 2)
        if name == "vote":
            answer(Path(command[1]))


def answer(folder):
    study = Study.load(folder)
    with VoteStore(folder / "votes.jsonl") as store:
        for pair in study.read_pairs():
            store.append(vote("p01", pair.pair_id))


def rounds(folder, run, **options):
    return Rounds(folder, "base", ["a prompt"], {"slrm": "slrm.yaml", "tapo": "tapo.yaml"}, run=run, **options)


class TestSteps:
    def test_in_order_and_each_once(self, tmp_path):
        run = Runner(tmp_path)
        loop = rounds(tmp_path, run, annotate="vote {study}")
        loop.do(1)
        assert run.names == [name if name != "annotate" else "vote" for name in STEPS]
        loop.do(1)
        assert len(run.names) == 7

    @pytest.mark.parametrize("fails", ["prompts", "pairs", "vote", "votes", "slrm", "tapo", "merge"])
    def test_stopped_anywhere_it_goes_on_there(self, tmp_path, fails):
        run = Runner(tmp_path, fails)
        loop = rounds(tmp_path, run, annotate="vote {study}")
        with pytest.raises(subprocess.CalledProcessError):
            loop.do(1)
        first, run.names, run.fails = run.names, [], None
        loop.do(1)
        assert first[:-1] + run.names == [name if name != "annotate" else "vote" for name in STEPS]

    def test_a_repetition_of_a_skipped_pair_is_not_waited_for(self, tmp_path):
        study = make_study(tmp_path / "round_1/study", 2, repeats=1)
        loop = rounds(tmp_path, Runner(tmp_path))
        with VoteStore(study.folder / "votes.jsonl") as store:
            store.append(vote("p01", "0000", kind="skip", reason="broken"))
            with pytest.raises(WaitForVotes, match="1 pairs"):
                loop._check_votes(study.folder)
            store.append(vote("p01", "0001"))
        loop._check_votes(study.folder)

    def test_it_waits_for_people(self, tmp_path):
        run = Runner(tmp_path)
        loop = rounds(tmp_path, run)
        for _ in range(2):
            with pytest.raises(WaitForVotes, match="2 pairs .*`tapo-trl annotate"):
                loop.do(1)
        assert run.names == ["prompts", "pairs"]
        answer(tmp_path / "round_1/study")
        loop.do(1)
        assert run.names == [name for name in STEPS if name != "annotate"]

    def test_each_round_starts_from_the_one_before(self, tmp_path):
        steps = dict(rounds(tmp_path, None).steps(2))
        before = str(tmp_path / "round_1/model")
        for name in ("pairs", "slrm", "tapo", "merge"):
            assert before in steps[name]
        assert str(tmp_path / "round_2/slrm") in steps["tapo"]

    def test_a_training_with_a_checkpoint_is_resumed(self, tmp_path):
        commands = []
        loop = rounds(
            tmp_path, lambda command: commands.append(command) or Runner(tmp_path)(command), annotate="vote {study}"
        )
        (tmp_path / "round_1/tapo/checkpoint-1").mkdir(parents=True)
        loop.do(1)
        resumed = [command[3] for command in commands if "--resume_from_checkpoint" in command]
        assert resumed == ["tapo"]


def test_waiting_has_a_status_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda command, check: Runner(tmp_path)(command))
    flags = [
        "--model_name_or_path",
        "base",
        "--prompts",
        "a prompt",
        "--slrm_config",
        "a.yaml",
        "--tapo_config",
        "b.yaml",
    ]
    with pytest.raises(SystemExit) as error:
        main(["rounds", str(tmp_path), *flags])
    assert error.value.code == 3
    assert "no vote yet" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_loop_by_one_command(tmp_path):
    """On the words world, with somebody who prefers darker pictures."""
    training = {
        "height": 32, "width": 96, "max_sequence_length": 1, "max_steps": 1, "bf16": False, "use_cpu": True, "report_to": "none",
        "save_strategy": "no", "per_device_train_batch_size": 2,
    }  # fmt: skip
    rollout = {
        "use_peft": True, "lora_r": 2, "num_inference_steps": 3, "num_sde_steps": 1, "num_candidates": 2, "guidance_scale": 1.0,
        "dataset_name": "examples/words/prompts/validation.txt",
    }  # fmt: skip
    call = {"num_inference_steps": 2, "height": 32, "width": 96, "max_sequence_length": 1}
    recipes = {
        "slrm": training | {"num_task_tokens": 2},
        "tapo": training | rollout,
        "pairs": {"dtype": "float32", "kwargs_a": call},
        "votes": {"splits": {"train": 1.0}},
    }
    flags = ["rounds", str(tmp_path), "--model_name_or_path", "examples/words/pipeline", "--media", "images"]
    flags += ["--prompts", *[f'"{word}"' for word in ("milk", "sea", "stone")]]
    flags += ["--annotate", f"{sys.executable} -m tests.human.test_rounds {{study}}"]
    for name, fields in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(fields))
        flags += [f"--{name}_config", str(tmp_path / f"{name}.yaml")]
    assert main(flags) == 0
    made = tmp_path / "round_1"
    assert (made / "model/model_index.json").exists()
    assert {path.name for path in made.glob("*.done")} == {f"{name}.done" for name in STEPS}


def prefer_darker(folder: Path) -> None:
    study = Study.load(folder)
    with VoteStore(folder / "votes.jsonl") as store:
        for pair in study.read_pairs():
            light = [np.asarray(Image.open(folder / medium), dtype=float).mean() for medium in pair.media]
            label = 1.0 if light[0] < light[1] else 0.0
            store.append(vote("p01", pair.pair_id, dict.fromkeys(study.dimension_names, label)))


if __name__ == "__main__":
    prefer_darker(Path(sys.argv[1]))
