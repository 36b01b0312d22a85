# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json

import pytest
import torch
from datasets import Dataset

from tapo_trl import ReFLConfig, ReFLTrainer, RemoteReward
from tapo_trl.rewards.pretrained.base import PretrainedReward
from tests.testing_utils import tiny_sd3_pipeline as make_pipeline
from tests.testing_utils import tiny_wan_pipeline
from tests.trainer.policy_checks import (
    check_full_fine_tuning_is_saved_as_a_transformer,
    check_lora_loads_into_diffusers_exactly,
    check_resume_is_exact,
    trainable,
)
from tests.trainer.test_tapo_trainer import PROMPTS, GradientRecorder, make_lora, make_slrm, randomize_adapter, redness


def make_args(tmp_path, **kwargs):
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
        "resolution": 32,
        "max_sequence_length": 3,
        "num_inference_steps": 4,
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
    return ReFLConfig(**defaults | kwargs)


def make_trainer(tmp_path, reward=redness, peft=True, callbacks=None, prompts=PROMPTS, eval_prompts=None, **kwargs):
    torch.manual_seed(0)
    return ReFLTrainer(
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


class Brightness(PretrainedReward):
    name = "brightness"
    license = "Apache-2.0"
    score_range = (0.0, 1.0)
    num_parameters = 0
    citation = "none"

    def raw_scores(self, images, prompts):
        return images.mean((1, 2, 3))


class Counted(Brightness):
    name = "counted"
    differentiable = False

    def raw_scores(self, images, prompts):
        return super().raw_scores(images, prompts).detach()


class Frames(Brightness):
    """Reads pictures, and no videos."""

    def raw_scores(self, images, prompts):
        assert images.ndim == 4 and len(images) == len(prompts)
        return images.mean((1, 2, 3))


class TestGradient:
    @pytest.mark.parametrize("num_grad_steps", [1, 3])
    @pytest.mark.parametrize("kind", ["pixels", "latents"])
    def test_is_that_of_the_reward_through_the_last_steps(self, tmp_path, kind, num_grad_steps):
        reward = make_slrm() if kind == "latents" else redness
        trainer = make_trainer(tmp_path, reward, num_grad_steps=num_grad_steps)
        randomize_adapter(trainer)
        policy, scheduler, prompts = trainer.policy, trainer.scheduler, PROMPTS[:2]
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        state = trainer.rollout(rows(prompts))
        (chunk,) = state.transitions(2, prompts)
        gradient = torch.autograd.grad(trainer.compute_loss(trainer.model, chunk), parameters, allow_unused=True)

        # Again, by a loop of its own
        x, embeds = state.noise[0], state.prompt_embeds
        for index in range(4):
            sigma, sigma_next = scheduler.sigmas[index], scheduler.sigmas[index + 1]
            with torch.set_grad_enabled(index >= 4 - num_grad_steps):
                velocity = policy.velocity(trainer.model, x, sigma, embeds, trainer.negative_prompt_embeds, 2.0)
                x = x + (sigma_next - sigma) * velocity
        if kind == "pixels":
            config = policy.vae.config
            raw = policy.vae.decode(x / config.scaling_factor + config.shift_factor, return_dict=False)[0]
            rewards = redness((raw / 2 + 0.5).clamp(0, 1), prompts)
        else:
            rewards = reward.score(x, 0.0, **embeds.tensors)
        expected = torch.autograd.grad(-rewards.mean(), parameters, allow_unused=True)
        assert max(value.abs().max() for value in gradient if value is not None) > 1e-5
        for value, reference in zip(gradient, expected, strict=True):
            assert (value is None) == (reference is None)
            if value is not None:
                torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-7)

    def test_does_not_depend_on_the_chunks(self, tmp_path):
        gradients = []
        for size in (1, 4):
            recorder = GradientRecorder()
            options = {"per_device_train_batch_size": 4, "transition_batch_size": size, "max_steps": 1}
            make_trainer(tmp_path / str(size), prompts=PROMPTS[:2] * 2, callbacks=[recorder], **options).train()
            gradients.append(recorder.gradients)
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-8)


