# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import copy
import json
import math
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset

from tapo_trl import OnlineDiffusionDPOConfig, OnlineDiffusionDPOTrainer
from tapo_trl.losses import diffusion_dpo_loss, velocity_error_change
from tapo_trl.schedulers.noise_levels import training_sigmas
from tests.testing_utils import tiny_sd3_pipeline as make_pipeline
from tests.testing_utils import tiny_wan_pipeline
from tests.trainer.policy_checks import (
    check_full_fine_tuning_is_saved_as_a_transformer,
    check_lora_loads_into_diffusers_exactly,
    check_resume_is_exact,
    trainable,
)
from tests.trainer.test_tapo_trainer import (
    PROMPTS,
    GradientRecorder,
    RolloutRecorder,
    make_lora,
    make_slrm,
    randomize_adapter,
    redness,
)


def make_args(tmp_path, **kwargs):
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
        "resolution": 32,
        "max_sequence_length": 3,
        "num_inference_steps": 4,
        "num_generations": 3,
        "num_noise_levels": 3,
        "guidance_scale": 2.0,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return OnlineDiffusionDPOConfig(**defaults | kwargs)


def make_trainer(tmp_path, reward=redness, peft=True, callbacks=None, prompts=PROMPTS, eval_prompts=None, **kwargs):
    torch.manual_seed(0)
    return OnlineDiffusionDPOTrainer(
        make_pipeline(),
        reward,
        make_args(tmp_path, **kwargs),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        eval_dataset=None if eval_prompts is None else Dataset.from_dict({"prompt": eval_prompts}),
        callbacks=callbacks,
        peft_config=make_lora() if peft else None,
    )


def rows(prompts=PROMPTS):
    return [{"prompt": prompt, "tapo_row": row} for row, prompt in enumerate(prompts)]


def reference_loss(trainer, pairs):
    """The loss written down once more, in float64 and one pair at a time, from squared errors."""
    model = copy.deepcopy(trainer.model).double()
    model.forward = type(model).forward.__get__(model)
    losses = []
    for level in range(len(pairs.sigmas)):
        for b in range(pairs.sigmas.shape[1]):
            sigma, noise = pairs.sigmas[level, b].double(), pairs.noise[level, b].double()
            changes = []
            for clean in pairs.samples[:, b].double():
                errors = []
                for context in (nullcontext(), model.disable_adapter()):
                    with context:
                        v = model(
                            hidden_states=((1 - sigma) * clean + sigma * noise)[None],
                            timestep=(sigma * 1000)[None],
                            encoder_hidden_states=pairs.prompt_embeds.prompt_embeds[b : b + 1].double(),
                            pooled_projections=pairs.prompt_embeds.pooled_prompt_embeds[b : b + 1].double(),
                            return_dict=False,
                        )[0][0]
                    errors.append(((v - (noise - clean)) ** 2).mean())
                changes.append(errors[0] - errors[1])
            logit = -trainer.args.beta / 2 * (changes[0] - changes[1])
            losses.append(-torch.nn.functional.logsigmoid(logit))
    return torch.stack(losses).mean(), model


