# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tapo_trl.cli.main import main
from tapo_trl.human import live
from tapo_trl.human.live import CHOICES, HumanReward, LiveGroups
from tapo_trl.human.votes import VoteStore


def choose(folder, pick=lambda group: (0, 1), kind="vote", annotator="p01"):
    """Somebody answers all that waits. Returns the number of answers."""
    with VoteStore(folder / CHOICES) as store:
        groups, number = LiveGroups(folder, store.rows), 0
        while (group := groups.next(annotator)) is not None:
            event = {
                "id": f"{len(store.rows)} {annotator}",
                "kind": kind,
                "annotator": annotator,
                "pair_id": group.pair_id,
            }
            if kind == "vote":
                event["best"], event["worst"] = pick(group)
            else:
                event["reason"] = "cannot judge"
            store.append(event)
            groups.record(event)
            number += 1
        return number


class Person:
    """Answers while training sleeps."""

    def __init__(self, folder, **options):
        self.folder, self.options, self.answers = folder, options, 0

    def __call__(self, seconds):
        self.answers += choose(self.folder, **self.options)


@pytest.fixture
def samples():
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


PROMPTS = ["a", "b"] * 3  # rows of a rollout: all prompts, sample by sample


class TestReward:
    def test_best_worst_and_others(self, tmp_path, samples):
        person = Person(tmp_path, pick=lambda group: (2, 1) if group.prompt == "a" else (0, 2))
        scores = HumanReward(tmp_path, sleep=person)(samples, PROMPTS)
        assert scores.tolist() == [0.5, 1.0, 0.0, 0.5, 1.0, 0.0]
        assert person.answers == 2

    def test_what_was_chosen_is_remembered(self, tmp_path, samples):
        first = HumanReward(tmp_path, sleep=Person(tmp_path))(samples, PROMPTS)

        def nobody(seconds):
            raise AssertionError("asked again")

        assert torch.equal(HumanReward(tmp_path, sleep=nobody)(samples, PROMPTS), first)
        with pytest.raises(AssertionError, match="asked again"):
            HumanReward(tmp_path, sleep=nobody)(samples.flip(2), PROMPTS)

    def test_a_choice_that_training_used_stays(self, tmp_path, samples):
        first = HumanReward(tmp_path, sleep=Person(tmp_path))(samples, PROMPTS)
        with VoteStore(tmp_path / CHOICES) as store:
            groups = LiveGroups(tmp_path, store.rows)
            assert groups.last("p01") is None  # no undo
            assert groups.progress("p01") == (2, 2)
            store.append({"id": "late", "kind": "undo", "annotator": "p01", "pair_id": store.rows[0]["pair_id"]})
        assert torch.equal(HumanReward(tmp_path)(samples, PROMPTS), first)

    def test_a_skipped_prompt_is_a_tie(self, tmp_path, samples):
        person = Person(tmp_path, kind="skip")
        assert HumanReward(tmp_path, sleep=person)(samples, PROMPTS).tolist() == [0.5] * 6

    def test_timeout(self, tmp_path, samples):
        with pytest.raises(TimeoutError, match="2 prompts"):
            HumanReward(tmp_path, timeout=3, sleep=lambda seconds: None)(samples, PROMPTS)

    def test_one_sample_cannot_be_compared(self, tmp_path, samples):
        with pytest.raises(ValueError, match="num_generations"):
            HumanReward(tmp_path)(samples[:1], ["a"])

    def test_people_share_the_groups(self, tmp_path, samples):
        with pytest.raises(TimeoutError):
            HumanReward(tmp_path, timeout=0)(samples, PROMPTS)
        clock = itertools.count(0.0, 1.0).__next__
        groups = LiveGroups(tmp_path, [], clock)
        first, second = groups.next("p01"), groups.next("p02")
        assert {first.prompt, second.prompt} == {"a", "b"}
        assert groups.next("p01") == first and groups.next("p03") is None

    def test_a_group_is_read_once_and_its_use_is_seen(self, tmp_path, samples, monkeypatch):
        with pytest.raises(TimeoutError):
            HumanReward(tmp_path, timeout=0)(samples, PROMPTS)
        groups, read = LiveGroups(tmp_path, []), []
        whole = live._read_group
        monkeypatch.setattr(live, "_read_group", lambda folder: read.append(folder.name) or whole(folder))
        for _ in range(3):
            assert groups.progress("p01") == (0, 2)
        assert sorted(read) == sorted(groups.pairs)
        HumanReward(tmp_path, sleep=Person(tmp_path))(samples, PROMPTS)
        assert all(group.is_used for group in groups.pairs.values())
        assert list(groups.pairs) == list(LiveGroups(tmp_path, []).pairs)
        with pytest.raises(TimeoutError):
            HumanReward(tmp_path, timeout=0)(samples.flip(2), PROMPTS)
        assert groups.progress("p01") == (2, 4) and not list(groups.pairs.values())[-1].is_used


