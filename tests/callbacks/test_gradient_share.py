# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from tapo_trl import GradientShareCallback, TAPOTrainer
from tapo_trl.callbacks.gradient_share import gradient_share_curves
from tapo_trl.trainer.diffusion_dpo_trainer import DiffusionDPOTrainer
from tests.testing_utils import tiny_sd3_pipeline
from tests.trainer.test_tapo_trainer import PROMPTS, GradientRecorder, make_args, randomize_adapter, redness


def make_trainer(tmp_path, callbacks, lora_dropout=0.0, peft=True, **kwargs):
    torch.manual_seed(0)
    lora = LoraConfig(r=2, lora_alpha=4, lora_dropout=lora_dropout, init_lora_weights="gaussian")
    return TAPOTrainer(
        tiny_sd3_pipeline(),
        redness,
        make_args(tmp_path, self_check=False, **kwargs),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        callbacks=callbacks,
        peft_config=lora if peft else None,
    )


class StateRecorder(TrainerCallback):
    """Gradients and random numbers right before and after each update."""

    def __init__(self):
        self.states = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        self.states.append((gradients, torch.get_rng_state()))

    def on_step_end(self, args, state, control, model, **kwargs):
        self.states.append(([p.detach().clone() for p in model.parameters()], torch.get_rng_state()))


def equal(a, b):
    return (a is None and b is None) or torch.equal(a, b)


class TestTrainingIsNotDisturbed:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options",
        [
            {"gradient_accumulation_steps": 2, "lora_dropout": 0.3, "disable_dropout": False},
            {"num_iterations": 2, "transition_batch_size": 4, "kl_coef": 0.1, "activation_checkpointing": True},
            {"peft": False, "pairing": "spo", "pair_threshold": [0.0]},
            {"bf16": True},
        ],
        ids=["dropout and accumulation", "reuse and checkpointing", "full fine-tuning", "bf16"],
    )
    def test_bit_for_bit(self, tmp_path, options):
        recorders, trainers = [], []
        for name in ("without", "with"):
            recorder = StateRecorder()
            callbacks = [GradientShareCallback(1), recorder] if name == "with" else [recorder]
            trainer = make_trainer(tmp_path / name, callbacks, max_steps=3, **options)
            trainer.train()
            recorders.append(recorder)
            trainers.append(trainer)
        without, measured = recorders
        assert len(without.states) == len(measured.states) == 6
        for (tensors, rng), (expected, expected_rng) in zip(measured.states, without.states, strict=True):
            assert all(map(equal, tensors, expected))
            assert torch.equal(rng, expected_rng)
        moments = [list(trainer.optimizer.state_dict()["state"].values()) for trainer in trainers]
        for expected, state in zip(*moments, strict=True):
            assert all(torch.equal(state[name], value) for name, value in expected.items())

        logs = [
            [
                {name: value for name, value in log.items() if "runtime" not in name and "per_second" not in name}
                for log in trainer.state.log_history
            ]
            for trainer in trainers
        ]
        shares = [{name for name in log if name.startswith("gradient_share/")} for log in logs[1]]
        assert shares == [{f"gradient_share/step_{step:02d}" for step in (1, 3, 5)}] * 3 + [set()]
        assert [{name: log[name] for name in log if "gradient_share" not in name} for log in logs[1]] == logs[0]


class TestShares:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"gradient_accumulation_steps": 2, "transition_batch_size": 1},
            {"step_weighting": "velocity", "kl_coef": 20.0, "activation_checkpointing": True},
        ],
        ids=["defaults", "accumulation and chunks", "weights, KL and checkpointing"],
    )
    def test_are_those_of_the_gradients_of_a_training_on_one_step_alone(self, tmp_path, options):
        options |= {"max_steps": 1, "max_grad_norm": 0.0, "beta": 300.0}
        trainer = make_trainer(tmp_path / "all", [GradientShareCallback(1)], **options)
        randomize_adapter(trainer)
        trainer.train()
        shares = [trainer.state.log_history[0][f"gradient_share/step_{index:02d}"] for index in (1, 3, 5)]

        norms = []
        for step in range(3):
            recorder = GradientRecorder()
            alone = make_trainer(tmp_path / str(step), [recorder], **options)
            randomize_adapter(alone)
            generate = alone.rollout

            def one_step(*args, step=step, generate=generate, **kwargs):
                pairs = generate(*args, **kwargs)
                pairs.weights[[other for other in range(3) if other != step]] = 0
                return pairs

            alone.rollout = one_step
            alone.train()
            norms.append(torch.cat([gradient.flatten() for gradient in recorder.gradients.values()]).norm().item())
        expected = [norm / sum(norms) for norm in norms]
        assert shares == pytest.approx(expected, rel=1e-3)
        assert max(expected) > 1.2 * min(expected)

    def test_every_n_steps(self, tmp_path):
        trainer = make_trainer(tmp_path, [GradientShareCallback(2)], max_steps=4)
        trainer.train()
        curves = gradient_share_curves(trainer.state.log_history)
        assert list(curves) == ["step_01", "step_03", "step_05"]
        assert all(list(curve) == [1, 3] for curve in curves.values())
        for step in (1, 3):
            assert sum(curve[step] for curve in curves.values()) == pytest.approx(1)

    def test_do_not_depend_on_the_loss_scale(self, tmp_path):
        norms = []

        class Measure(GradientShareCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                accelerator = self.trainer.accelerator
                norms.append(self._norms())
                accelerator.scaler = SimpleNamespace(get_scale=lambda: 1024.0)
                norms.append(self._norms())
                accelerator.scaler = None

        make_trainer(tmp_path, [Measure()], max_steps=1).train()
        assert norms[0].min() > 0
        torch.testing.assert_close(norms[0], norms[1])

    def test_a_rollout_without_pairs_has_no_shares(self, tmp_path):
        trainer = make_trainer(tmp_path, [GradientShareCallback(1)], pairing="spo", pair_threshold=[0.99], max_steps=1)
        trainer.train()
        assert gradient_share_curves(trainer.state.log_history) == {}

    def test_rewards_that_are_not_finite_are_left_to_the_guard(self, tmp_path):
        trainer = make_trainer(tmp_path, [GradientShareCallback(1)], max_steps=1)
        losses = trainer.transition_losses

        def not_finite(*args):
            losses_of_pairs, weighted, metrics = losses(*args)
            return losses_of_pairs * float("nan"), weighted * float("nan"), metrics

        trainer.transition_losses = not_finite
        before = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        assert trainer.state.log_history[0]["skipped_updates"] == 1
        assert gradient_share_curves(trainer.state.log_history) == {}
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


class TestErrors:
    def test_every_n_steps(self):
        with pytest.raises(ValueError, match="`every_n_steps` must be at least 1, but it is 0"):
            GradientShareCallback(0)

    def test_trainer_without_stochastic_steps(self):
        with pytest.raises(ValueError, match="`DiffusionDPOTrainer` has none of: use it with `TAPOTrainer`"):
            GradientShareCallback().attach(DiffusionDPOTrainer.__new__(DiffusionDPOTrainer))

    @pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP])
    def test_sharded_training(self, kind):
        trainer = TAPOTrainer.__new__(TAPOTrainer)
        trainer.accelerator = SimpleNamespace(distributed_type=kind)
        with pytest.raises(ValueError, match="whole parameters and gradients .* Measure with DDP"):
            GradientShareCallback().attach(trainer)
