# Copyright 2026 The tapo_trl authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Runs that are stopped in every way go on and end with the weights of the unbroken run."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tapo_trl.trainer.checkpoints import checkpoint_damage, last_good_checkpoint

from .test_tapo_trainer import make_trainer, trainable


STEPS = 4
SAVING = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1}


class AtStep(TrainerCallback):
    """Calls a function at the end of a step."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.function()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("unbroken"), **SAVING)
    trainer.train()
    return trainable(trainer)


def assert_same(trainer, unbroken):
    for name, value in trainable(trainer).items():
        assert torch.equal(value, unbroken[name]), name


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_saves_stops_and_goes_on(self, tmp_path, unbroken, number):
        handlers = [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]
        kwargs = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 100}
        stop = AtStep(2, lambda: os.kill(os.getpid(), number))
        trainer = make_trainer(tmp_path, callbacks=[stop], **kwargs)
        trainer.train()
        assert trainer.state.global_step == 2
        assert last_good_checkpoint(trainer.args.output_dir).name == "checkpoint-2"
        assert [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)] == handlers

        resumed = make_trainer(tmp_path, **kwargs)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == STEPS
        assert_same(resumed, unbroken)

    def test_waits_for_a_step_that_can_be_resumed_from(self, tmp_path):
        stop = AtStep(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        trainer = make_trainer(tmp_path, callbacks=[stop], max_steps=6, num_iterations=2)
        trainer.train()
        assert trainer.state.global_step == 4

    def test_a_second_interrupt_does_not_wait(self, tmp_path):
        def press_twice():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

        trainer = make_trainer(tmp_path, callbacks=[AtStep(1, press_twice)])
        before = signal.getsignal(signal.SIGINT)
        try:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        finally:
            signal.signal(signal.SIGINT, before)


class TestDamage:
    def test_resumes_from_the_last_whole_checkpoint(self, tmp_path, unbroken):
        trainer = make_trainer(tmp_path, **SAVING)
        trainer.train()
        output_dir = Path(trainer.args.output_dir)
        (output_dir / "checkpoint-4" / "checkpoint_seal.json").unlink()
        weights = output_dir / "checkpoint-3" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])

        resumed = make_trainer(tmp_path, **SAVING)
        with pytest.raises(ValueError, match="adapter_model.safetensors"):
            resumed.train(resume_from_checkpoint=str(output_dir / "checkpoint-3"))
        start = []
        resumed.add_callback(AtStep(3, lambda: start.append(resumed.state.global_step)))
        resumed.train(resume_from_checkpoint=True)
        assert start == [3]
        assert_same(resumed, unbroken)
        assert checkpoint_damage(output_dir / "checkpoint-4") is None

    def test_starts_anew_without_any(self, tmp_path, unbroken):
        trainer = make_trainer(tmp_path, **SAVING)
        trainer.train(resume_from_checkpoint=True)
        assert_same(trainer, unbroken)

    def test_lets_go_of_old_checkpoints_after_the_new_one_is_whole(self, tmp_path):
        trainer = make_trainer(tmp_path, save_total_limit=1, **SAVING)
        trainer.train()
        assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-4"]
        assert checkpoint_damage(Path(trainer.args.output_dir) / "checkpoint-4") is None

    def test_keeps_the_new_run_s_checkpoint_beside_that_of_an_older_longer_run(self, tmp_path):
        older = tmp_path / "out" / "checkpoint-100"
        older.mkdir(parents=True)
        os.utime(older, (0, 0))
        trainer = make_trainer(tmp_path, save_total_limit=1, **SAVING)
        trainer.train()
        assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-4"]

    def test_a_disk_that_is_full(self, tmp_path):
        limits, kwargs = resource.getrlimit(resource.RLIMIT_FSIZE), {"peft": False, **SAVING}
        fill = AtStep(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1])))
        trainer = make_trainer(tmp_path, callbacks=[fill], save_total_limit=1, **kwargs)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            with pytest.raises(RuntimeError, match="Earlier checkpoints are intact"):
                trainer.train()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert not (Path(trainer.args.output_dir) / "checkpoint-3").exists()

        resumed = make_trainer(tmp_path, **kwargs)
        resumed.train(resume_from_checkpoint=True)
        unbroken = make_trainer(tmp_path / "unbroken", **kwargs)
        unbroken.train()
        assert_same(resumed, trainable(unbroken))


RUN = """
import sys
from pathlib import Path
from tests.trainer.test_interruption import SAVING
from tests.trainer.test_tapo_trainer import make_trainer

trainer = make_trainer(Path(sys.argv[1]), **SAVING)
print("training", flush=True)
trainer.train(resume_from_checkpoint=True)
trainer.save_model()
"""


def test_kill_at_random_moments(tmp_path, unbroken):
    """Each attempt is killed up to 1.5 seconds after its training started, until one comes to its end."""
    rng, kills = random.Random(0), 0
    for attempt in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(tmp_path)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert any(line == "training\n" for line in process.stdout)
        if attempt < 4:
            time.sleep(rng.uniform(0, 1.5))
            process.kill()
        if process.wait() == -signal.SIGKILL:
            kills += 1
        else:
            assert process.returncode == 0
            break
    assert kills > 0
    trained = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(trained) == len(unbroken)
    for name, value in trained.items():
        wrapped = name.replace("lora_A.weight", "lora_A.default.weight").replace(
            "lora_B.weight", "lora_B.default.weight"
        )
        assert torch.equal(value, unbroken[wrapped]), name
