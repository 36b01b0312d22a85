# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Whatever made the checkpoint, the run goes on from it exactly: also between two updates from the same rollouts."""

import os
import shutil
import signal
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tapo_trl import EMACallback
from tapo_trl.runs.checkpoints import last_good_checkpoint, seal_checkpoint
from tests.trainer.test_tapo_trainer import make_trainer, redness, trainable


# An epoch is 2 batches of 2 prompts, each used for 2 updates
STEPS = {
    "max_steps": 7,
    "num_iterations": 2,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 6,
    "save_strategy": "steps",
    "save_steps": 100,
}


class At(TrainerCallback):
    """Does something to the control of the training at the end of a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act(control)


def set_control(**flags):
    return lambda control: vars(control).update(flags)


def send_sigterm(control):
    os.kill(os.getpid(), signal.SIGTERM)


class BadAt(TrainerCallback):
    """A reward that is not finite in some steps."""

    def __init__(self, *steps):
        self.steps, self.step = steps, 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step

    def __call__(self, images, prompts):
        return redness(images, prompts) * (torch.inf if self.step in self.steps else 1)


STOP = set_control(should_training_stop=True)
SAVE_AND_STOP = set_control(should_save=True, should_training_stop=True)
WAYS = {  # to stop: arguments, callbacks, and the step of the checkpoint
    "save_steps": ({"save_steps": 2}, [At(3, STOP)], 2),
    "epoch": ({"save_strategy": "epoch"}, [At(5, STOP)], 5),
    "signal": ({}, [At(3, send_sigterm)], 3),  # between two updates on one rollout
    "max_steps": ({"max_steps": 3}, [], 3),
    "callback": ({}, [At(5, SAVE_AND_STOP)], 5),
}


def make(folder, precision, callbacks=(), reward=redness, **kwargs):
    callbacks = [*callbacks, EMACallback(decay=0.5)]
    return make_trainer(folder, reward=reward, callbacks=callbacks, **STEPS | {"bf16": precision == "bf16"} | kwargs)


def result(trainer):
    average = load_file(Path(trainer.args.output_dir) / "ema" / "pytorch_lora_weights.safetensors")
    return {"trained": trainable(trainer), "average": average, "optimizer": trainer.optimizer.state_dict()["state"]}


def assert_equal(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_equal(found[key], expected[key])
    else:
        assert torch.equal(found, expected)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    @cache
    def of_precision(precision):
        trainer = make(tmp_path_factory.mktemp(precision), precision)
        trainer.train()
        return result(trainer)

    return of_precision


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "precision"),
    [(way, "fp32") for way in WAYS] + [("signal", "bf16"), ("max_steps", "bf16")],
)
def test_ends_as_the_unbroken_run(tmp_path, unbroken, way, precision):
    kwargs, callbacks, step = WAYS[way]
    make(tmp_path, precision, callbacks, **kwargs).train()
    assert last_good_checkpoint(tmp_path / "out").name == f"checkpoint-{step}"

    shutil.rmtree(tmp_path / "out" / "ema")
    resumed = make(tmp_path, precision)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 7
    assert_equal(result(resumed), unbroken(precision))


def test_after_updates_that_were_not_finite(tmp_path):
    bad = BadAt(2, 3)  # the two updates from one rollout
    expected = make(tmp_path / "unbroken", "fp32", [bad], reward=bad)
    expected.train()

    bad = BadAt(2, 3)
    broken = make(tmp_path / "broken", "fp32", [bad], reward=bad, max_skipped_updates=0)
    with pytest.raises(FloatingPointError, match="step 4"):
        broken.train()
    resumed = make(tmp_path / "broken", "fp32", max_skipped_updates=0)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(result(resumed), result(expected))


def test_rollouts_are_in_the_checkpoint_only_where_they_are_needed(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[At(2, set_control(should_save=True))], **STEPS | {"max_steps": 3})
    trainer.train()
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("rollouts_*.pt")}
    assert files == {"checkpoint-3/rollouts_0.pt"}

    without = tmp_path / "out" / "checkpoint-3"
    for name in ("rollouts_0.pt", "checkpoint_seal.json"):
        (without / name).unlink()
    seal_checkpoint(without)
    resumed = make_trainer(tmp_path, **STEPS)
    with pytest.raises(ValueError, match="`rollouts_0.pt` is missing.*a multiple of `num_iterations`"):
        resumed.train(resume_from_checkpoint=str(without))


def test_a_reference_that_follows_the_policy(tmp_path):
    kwargs = {
        **STEPS,
        "peft": False,
        "max_steps": 4,
        "num_iterations": 1,
        "sync_ref_model": True,
        "ref_model_sync_steps": 2,
    }
    unbroken = make_trainer(tmp_path / "unbroken", **kwargs)
    unbroken.train()
    broken = make_trainer(tmp_path / "broken", callbacks=[At(3, SAVE_AND_STOP)], **kwargs)
    broken.train()
    resumed = make_trainer(tmp_path / "broken", **kwargs)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(trainable(resumed), trainable(unbroken))
    assert_equal(resumed.ref_model.state_dict(), unbroken.ref_model.state_dict())
