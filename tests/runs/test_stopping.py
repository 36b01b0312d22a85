# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""A reward, a loss or a gradient that is not finite: the update is skipped, and soon the run stops."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from tapo_trl import EMACallback, SLRMTrainer, TAPOConfig
from tapo_trl.runs.checkpoints import checkpoint_damage
from tapo_trl.runs.stopping import NonFiniteGuard
from tapo_trl.trainer import tapo_trainer
from tests.data.preference_pairs import latent_pairs
from tests.testing_utils import tiny_sd3_pipeline
from tests.trainer.test_slrm_trainer import make_args as make_slrm_args  # noqa: F401
from tests.trainer.test_tapo_trainer import make_trainer, redness, trainable


class Trace(TrainerCallback):
    """What weights, optimizer and schedule are after each step, and which step it is now."""

    def __init__(self):
        self.step, self.states = 0, {}

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step + 1

    def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        states = [weights, optimizer.state_dict(), lr_scheduler.state_dict()]
        self.states[state.global_step] = copy.deepcopy(states)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def bad_reward(trace, is_bad, value=math.nan):
    """A reward that is not finite for the prompt "fox" in the steps of `is_bad`."""

    def reward(images, prompts):
        scores = redness(images, prompts)
        if is_bad(trace.step):
            scores[[prompt == "fox" for prompt in prompts]] = value
        return scores

    return reward


def inject(kind, trace, monkeypatch, is_bad):
    """Arguments of a trainer in which something is not finite in the steps of `is_bad`, and what to do to it."""
    if kind == "reward":
        return {"reward": bad_reward(trace, is_bad)}, lambda trainer: None
    if kind == "loss":
        original = tapo_trainer.tapo_loss

        def loss(*args, **kwargs):
            losses, metrics = original(*args, **kwargs)
            # A constant, through which no gradient flows: only the value shows it
            return (torch.cat([losses[:1].detach() * math.inf, losses[1:]]) if is_bad(trace.step) else losses), metrics

        monkeypatch.setattr(tapo_trainer, "tapo_loss", loss)
        return {}, lambda trainer: None

    def prepare(trainer):
        parameter = next(p for name, p in trainer.model.named_parameters() if "lora_B" in name)
        parameter.register_hook(lambda gradient: gradient * math.nan if is_bad(trace.step) else gradient)

    return {}, prepare


