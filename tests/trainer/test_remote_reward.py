# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tapo_trl import RemoteReward
from tapo_trl.rewards import RemoteRewardError, reward_server
from tapo_trl.scripts.utils import load_guard_reward, load_reward_models
from tests.rewards.test_remote import start
from tests.trainer.policy_checks import trainable
from tests.trainer.test_tapo_trainer import make_trainer, redness


SCORER = """
def brightness(images, prompts):
    return (images[..., 0].mean((1, 2, 3) if images.ndim == 5 else (1, 2)) - images[..., 1:].mean((1, 2, 3))) / 10
"""


class KillAt(TrainerCallback):
    """Kills the server after an optimizer step."""

    def __init__(self, process, step):
        self.process, self.step = process, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def servers(tmp_path):
    """Starts servers that end with the test."""
    (tmp_path / "scorer.py").write_text(SCORER)
    (tmp_path / "reward_server.py").write_bytes(Path(reward_server.__file__).read_bytes())
    running = []

    def make():
        running.append(start(tmp_path))
        return running[-1]

    yield make
    for process, _ in running:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_run_whose_server_dies_goes_on_as_the_unbroken_one(tmp_path, servers):
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    process, url = servers()
    unbroken = make_trainer(tmp_path / "a", RemoteReward(url), **steps)
    unbroken.train()
    rewards = [log["reward"] for log in unbroken.state.log_history if "reward" in log]
    assert len(set(rewards)) == 4

    broken = make_trainer(tmp_path / "b", RemoteReward(url, wait=0), callbacks=[KillAt(process, 3)], **steps)
    with pytest.raises(RemoteRewardError, match="asked 4 times.*resume the run from its last checkpoint"):
        broken.train()
    assert broken.state.global_step == 3

    _, url = servers()
    resumed = make_trainer(tmp_path / "b", RemoteReward(url), **steps)
    resumed.train(resume_from_checkpoint=True)
    for name, value in trainable(resumed).items():
        assert torch.equal(value, trainable(unbroken)[name]), name


def test_beside_another_reward(tmp_path, servers):
    trainer = make_trainer(tmp_path, [RemoteReward(servers()[1]), redness], max_steps=1)
    trainer.train()
    logged = {name.split("/")[1] for log in trainer.state.log_history for name in log if name.startswith("rewards/")}
    assert {"brightness", "redness"} <= logged


def test_address_on_the_command_line(servers):
    _, url = servers()
    for reward in (load_reward_models([url]), load_guard_reward(url)):
        assert isinstance(reward, RemoteReward) and reward.name == "brightness"
