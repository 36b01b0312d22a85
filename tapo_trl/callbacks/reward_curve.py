# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The reward that a policy is trained on against one that it is not, along a training."""

import json
from dataclasses import dataclass
from pathlib import Path


HELD_OUT_REWARD = "guard/held_out_reward"
STATE_FILE = "trainer_state.json"


@dataclass
class RewardCheck:
    """
    One point of a reward-versus-judge curve.

    Args:
        step (`int`, *optional*): optimizer step, if the logs say it.
        training (`float`, *optional*): mean training reward since the check before. Before the first step nothing is known
            of it: the first check has that of the second.
        held_out (`float`): what the judge says.
    """

    step: int | None
    training: float | None
    held_out: float


def reward_curve(log_history: list[dict], judge: str = HELD_OUT_REWARD) -> list[RewardCheck]:
    """
    The training reward against a judge, check by check. Where the first goes on rising and the second falls, the policy
    exploits its reward.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`, or that of a file, see [`read_log_history`].
        judge (`str`, *optional*):
            Name of the judge in the logs. Defaults to the held-out reward of [`RewardHackingGuardCallback`]; the training
            reward on held-out prompts is `"eval_reward"`.

    Returns:
        `list[RewardCheck]`, empty if the judge is not in the logs.
    """
    checks, window = [], []
    for entry in log_history:
        if "reward" in entry:
            window.append(entry["reward"])
        if judge in entry:
            training = sum(window) / len(window) if window else None
            checks.append(RewardCheck(entry.get("step"), training, entry[judge]))
            window = []
    if len(checks) > 1 and checks[0].training is None:
        checks[0].training = checks[1].training
    return checks


def read_log_history(run: str | Path) -> list[dict]:
    """
    The logs of a run.

    Args:
        run (`str` or `Path`): the output folder of a training, of which the latest logs are read, also those in its
            checkpoints; a checkpoint; or a file `trainer_state.json`.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(run)
    files = [path] if path.is_file() else [*path.glob(STATE_FILE), *path.glob(f"checkpoint-*/{STATE_FILE}")]
    if not files:
        raise FileNotFoundError(
            f"There are no logs of a training in {run}: neither it nor a checkpoint in it has a `{STATE_FILE}`. Give the "
            "`output_dir` of a training; `trainer.save_state()` writes the file at its end."
        )
    states = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return max(states, key=lambda state: state["global_step"])["log_history"]
