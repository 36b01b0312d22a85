# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Runs that are stopped in every way go on and end with the weights of the unbroken run."""

import ctypes
import io
import os
import random
import resource
import signal
import sys
import time
from functools import cache
from pathlib import Path

import psutil
import pytest
import torch
from transformers import Trainer, TrainerCallback

from tapo_trl import SLRMConfig, SLRMTrainer
from tapo_trl.runs import checkpoints
from tapo_trl.runs.checkpoints import SEAL_NAME, checkpoint_damage, last_good_checkpoint
from tests.data.preference_pairs import latent_pairs
from tests.processes import FORKED, start
from tests.trainer.test_tapo_trainer import make_pipeline, make_trainer, trainable


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

    def test_an_error_gives_signals_back(self, tmp_path):
        handlers = [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]

        def fail():
            assert signal.getsignal(signal.SIGTERM) != handlers[0]
            raise RuntimeError("out of memory")

        with pytest.raises(RuntimeError, match="out of memory"):
            make_trainer(tmp_path, callbacks=[AtStep(1, fail)], max_steps=2).train()
        assert [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)] == handlers

    def test_does_not_wait_between_two_updates_from_a_rollout(self, tmp_path):
        stop = AtStep(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        trainer = make_trainer(tmp_path, callbacks=[stop], max_steps=6, num_iterations=2)
        trainer.train()
        assert trainer.state.global_step == 3
        assert last_good_checkpoint(trainer.args.output_dir).name == "checkpoint-3"

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

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
    def test_a_run_without_a_launcher_outlives_who_started_it(self, tmp_path):
        make_trainer(tmp_path, max_steps=1).train()
        number = ctypes.c_int(-1)
        ctypes.CDLL(None).prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
        assert number.value == 0


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

    def test_the_configuration_says_it(self, tmp_path):
        make_trainer(tmp_path, **SAVING | {"max_steps": 2}).train()
        weights = sorted((tmp_path / "out").glob("checkpoint-*/adapter_model.safetensors"))
        before = [path.stat().st_mtime_ns for path in weights]

        resumed = make_trainer(tmp_path, resume_from_checkpoint="true", **SAVING | {"max_steps": 3})
        resumed.train()
        assert [logs["step"] for logs in resumed.state.log_history if "loss" in logs][-1] == 3
        assert [path.stat().st_mtime_ns for path in weights] == before, "the first steps are not trained again"
        with pytest.raises(ValueError, match="checkpoints of an earlier run"):
            make_trainer(tmp_path, resume_from_checkpoint="true", **SAVING).train(resume_from_checkpoint=False)

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

    @pytest.mark.slow
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


def make_slrm_trainer(folder, callbacks=None, **kwargs):
    args = SLRMConfig(
        str(folder / "out"),
        cache_dir=str(folder / "cache"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        resolution=32,
        max_sequence_length=4,
        num_task_tokens=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        dataloader_num_workers=1,
        **kwargs,
    )
    return SLRMTrainer(make_pipeline(), args, train_dataset=latent_pairs(16), callbacks=callbacks)


MAKE = {"tapo": make_trainer, "slrm": make_slrm_trainer}
MANY_STEPS = SAVING | {"max_steps": 10}


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def write_half_and_die(value, path, *args, **kwargs):
    buffer = io.BytesIO()
    write(value, buffer)
    Path(path).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
    die()


write = torch.save

# What is replaced, by what, and whether a checkpoint is unfinished then
MOMENTS = {
    "in a step": (Trainer, "compute_loss", die, False),
    "weights written, optimizer not": (Trainer, "_save_optimizer_and_scheduler", die, True),
    "half of a file written": (torch, "save", write_half_and_die, True),
    "all but the seal written": (checkpoints, "seal_checkpoint", die, True),
    "seal not in its place": (checkpoints.os, "replace", die, True),
    "older checkpoints not deleted": (checkpoints, "rotate_checkpoints", die, False),
}


class DieInTheSecondStep(TrainerCallback):
    """Kills its own process at one of `MOMENTS`, after one step has been saved."""

    def __init__(self, moment):
        self.moment, self.steps = moment, 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps += 1
        if self.steps == 2:
            owner, name, replacement, _ = MOMENTS[self.moment]
            owner = type(self.trainer) if owner is Trainer else owner
            setattr(owner, name, replacement)


class SayWhereItStarts(TrainerCallback):
    def __init__(self, connection):
        self.connection = connection

    def on_train_begin(self, args, state, control, **kwargs):
        self.connection.send(state.global_step)


def train_to_the_end(method, folder, moment, connection):
    callbacks = [SayWhereItStarts(connection)]
    if moment is not None:
        callbacks.append(DieInTheSecondStep(moment))
    trainer = MAKE[method](folder, callbacks=callbacks, save_total_limit=2, **MANY_STEPS)
    callbacks[-1].trainer = trainer
    trainer.train(resume_from_checkpoint=True)
    torch.save(trainable(trainer), folder / "final.pt")


class Training:
    """A training in a process of its own."""

    def __init__(self, method, folder, moment=None):
        receiver, sender = FORKED.Pipe(duplex=False)
        self.process = start(train_to_the_end, method, folder, moment, sender)
        sender.close()
        self.first_step = receiver.recv()

    def wait(self):
        """Its exit code."""
        self.process.join()
        return self.process.exitcode


def assert_none_left(trainings):
    """Data loaders look for their training process every 5 seconds; the limit is for those that never end."""
    sessions = [training.process.pid for training in trainings]
    left = [process for process in psutil.process_iter() if _session(process.pid) in sessions]
    _, alive = psutil.wait_procs(left, timeout=300)
    assert not alive


def _session(process):
    try:
        return os.getsid(process)
    except ProcessLookupError:
        return None


def unfinished(folder):
    return [path for path in (folder / "out").glob("checkpoint-*") if not (path / SEAL_NAME).exists()]


@pytest.fixture(scope="module")
def unbroken_of(tmp_path_factory):
    @cache
    def weights(method):
        trainer = MAKE[method](tmp_path_factory.mktemp(method), **MANY_STEPS)
        trainer.train()
        return trainable(trainer)

    return weights


def assert_ends_as(folder, expected):
    final = torch.load(folder / "final.pt")
    assert final.keys() == expected.keys()
    assert max((final[name] - expected[name]).abs().max() for name in final) == 0


def last_step(folder):
    whole = last_good_checkpoint(folder / "out")
    return 0 if whole is None else int(whole.name.removeprefix("checkpoint-"))


@pytest.mark.slow
@pytest.mark.parametrize("method", MAKE)
def test_killed_in_a_step_and_at_every_stage_of_a_save(tmp_path, unbroken_of, method):
    trainings = []
    for moment, (*_, cuts_a_save) in MOMENTS.items():
        before = last_step(tmp_path)
        training = Training(method, tmp_path, moment)
        trainings.append(training)
        assert training.first_step == before
        assert training.wait() == -signal.SIGKILL, moment
        assert bool(unfinished(tmp_path)) == cuts_a_save, moment
        assert last_step(tmp_path) == before + (2 if moment == "older checkpoints not deleted" else 1), moment
    training = Training(method, tmp_path)
    assert training.first_step == last_step(tmp_path) > 0
    assert training.wait() == 0
    assert_ends_as(tmp_path, unbroken_of(method))
    assert_none_left([*trainings, training])


KILLS = int(os.environ.get("TAPO_TRL_KILLS", "6"))  # more take longer


@pytest.mark.slow
@pytest.mark.parametrize("method", MAKE)
def test_killed_at_random_moments(tmp_path, unbroken_of, method):
    rng, killed, runs, trainings = random.Random(0), 0, 0, []
    folder = tmp_path / "run-0"
    folder.mkdir()
    while True:
        before = last_step(folder)
        training = Training(method, folder)
        trainings.append(training)
        assert training.first_step == before
        if killed < KILLS:
            time.sleep(rng.uniform(0, 1.2))
            training.process.kill()  # unless it has come to its end
        if training.wait() == -signal.SIGKILL:
            killed += 1
            continue
        assert training.process.exitcode == 0
        assert_ends_as(folder, unbroken_of(method))
        if killed == KILLS:
            break
        runs += 1
        folder = tmp_path / f"run-{runs}"
        folder.mkdir()
    assert_none_left(trainings)