class TestTraining:
    @pytest.mark.parametrize("peft", [True, False])
    def test_only_what_is_trained_changes(self, tmp_path, peft):
        trainer = make_trainer(tmp_path, peft=peft)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
        assert changed and (not peft or all("lora_" in name for name in changed))

    @pytest.mark.slow
    @pytest.mark.parametrize("options", [{}, {"num_grad_steps": 4}, {"estimate_range": [1, 3]}])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_learns_a_preference_and_its_opposite(self, tmp_path, sign, options):
        """On prompts and noise that training did not see."""
        trainer = make_trainer(
            tmp_path,
            lambda images, prompts: sign * images.mean((1, 2, 3)),
            eval_prompts=["bee", "ant"],
            max_steps=8,
            learning_rate=1e-2,
            **options,
        )
        before = trainer.generate(["bee", "ant"] * 4, seed=100).mean()
        trainer.train()
        assert sign * (trainer.generate(["bee", "ant"] * 4, seed=100).mean() - before) > 1e-3

    def test_latent_and_pixel_rewards_are_weighted_and_logged(self, tmp_path):
        rewards = [make_slrm(), redness, Brightness()]
        trainer = make_trainer(tmp_path, rewards, reward_weights=[1.0, 2.0, 3.0], max_steps=1)
        trainer.train()
        logs = trainer.state.log_history[0]
        parts = [logs[f"rewards/{name}/mean"] for name in ("slrm", "redness", "brightness")]
        assert logs["reward"] == pytest.approx(parts[0] + 2 * parts[1] + 3 * parts[2], abs=1e-5)
        assert logs["loss"] == pytest.approx(-logs["reward"], abs=1e-5)

    def test_forwards(self, tmp_path):
        """Without gradient up to the last steps, and without a reference unless it is asked for."""
        trainer = make_trainer(tmp_path, max_steps=1, num_grad_steps=2, profile=True)
        trainer.train()
        stages = trainer.timer.stages
        assert stages["policy"].latents == stages["policy, training"].latents == 2 * 2
        assert "reference, training" not in stages

    def test_estimate_of_a_random_step_that_all_processes_draw_alike(self, tmp_path):
        trainer = make_trainer(tmp_path, estimate_range=[1, 2])
        steps = []
        for step in range(8):
            steps.append(trainer.rollout(rows(PROMPTS[:1]), seed_step=step).step_indices.item())
        assert set(steps) == {1, 2}
        other = make_trainer(tmp_path / "other", estimate_range=[1, 2])
        again = [other.rollout(rows(PROMPTS[1:2]), seed_step=step).step_indices.item() for step in range(8)]
        assert again == steps
        before = trainable(trainer)
        trainer.train()
        assert any(not torch.equal(value, before[name]) for name, value in trainable(trainer).items())

    def test_distance_from_the_reference(self, tmp_path):
        trainer = make_trainer(tmp_path, beta=0.5, max_steps=3, learning_rate=1e-2)
        trainer.train()
        logs = [log for log in trainer.state.log_history if "distance" in log]
        assert logs[0]["distance"] == 0 and logs[-1]["distance"] > 0
        assert logs[-1]["loss"] == pytest.approx(-logs[-1]["reward"] + 0.5 * logs[-1]["distance"], abs=1e-5)

    def test_evaluation_needs_no_gradient(self, tmp_path):
        trainer = make_trainer(tmp_path, eval_prompts=["bee"])
        metrics = trainer.evaluate()
        assert metrics["eval_reward"] != 0 and metrics["eval_loss"] == pytest.approx(-metrics["eval_reward"], abs=1e-5)

    def test_further_columns_reach_the_reward(self, tmp_path):
        seen = []

        def reward(images, prompts, amount):
            seen.extend(zip(prompts, amount, strict=True))
            return images.mean((1, 2, 3))

        dataset = Dataset.from_dict({"prompt": PROMPTS, "amount": [len(prompt) for prompt in PROMPTS]})
        args = make_args(tmp_path, max_steps=1, per_device_train_batch_size=2, transition_batch_size=1)
        ReFLTrainer(make_pipeline(), reward, args, train_dataset=dataset, peft_config=make_lora()).train()
        assert len(seen) == 2 and all(amount == len(prompt) for prompt, amount in seen)

    def test_videos(self, tmp_path):
        def brightness(videos, prompts):
            assert videos.shape[1:] == (3, 5, 32, 32)
            return videos.mean((1, 2, 3, 4))

        args = make_args(tmp_path, max_steps=1, num_frames=5, max_sequence_length=4)
        dataset = Dataset.from_dict({"prompt": PROMPTS})
        trainer = ReFLTrainer(tiny_wan_pipeline(), brightness, args, train_dataset=dataset, peft_config=make_lora())
        before = trainable(trainer)
        trainer.train()
        assert any(not torch.equal(value, before[name]) for name, value in trainable(trainer).items())

    def test_a_reward_of_images_averages_over_the_frames_of_videos(self, tmp_path):
        args = make_args(tmp_path, max_steps=1, num_frames=5, max_sequence_length=4)
        dataset = Dataset.from_dict({"prompt": PROMPTS})
        trainer = ReFLTrainer(tiny_wan_pipeline(), Frames(), args, train_dataset=dataset, peft_config=make_lora())
        before = trainable(trainer)
        trainer.train()
        assert any(not torch.equal(value, before[name]) for name, value in trainable(trainer).items())

    def test_a_reward_with_the_weight_0_is_logged_and_needs_no_gradient(self, tmp_path):
        trainer = make_trainer(tmp_path, [redness, Counted()], reward_weights=[1.0, 0.0], max_steps=1)
        trainer.train()
        alone = make_trainer(tmp_path / "alone", max_steps=1)
        alone.train()
        logs, of_alone = trainer.state.log_history[0], alone.state.log_history[0]
        assert logs["rewards/counted/mean"] > 0 and logs["loss"] == of_alone["loss"]
        for name, value in trainable(trainer).items():
            assert torch.equal(value, trainable(alone)[name])


