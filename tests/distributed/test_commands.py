# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The commands on two processes under ZeRO-3, for which Transformers would split what it loads over the processes."""

import json
from pathlib import Path

import pytest
from datasets import load_from_disk

from tapo_trl import load_policy
from tapo_trl.rewards import load_reward_model
from tests.distributed.launching import ENGINES, ROOT, free_port, run


pytestmark = pytest.mark.distributed

OPTIONS = {
    "use_cpu": "true",
    "bf16": "false",
    "resolution": 32,
    "max_sequence_length": 4,
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
    "use_peft": "true",
    "lora_r": 2,
}
ROLLOUTS = {
    "num_inference_steps": 4,
    "num_sde_steps": 2,
    "num_candidates": 2,
    "ema_decay": 0.9,
    "guard_reward": "clip",
    "guard_reward_init_kwargs": json.dumps({"weights": str(ROOT / "examples" / "emoji" / "clip")}),
    "guard_every_steps": 1,
    "guard_num_prompts": 2,
}


def command(target: list[str], options: dict) -> None:
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    result = run([*ENGINES["zero3"].command(free_port()), *target, *flags], timeout=1800)
    assert result.returncode == 0, result.stdout[-8000:]


@pytest.fixture(scope="module")
def trained(job, results, tmp_path_factory) -> Path:
    """Folder of an SLRM, and of a policy that was trained with it and watched by a CLIP."""
    results("zero3")  # which compiles what DeepSpeed needs
    folder = tmp_path_factory.mktemp("commands")
    load_from_disk(job["pairs"]).to_parquet(folder / "pairs.parquet")
    prompts = [f"a {letter} on a hill" for letter in "abcdefghijkl"]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    common = OPTIONS | {"model_name_or_path": job["pipeline"], "cache_dir": folder / "cache"}
    of_slrm = {"dataset_name": folder / "pairs.parquet", "output_dir": folder / "slrm", "num_task_tokens": 2}
    command([str(ROOT / "tapo_trl" / "scripts" / "slrm.py")], common | of_slrm)
    of_policy = {"dataset_name": folder / "prompts.txt", "dataset_split": "train[:8]", "output_dir": folder / "tapo"}
    held_out = {"dataset_test_split": "train[8:]", "reward_model": folder / "slrm"}
    command(["-m", "tapo_trl.cli", "tapo"], common | ROLLOUTS | of_policy | held_out)
    return folder


def test_reward_model_is_whole(trained):
    weights = load_reward_model(trained / "slrm").state_dict()
    assert all(tensor.numel() > 0 for tensor in weights.values())
    assert max(tensor.abs().max() for name, tensor in weights.items() if "lora_B" in name) > 0


def test_guard_scores_with_a_whole_clip(trained):
    log = json.loads((trained / "tapo" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    scores = [entry[name] for entry in log for name in entry if name.startswith("guard/") and "reward" in name]
    assert len(scores) >= 2 and all(-100 < score < 100 for score in scores)


@pytest.mark.parametrize("folder", ["tapo", "tapo/ema"])
def test_policy_loads(job, trained, folder):
    pipeline = load_policy(job["pipeline"]).pipeline
    pipeline.load_lora_weights(trained / folder)
    assert pipeline.get_active_adapters() == ["default_0"]