class TestTraining:
    @pytest.mark.parametrize("peft", [True, False])
    def test_only_what_is_trained_changes(self, tmp_path, peft):
        trainer = make_trainer(tmp_path, peft=peft)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
        assert changed and (not peft or all("lora_" in name for name in changed))
        if not peft:
            reference = dict(trainer.ref_model.named_parameters())
            assert all(torch.equal(reference[name], value) for name, value in before.items())

    @pytest.mark.parametrize("precision", [{}, {"bf16": True}])
    @pytest.mark.parametrize("peft", [True, False])
    def test_loss_is_ln_2_at_the_start(self, tmp_path, precision, peft):
        trainer = make_trainer(tmp_path, peft=peft, max_steps=1, **precision)
        assert trainer.train().training_loss == pytest.approx(math.log(2), abs=1e-6)

    def test_self_check_names_a_policy_that_is_not_the_reference(self, tmp_path):
        trainer = make_trainer(tmp_path)
        randomize_adapter(trainer)
        with pytest.raises(RuntimeError, match="not ln 2"):
            trainer.train()

    @pytest.mark.slow
    @pytest.mark.parametrize("sign", [1, -1])
    def test_learns_a_preference_and_its_opposite(self, tmp_path, sign):
        """On prompts and noise that training did not see."""

        def brightness(images, prompts):
            return sign * images.mean((1, 2, 3))

        held_out = ["bee", "ant"] * 4
        trainer = make_trainer(
            tmp_path, brightness, eval_prompts=["bee", "ant"], max_steps=12, learning_rate=3e-2, num_generations=6
        )
        before = trainer.generate(held_out, seed=100).mean()
        trainer.train()
        assert sign * (trainer.generate(held_out, seed=100).mean() - before) > 2e-4

    def test_latent_and_pixel_rewards_are_weighted_and_logged(self, tmp_path):
        def constant(images, prompts):
            return torch.full((len(prompts),), 2.0)

        trainer = make_trainer(tmp_path, [make_slrm(), redness, constant], reward_weights=[1.0, 0.0, 3.0], max_steps=1)
        trainer.train()
        logs = trainer.state.log_history[0]
        assert logs["rewards/constant/mean"] == 2 and logs["rewards/constant/std"] == 0
        assert logs["reward"] == pytest.approx(logs["rewards/slrm/mean"] + 6, abs=1e-5)
        assert logs["reward_gap"] > logs["reward_std"] > 0

    def test_videos(self, tmp_path):
        def brightness(videos, prompts):
            assert videos.shape[1:] == (3, 5, 32, 32)
            return videos.mean((1, 2, 3, 4))

        args = make_args(tmp_path, max_steps=1, num_frames=5, max_sequence_length=4)
        dataset = Dataset.from_dict({"prompt": PROMPTS})
        trainer = OnlineDiffusionDPOTrainer(
            tiny_wan_pipeline(), brightness, args, train_dataset=dataset, peft_config=make_lora()
        )
        assert trainer.train().training_loss == pytest.approx(math.log(2), abs=1e-6)


class TestLoss:
    def test_equals_an_independent_float64_reference(self, tmp_path):
        recorder = GradientRecorder()
        arguments = {"max_steps": 1, "max_grad_norm": 0.0, "self_check": False, "activation_checkpointing": False}
        trainer = make_trainer(tmp_path, callbacks=[recorder], beta=5.0, **arguments)
        randomize_adapter(trainer)
        rollouts = RolloutRecorder(trainer)
        initial = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        trainer.model.load_state_dict(initial)
        loss, model = reference_loss(trainer, rollouts.pairs[0])
        assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
        parameters = [p for p in model.parameters() if p.requires_grad]
        for (name, gradient), value in zip(
            recorder.gradients.items(), torch.autograd.grad(loss, parameters), strict=True
        ):
            scale = value.abs().max().item()
            torch.testing.assert_close(gradient.double(), value, rtol=2e-3, atol=2e-3 * scale + 1e-7, msg=name)

    def test_is_that_of_offline_diffusion_dpo_on_the_same_pair_noise_and_level(self, tmp_path):
        trainer = make_trainer(tmp_path, self_check=False, label_smoothing=0.1)
        randomize_adapter(trainer)
        pairs = trainer.rollout(rows(), seed_step=0)
        (chunk,) = pairs.transitions(100)
        losses, _, metrics = trainer.transition_losses(trainer.model, chunk)

        clean = torch.cat([chunk.samples[0], chunk.samples[1]])
        sigma, noise = chunk.sigmas.repeat(2), chunk.noise.repeat(2, 1, 1, 1)
        level = sigma.view(-1, 1, 1, 1)
        inputs = ((1 - level) * clean + level * noise, sigma, chunk.prompt_embeds.repeat(2))
        with torch.no_grad():
            velocity = trainer.policy.velocity(trainer.model, *inputs)
            with trainer.model.disable_adapter():
                ref_velocity = trainer.policy.velocity(trainer.model, *inputs)
        changes = velocity_error_change(velocity, ref_velocity, noise - clean).chunk(2)
        expected, expected_metrics = diffusion_dpo_loss(*changes, beta=100.0, label_smoothing=0.1)
        torch.testing.assert_close(losses, expected)
        torch.testing.assert_close(metrics["rewards/margins"], expected_metrics["rewards/margins"])
        assert metrics["rewards/margins"].abs().min() > 0

    @pytest.mark.parametrize(
        "kwargs", [{"transition_batch_size": size} for size in (1, 5)] + [{"activation_checkpointing": True}]
    )
    def test_neither_chunks_nor_checkpointing_matter(self, tmp_path, kwargs):
        gradients = []
        for folder, options in (("a", {"transition_batch_size": 100}), ("b", kwargs)):
            recorder = GradientRecorder()
            arguments = {"max_steps": 1, "max_grad_norm": 0.0, "activation_checkpointing": False} | options
            make_trainer(tmp_path / folder, callbacks=[recorder], **arguments).train()
            gradients.append(recorder.gradients)
        for name, gradient in gradients[1].items():
            expected = gradients[0][name]
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * expected.abs().max())

    @pytest.mark.parametrize("law", ["logit_normal", "uniform"])
    def test_levels_are_those_of_the_training_schedule(self, tmp_path, law):
        trainer = make_trainer(tmp_path, timestep_sampling=law)
        schedule = training_sigmas(trainer.sampler.scheduler)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.cat([trainer._draw_sigma(generator) for _ in range(2000)])
        assert torch.isin(drawn, schedule).all()
        middle = ((drawn > schedule[750]) & (drawn < schedule[250])).float().mean().item()
        assert middle == pytest.approx(0.5 if law == "uniform" else 0.728, abs=0.04)  # P(|N(0, 1)| < ln 3) = 0.728