class TestPage:
    def test_best_and_worst_by_number(self, tmp_path, samples):
        pytest.importorskip("starlette", reason="the annotation page needs `pip install starlette uvicorn`")
        from starlette.testclient import TestClient

        from tapo_trl.human.access import Access
        from tapo_trl.human.server import LivePage

        reward = HumanReward(tmp_path, timeout=0)
        with VoteStore(tmp_path / CHOICES) as store:
            page = LivePage(tmp_path, store, Access(tmp_path))
            client = TestClient(page.app(), base_url="http://localhost")
            state = client.get("/api/next").json()
            assert state["pair"] is None and state["waits"]
            with pytest.raises(TimeoutError):
                reward(samples, PROMPTS)
            pair = client.get("/api/next").json()["pair"]
            assert pair["captions"] == ["1", "2", "3"]
            assert all(client.get(address).headers["content-type"] == "image/png" for address in pair["media"])
            body = {"id": "1", "pair_id": pair["pair_id"], "ms": 1, "plays": 0}
            for answers in ({"best": "1", "worst": "1"}, {"best": "1"}, {"best": "1", "worst": "4"}):
                assert client.post("/api/vote", json=body | {"answers": answers}).status_code == 400
            state = client.post("/api/vote", json=body | {"answers": {"best": "3", "worst": "1"}}).json()
            assert (state["done"], state["total"], state["can_undo"]) == (1, 2, True)
            body = {"id": "2", "pair_id": state["pair"]["pair_id"], "ms": 1, "plays": 0}
            client.post("/api/vote", json=body | {"answers": {"best": "1", "worst": "2"}})
            scores = reward(samples, PROMPTS)
            assert sorted(scores.tolist()) == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
            late = {"id": "3", "pair_id": pair["pair_id"], "ms": 1, "plays": 0, "answers": {"best": "2", "worst": "1"}}
            assert "gone on" in client.post("/api/vote", json=late).json()["error"]
            assert client.post("/api/undo", json={"id": "4"}).status_code == 404


FLAGS = [
    "--config", "recipes/words/online_dpo.yaml", "--reward_model", "human", "--reward_model_init_kwargs", "{}", "--num_inference_steps", "2", "--num_generations", "2",
    "--per_device_train_batch_size", "2", "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1", "--logging_steps", "1",
    "--lora_r", "2",
]  # fmt: skip


@pytest.mark.slow
class TestTraining:
    def train(self, folder, *flags, kill=False):
        """The command, with a person who prefers the brighter sample; with `kill`, it dies while the second step waits."""
        script = (
            "import os, signal, sys, time\n"
            "from pathlib import Path\n"
            "import numpy as np\n"
            "from PIL import Image\n"
            "from tests.human.test_live import choose\n"
            "from tapo_trl.human import live\n"
            "folder = Path(sys.argv[1]) / 'people'\n"
            "def pick(group):\n"
            "    light = [np.asarray(Image.open(folder / medium), dtype=float).mean() for medium in group.media]\n"
            "    return int(np.argmax(light)), int(np.argmin(light))\n"
            "def person(seconds):\n"
            "    if sys.argv[2] == 'kill' and len(list(folder.glob('groups/*/used.json'))) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    print('answers', choose(folder, pick))\n"
            "live.HumanReward.__init__.__defaults__ = (16.0, 1.0, None, person)\n"
            "from tapo_trl.cli.main import main\n"
            "main(['online_dpo', *sys.argv[3:]])\n"
        )
        command = [
            sys.executable,
            "-c",
            script,
            str(folder),
            "kill" if kill else "",
            *FLAGS,
            "--output_dir",
            str(folder),
            *flags,
        ]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ)

    def test_training_waits_and_a_killed_one_asks_for_nothing_twice(self, tmp_path):
        whole = self.train(tmp_path / "whole")
        assert whole.returncode == 0, whole.stderr
        assert whole.stdout.count("answers 2") == 2
        killed = self.train(tmp_path / "killed", kill=True)
        assert killed.returncode == -signal.SIGKILL
        again = self.train(tmp_path / "killed", "--resume_from_checkpoint", "true")
        assert again.returncode == 0, again.stderr
        assert again.stdout.count("answers 2") == 1
        first, second = (
            load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("whole", "killed")
        )
        assert all(torch.equal(first[name], second[name]) for name in first) and first.keys() == second.keys()
        groups = sorted((tmp_path / "whole/people/groups").glob("*/used.json"))
        assert len(groups) == 4 and all(json.loads(file.read_text())["kind"] == "vote" for file in groups)


def test_other_trainers_cannot_wait(tmp_path):
    with pytest.raises(ValueError, match="online_dpo"):
        main(["tapo", "--config", "recipes/words/tapo.yaml", "--reward_model", "human", "--output_dir", str(tmp_path)])