class TestSaving:
    def test_lora_loads_into_diffusers_exactly(self, tmp_path):
        trainer = make_trainer(tmp_path, max_steps=1)
        trainer.train()
        check_lora_loads_into_diffusers_exactly(trainer, PROMPTS[0], tmp_path / "base")
        card = (tmp_path / "out" / "README.md").read_text()
        assert "refl" in card and "xu2023imagereward" in card

    def test_full_fine_tuning_is_saved_as_a_transformer(self, tmp_path):
        trainer = make_trainer(tmp_path, peft=False, max_steps=1)
        trainer.train()
        check_full_fine_tuning_is_saved_as_a_transformer(trainer)

    @pytest.mark.parametrize("options", [{}, {"estimate_range": [0, 3]}])
    def test_resume_is_exact(self, tmp_path, options):
        check_resume_is_exact(make_trainer, tmp_path, **options)


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_grad_steps": 0}, "num_grad_steps"),
            ({"num_grad_steps": 5}, "num_grad_steps"),
            ({"estimate_range": [2, 1]}, "estimate_range"),
            ({"estimate_range": [2, 4]}, "estimate_range"),
            ({"estimate_range": [1, 2], "num_grad_steps": 2}, "num_grad_steps"),
            ({"beta": -1.0}, "beta"),
            ({"num_iterations": 2}, "num_iterations"),
            ({"sync_ref_model": True}, "sync_ref_model"),
            ({"reward_group_offload": True}, "reward_group_offload"),
            ({"reward_weights": [0.0, 0.0]}, "`reward_weights` are all 0"),
        ],
    )
    def test_options(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            make_args(tmp_path, **options)

    def test_a_reward_without_gradient_is_refused_at_the_start(self, tmp_path):
        with pytest.raises(ValueError, match="`counted` has none"):
            make_trainer(tmp_path, Counted())
        remote = object.__new__(RemoteReward)
        remote.name = "geneval"
        with pytest.raises(ValueError, match="`geneval` has none"):
            make_trainer(tmp_path, remote)

    def test_a_function_that_loses_the_gradient_is_named(self, tmp_path):
        def reward(images, prompts):
            return [image.mean().item() for image in images]

        with pytest.raises(ValueError, match="`reward` returned scores without a gradient"):
            make_trainer(tmp_path, reward).train()

    def test_a_reward_that_is_not_finite_skips_the_update(self, tmp_path):
        def reward(images, prompts):
            return images.mean((1, 2, 3)) * float("nan")

        trainer = make_trainer(tmp_path, reward, max_steps=2)
        before = trainable(trainer)
        trainer.train()
        assert all(torch.equal(value, before[name]) for name, value in trainable(trainer).items())
        assert sum(log.get("skipped_updates", 0) for log in trainer.state.log_history) == 2
        assert json.dumps(trainer.state.log_history)