class TestRollouts:
    def test_seeded_by_row_and_step_not_by_batch(self, tmp_path):
        trainer = make_trainer(tmp_path)
        together = trainer.rollout(rows(), seed_step=3)
        alone = trainer.rollout(rows()[2:3], seed_step=3)
        other = trainer.rollout(rows()[2:3], seed_step=4)
        assert torch.equal(together.noise[:, 2], alone.noise[:, 0])
        assert torch.equal(together.sigmas[:, 2], alone.sigmas[:, 0])
        assert not torch.equal(alone.noise, other.noise)

    @pytest.mark.slow
    def test_evaluation_is_repeatable_and_does_not_disturb_training(self, tmp_path):
        plain = make_trainer(tmp_path / "a", max_steps=3)
        plain.train()
        watched = make_trainer(
            tmp_path / "b", max_steps=3, eval_prompts=["bee", "ant", "fly"], eval_strategy="steps", eval_steps=1
        )
        watched.train()
        for name, value in trainable(plain).items():
            # Other memory is in use: some processors round the last bit otherwise. Other noise would show in the first digits.
            torch.testing.assert_close(trainable(watched)[name], value, rtol=0, atol=1e-6)
        first, second = watched.evaluate(), watched.evaluate()
        for name in ("eval_loss", "eval_reward", "eval_rewards/accuracies", "eval_reward_gap"):
            assert first[name] == second[name]


class TestSaving:
    def test_lora_loads_into_diffusers_exactly(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.train()
        check_lora_loads_into_diffusers_exactly(trainer, "cat", tmp_path / "base")

    def test_full_fine_tuning_is_saved_as_a_transformer(self, tmp_path):
        trainer = make_trainer(tmp_path, peft=False)
        trainer.train()
        check_full_fine_tuning_is_saved_as_a_transformer(trainer)

    @pytest.mark.slow
    @pytest.mark.parametrize("peft", [True, False])
    def test_resume_is_exact(self, tmp_path, peft):
        check_resume_is_exact(make_trainer, tmp_path, peft=peft)

    def test_model_card(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.train()
        trainer.save_model()
        card = (tmp_path / "out" / "README.md").read_text()
        assert "online-diffusion-dpo" in card and "wallace2024diffusion" in card and "load_lora_weights" in card
        assert "| `num_noise_levels` | 3 |" in card and str(tmp_path) not in card
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 4


class TestBadInput:
    @pytest.mark.parametrize(
        "kwargs",
        [
            {"num_generations": 1},
            {"num_noise_levels": 0},
            {"beta": 0.0},
            {"label_smoothing": 0.5},
            {"timestep_sampling": "normal"},
            {"num_inference_steps": 0},
            {"remove_unused_columns": True},
        ],
    )
    def test_configuration(self, tmp_path, kwargs):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            make_args(tmp_path, **kwargs)

    def test_gradient_share_needs_steps(self, tmp_path):
        from tapo_trl import GradientShareCallback

        with pytest.raises(ValueError, match="`OnlineDiffusionDPOTrainer` has none of"):
            make_trainer(tmp_path, callbacks=[GradientShareCallback()])