class TestSkippedUpdate:
    @pytest.mark.parametrize(("kind", "optimizer"), [("reward", "adamw"), ("loss", "momentum"), ("gradient", "adamw")])
    def test_changes_nothing(self, tmp_path, monkeypatch, caplog, kind, optimizer):
        trace = Trace()
        kwargs, prepare = inject(kind, trace, monkeypatch, lambda step: step == 3)
        prompts = ["fox", "owl"]
        trainer = make_trainer(tmp_path, callbacks=[trace], prompts=prompts, max_steps=4, **kwargs)
        if optimizer == "momentum":
            trainer.optimizer = torch.optim.SGD(
                [p for p in trainer.model.parameters() if p.requires_grad], lr=0.1, momentum=0.9
            )
        prepare(trainer)
        trainer.train()
        assert equal(trace.states[3], trace.states[2])
        for before, after in ((1, 2), (3, 4)):
            assert not any(equal(*pair) for pair in zip(trace.states[before], trace.states[after], strict=True))
        counts = [entry["skipped_updates"] for entry in trainer.state.log_history if "loss" in entry]
        assert counts == [0, 0, 1, 0]
        message = next(record.message for record in caplog.records if "is skipped" in record.message)
        assert message.startswith("Step 3: the update is skipped, 1 in a row")
        expected = {
            "reward": "the reward `reward` of a candidate for the prompt 'fox' at step 1 is nan (12 of 24 values)",
            "loss": "the loss for the prompt",
            "gradient": "the gradient has the norm nan, with finite rewards and losses, on the prompts",
        }
        assert expected[kind] in message and "'fox'" in message

    @pytest.mark.parametrize("kind", ["reward", "loss", "gradient"])
    def test_the_run_is_as_if_it_had_not_been_made(self, tmp_path, monkeypatch, kind):
        class LeaveOut(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                if state.global_step in (1, 2):
                    model.zero_grad(set_to_none=True)

        kwargs = {"max_steps": 5, "lr_scheduler_type": "constant", "num_iterations": 1, "prompts": ["fox", "owl"]}
        expected = make_trainer(tmp_path / "expected", callbacks=[LeaveOut()], **kwargs)
        expected.train()
        trace = Trace()
        injected, prepare = inject(kind, trace, monkeypatch, lambda step: step in (2, 3))
        trainer = make_trainer(tmp_path / "injected", callbacks=[trace], **kwargs, **injected)
        prepare(trainer)
        trainer.train()
        assert equal(trainable(trainer), trainable(expected))


class TestGiveUp:
    def fail(self, tmp_path, first_bad, **kwargs):
        trace = Trace()
        reward = bad_reward(trace, lambda step: step >= first_bad, math.inf)
        trainer = make_trainer(tmp_path, reward=reward, callbacks=[trace], prompts=["fox", "owl"], **kwargs)
        with pytest.raises(FloatingPointError) as error:
            trainer.train()
        return trainer, trace, str(error.value)

    @pytest.mark.parametrize("allowed", [0, 2])
    def test_stops_with_the_last_good_weights_and_goes_on(self, tmp_path, allowed):
        kwargs = {"max_steps": 7, "max_skipped_updates": allowed}
        trainer, trace, message = self.fail(tmp_path, first_bad=3, **kwargs)
        stop = 3 + allowed
        assert trainer.state.global_step == stop
        assert f"{allowed + 1} updates in a row were skipped, more than `max_skipped_updates={allowed}`" in message
        assert "the prompt 'fox' at step 1 is inf" in message and "resume_from_checkpoint=True" in message
        checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{stop}"
        assert str(checkpoint) in message
        assert checkpoint_damage(checkpoint) is None
        assert trainer.state.log_history[stop - 1]["skipped_updates"] == 1

        resumed_trace = Trace()
        resumed = make_trainer(tmp_path, callbacks=[resumed_trace], prompts=["fox", "owl"], **kwargs)
        resumed._load_from_checkpoint(str(checkpoint))
        assert equal(trainable(resumed), trace.states[2][0])
        resumed.train(resume_from_checkpoint=True)
        assert sorted(resumed_trace.states) == list(range(stop + 1, 8))
        for state in resumed_trace.states[stop + 1][1]["state"].values():
            assert state["step"] == 3  # Adam has made the 2 good updates and this one

    def test_a_good_update_between_them_starts_the_count_again(self, tmp_path):
        trace = Trace()
        reward = bad_reward(trace, lambda step: step in (2, 4, 5))
        trainer = make_trainer(
            tmp_path, reward=reward, callbacks=[trace], prompts=["fox", "owl"], max_steps=6, max_skipped_updates=2
        )
        trainer.train()
        assert trainer.state.global_step == 6
        assert [entry.get("skipped_updates") for entry in trainer.state.log_history][:6] == [0, 1, 0, 1, 1, 0]

    def test_waits_until_a_rollout_is_used_up(self, tmp_path):
        trainer, _, _ = self.fail(tmp_path, first_bad=3, max_steps=8, max_skipped_updates=0, num_iterations=2)
        assert trainer.state.global_step == 4

    def test_at_the_end_of_the_training(self, tmp_path):
        trainer, _, message = self.fail(tmp_path, first_bad=3, max_steps=3, max_skipped_updates=0)
        assert checkpoint_damage(Path(trainer.args.output_dir) / "checkpoint-3") is None


class TestTAPO:
    def test_a_reward_of_the_wrong_shape_is_an_error_at_once(self, tmp_path):
        trainer = make_trainer(tmp_path, reward=lambda images, prompts: images.mean((1, 2)))
        with pytest.raises(ValueError, match="must return one score per candidate"):
            trainer.train()
        assert trainer.state.global_step == 0

    def test_evaluation_goes_on_with_a_warning(self, tmp_path, caplog):
        trainer = make_trainer(tmp_path, reward=bad_reward(Trace(), lambda step: True), eval_prompts=["fox", "owl"])
        assert math.isnan(trainer.evaluate()["eval_reward"])
        assert "Evaluation: the reward `reward` of a candidate for the prompt 'fox'" in caplog.text

    def test_the_average_of_the_weights_stays_as_well(self, tmp_path):
        trace, ema = Trace(), EMACallback(decay=0.5)
        averages = []

        class Averages(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                averages.append([ema.ema.optimization_step, *(p.clone() for p in ema.ema.shadow_params)])

        reward = bad_reward(trace, lambda step: step == 3)
        callbacks = [trace, ema, Averages()]
        make_trainer(tmp_path, reward=reward, callbacks=callbacks, prompts=["fox", "owl"], max_steps=4).train()
        assert equal(averages[2], averages[1])
        assert not equal(averages[3][1:], averages[2][1:])

    @pytest.mark.parametrize("filtered", [True, False])
    def test_later_losses_are_logged(self, tmp_path, filtered):
        trace = Trace()
        trainer = make_trainer(
            tmp_path,
            reward=bad_reward(trace, lambda step: step == 2),
            callbacks=[trace],
            prompts=["fox", "owl"],
            max_steps=4,
            logging_nan_inf_filter=filtered,
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert [math.isfinite(loss) for loss in losses] == [True, filtered, True, True]

    def test_a_negative_limit_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="`max_skipped_updates` must not be negative"):
            TAPOConfig(str(tmp_path), use_cpu=True, bf16=False, max_skipped_updates=-1)


class TestSLRM:
    @pytest.mark.parametrize("allowed", [0, 1])
    def test_skips_and_stops(self, make_slrm_args, monkeypatch, caplog, allowed):  # noqa: F811
        trace, original = Trace(), SLRMTrainer._pair_loss

        def pair_loss(self, *args):
            losses, scores = original(self, *args)
            return (torch.cat([losses[:1] * math.nan, losses[1:]]) if trace.step in (2, 3) else losses), scores

        monkeypatch.setattr(SLRMTrainer, "_pair_loss", pair_loss)
        args = make_slrm_args(max_steps=4, max_skipped_updates=allowed)
        trainer = SLRMTrainer(tiny_sd3_pipeline(), args, train_dataset=latent_pairs(16), callbacks=[trace])
        with pytest.raises(
            FloatingPointError, match=r"the loss for the prompt .* \(row \d+\) at noise level 0\.\d+ is nan"
        ):
            trainer.train()
        assert trainer.state.global_step == 2 + allowed
        assert equal(trace.states[2], trace.states[1]) and equal(trace.states[2 + allowed], trace.states[1])
        assert checkpoint_damage(Path(args.output_dir) / f"checkpoint-{2 + allowed}") is None
        assert [entry["skipped_updates"] for entry in trainer.state.log_history if "loss" in entry][:2] == [0, 1]


class TestFloat16:
    """The search for a loss scale overflows as a matter of course; GPUs only, so the guard is asked directly."""

    def step(self, scale, losses):
        accelerator = SimpleNamespace(distributed_type=DistributedType.NO)
        guard = NonFiniteGuard(SimpleNamespace(accelerator=accelerator))
        optimizer = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: scale))
        guard.watch(torch.tensor(losses), lambda index: f"loss {index[0]}")
        guard.grad_norm = torch.tensor(math.inf)
        args = SimpleNamespace(fp16=True, max_skipped_updates=3)
        state = SimpleNamespace(global_step=0, is_world_process_zero=True)
        guard.on_pre_optimizer_step(args, state, None, optimizer=optimizer)
        return guard

    def test_the_search_does_not_count(self):
        assert self.step(1024.0, [0.5, 0.7]).skipped_in_a_row == 0

    def test_a_loss_that_is_not_finite_does(self):
        guard = self.step(1024.0, [0.5, math.nan])
        assert guard.skipped_in_a_row == 1 and guard.last_problem.startswith("loss 1 is nan")

    def test_nor_does_the_search_go_on_for_ever(self):
        assert self.step(1.0, [0.5, 0.7]).skipped_in_a_row == 1
