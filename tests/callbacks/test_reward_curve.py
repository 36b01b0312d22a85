# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json

import pytest

from tapo_trl.callbacks.reward_curve import HELD_OUT_REWARD, RewardCheck, read_log_history, reward_curve


LOGS = [
    {"step": 0, HELD_OUT_REWARD: 0.5},
    {"step": 1, "reward": 1.0},
    {"step": 2, "reward": 3.0},
    {"step": 2, "eval_reward": 1.5},
    {"step": 3, "reward": 5.0, HELD_OUT_REWARD: 0.6},
    {"step": 4, HELD_OUT_REWARD: 0.2},
]


class TestRewardCurve:
    def test_training_reward_is_the_mean_since_the_last_check(self):
        assert reward_curve(LOGS) == [RewardCheck(0, 3.0, 0.5), RewardCheck(3, 3.0, 0.6), RewardCheck(4, None, 0.2)]

    def test_another_judge(self):
        assert reward_curve(LOGS, "eval_reward") == [RewardCheck(2, 2.0, 1.5)]

    def test_without_checks(self):
        assert reward_curve([{"step": 1, "reward": 1.0}]) == []

    def test_one_check_before_training(self):
        assert reward_curve(LOGS[:1]) == [RewardCheck(0, None, 0.5)]


class TestReadLogHistory:
    def write(self, folder, step):
        folder.mkdir(parents=True, exist_ok=True)
        state = {"global_step": step, "log_history": [{"step": step}]}
        (folder / "trainer_state.json").write_text(json.dumps(state))

    def test_the_latest_of_a_folder_and_its_checkpoints(self, tmp_path):
        self.write(tmp_path / "checkpoint-9", 9)
        self.write(tmp_path / "checkpoint-10", 10)
        assert read_log_history(tmp_path) == [{"step": 10}]
        assert read_log_history(tmp_path / "checkpoint-9") == [{"step": 9}]
        self.write(tmp_path, 12)
        assert read_log_history(str(tmp_path)) == [{"step": 12}]
        self.write(tmp_path / "checkpoint-14", 14)  # the training went on
        assert read_log_history(tmp_path) == [{"step": 14}]
        assert read_log_history(tmp_path / "trainer_state.json") == [{"step": 12}]

    @pytest.mark.parametrize("name", ["empty", "missing"])
    def test_missing(self, tmp_path, name):
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match=f"no logs of a training in .*{name}.*`output_dir`"):
            read_log_history(tmp_path / name)
