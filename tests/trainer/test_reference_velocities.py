# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Velocities of the reference are computed once for all updates from the same rollout, whatever the method."""

import pytest

from tests.trainer import test_flow_grpo_trainer, test_online_dpo_trainer, test_tapo_trainer
from tests.trainer.policy_checks import trainable
from tests.trainer.test_exact_resume import SAVE_AND_STOP, At, assert_equal


METHODS = {
    "tapo": test_tapo_trainer.make_trainer,
    "online_dpo": test_online_dpo_trainer.make_trainer,
    "grpo": test_flow_grpo_trainer.make_trainer,
}
STEPS = {"num_iterations": 2, "max_steps": 4, "transition_batch_size": 5, "per_device_train_batch_size": 2}


class CountReference:
    """Counts the forwards of the reference in the loss."""

    def __init__(self, trainer):
        self.count, reference = 0, trainer.reference

        def counted(model):
            self.count += 1
            return reference(model)

        trainer.reference = counted


def forget(trainer):
    """Make a trainer compute the velocities of the reference in every update."""
    chunks = trainer._chunks

    def without(*args):
        for chunk in chunks(*args):
            chunk.ref_velocity = chunk.keep_ref_velocity = None
            yield chunk

    trainer._chunks = without


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"offload_transitions": True, "gradient_accumulation_steps": 2}, {"peft": False}],
    ids=["plain", "bf16", "offload", "full"],
)
def test_half_of_the_forwards_and_the_same_weights(tmp_path, method, options):
    results, counts = [], []
    for folder, prepare in (("kept", lambda trainer: None), ("again", forget)):
        trainer = METHODS[method](tmp_path / folder, **STEPS | options)
        counter = CountReference(trainer)
        prepare(trainer)
        trainer.train()
        results.append({"weights": trainable(trainer), "logs": [log.get("loss") for log in trainer.state.log_history]})
        counts.append(counter.count)
    assert_equal(results[0]["weights"], results[1]["weights"])
    assert results[0]["logs"] == results[1]["logs"]
    assert 2 * counts[0] == counts[1] > 0


@pytest.mark.parametrize("method", METHODS)
def test_no_memory_is_spent_on_rollouts_that_are_used_once(tmp_path, method):
    trainer = METHODS[method](tmp_path, **STEPS | {"num_iterations": 1, "max_steps": 1})
    trainer.train()
    ((_, rollout),) = trainer.buffer.rollouts
    assert rollout.ref_velocities is None


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, method, step):
    """Also between two updates from a rollout, whose velocities of the reference are in the checkpoint."""
    kwargs = STEPS | {"save_strategy": "steps", "save_steps": 100, "num_iterations": 2}
    unbroken = METHODS[method](tmp_path / "unbroken", **kwargs)
    unbroken.train()
    METHODS[method](tmp_path / "broken", callbacks=[At(step, SAVE_AND_STOP)], **kwargs).train()
    resumed = METHODS[method](tmp_path / "broken", **kwargs)
    counter = CountReference(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(trainable(resumed), trainable(unbroken))
    assert_equal(resumed.optimizer.state_dict()["state"], unbroken.optimizer.state_dict()["state"])
    assert (counter.count > 0) == (step < 3)  # the last update needs the reference no more


def test_a_reference_that_moves_is_asked_again(tmp_path):
    kwargs = {"peft": False, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}
    kwargs |= STEPS | {"num_iterations": 3, "max_steps": 6}
    results = []
    for folder, prepare in (("kept", lambda trainer: None), ("again", forget)):
        trainer = test_tapo_trainer.make_trainer(tmp_path / folder, **kwargs)
        counter = CountReference(trainer)
        prepare(trainer)
        trainer.train()
        results.append((trainable(trainer), counter.count))
    assert_equal(results[0][0], results[1][0])
    # Of the updates 1 to 6, the third and the fifth come after the reference moved; the second and the sixth do not
    assert results[0][1] / results[1][1] == pytest.approx(4 / 6)
