# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import copy
import json
import math
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from tapo_trl import DiffusionNFTConfig, DiffusionNFTTrainer
from tapo_trl.schedulers.noise_levels import training_sigmas
from tapo_trl.trainer.old_policy import OLD_POLICY_FILE, soft_update_decay
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
        "num_noise_levels": 2,
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
    return DiffusionNFTConfig(**defaults | kwargs)


def make_trainer(tmp_path, reward=redness, peft=True, callbacks=None, prompts=PROMPTS, eval_prompts=None, **kwargs):
    torch.manual_seed(0)
    return DiffusionNFTTrainer(
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


def other_old_policy(trainer, scale=0.05):
    """Weights of the old policy that differ from the trained ones."""
    generator = torch.Generator().manual_seed(1)
    trainer.old_policy.weights = {
        name: own.detach() + scale * torch.randn(own.shape, generator=generator)
        for name, own in trainer.old_policy.parameters.items()
    }


class Reference:
    """The loss written down once more, in float64, one sample at a time, from predicted clean latents."""

    def __init__(self, trainer, samples):
        self.args, self.samples = trainer.args, samples
        self.model = copy.deepcopy(trainer.model).double()
        self.model.forward = type(self.model).forward.__get__(self.model)
        self.old = copy.deepcopy(self.model)
        own = dict(self.old.named_parameters())
        for name, weight in trainer.old_policy.weights.items():
            own[name].data.copy_(weight)

    def velocity(self, model, level, row):
        sigma, x0 = self.samples.sigmas[level, row].double(), self.samples.samples[row].double()
        x = (1 - sigma) * x0 + sigma * self.samples.noise[level, row].double()
        embeds = self.samples.prompt_embeds
        output = model(
            hidden_states=x[None],
            timestep=(sigma * 1000)[None],
            encoder_hidden_states=embeds.prompt_embeds[row : row + 1].double(),
            pooled_projections=embeds.pooled_prompt_embeds[row : row + 1].double(),
            return_dict=False,
        )[0][0]
        return x, sigma, output

    def optimality(self, row):
        rewards = self.samples.rewards.double()
        k, b = divmod(row, len(rewards))
        group = rewards if self.args.scale_rewards == "batch" else rewards[b]
        advantage = (rewards[b, k] - rewards[b].mean()) / (group.std() + 1e-4)
        return 0.5 + 0.5 * min(max(advantage.item() / self.args.advantage_clip, -1), 1)

    def loss(self):
        beta, losses = self.args.beta, []
        for level in range(len(self.samples.sigmas)):
            for row in range(len(self.samples.samples)):
                x, t, v = self.velocity(self.model, level, row)
                with torch.no_grad():
                    _, _, old = self.velocity(self.old, level, row)
                    with self.model.disable_adapter():
                        _, _, ref = self.velocity(self.model, level, row)
                x0, x1 = self.samples.samples[row].double(), self.samples.noise[level, row].double()
                terms = []
                for u in ((1 - beta) * old + beta * v, (1 + beta) * old - beta * v):
                    if self.args.loss_weighting == "none":
                        terms.append(((u - (x1 - x0)) ** 2).mean())
                    else:
                        estimate = x - t * u
                        terms.append(((estimate - x0) ** 2 / (estimate - x0).abs().mean().item()).mean())
                r = self.optimality(row)
                loss = (r * terms[0] + (1 - r) * terms[1]) * self.args.advantage_clip / beta
                losses.append(loss + self.args.kl_coef * ((v - ref) ** 2).mean())
        return torch.stack(losses).mean()


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
    def test_loss_at_the_start_is_that_of_the_old_policy(self, tmp_path, precision, peft):
        """Whatever the rewards are: the two terms are the same."""
        options = {"max_steps": 1, "beta": 0.4, "advantage_clip": 3.0, "loss_weighting": "none", "kl_coef": 0.7}
        trainer = make_trainer(tmp_path, peft=peft, **options, **precision)
        rollouts = RolloutRecorder(trainer)
        loss = trainer.train().training_loss
        logs = trainer.state.log_history[0]
        assert logs["distance/old"] == logs["distance/ref"] == 0
        assert logs["error/positive"] == logs["error/negative"]
        assert loss == pytest.approx(3.0 / 0.4 * logs["error/positive"], rel=1e-6)
        rewards = rollouts.pairs[0].advantages
        assert rewards.std() > 0.5

    def test_self_check_names_a_policy_that_is_not_the_reference(self, tmp_path):
        trainer = make_trainer(tmp_path)
        randomize_adapter(trainer)
        with pytest.raises(RuntimeError, match="differences from the reference .* not 0"):
            trainer.train()

    @pytest.mark.slow
    @pytest.mark.parametrize("sign", [1, -1])
    def test_learns_a_preference_and_its_opposite(self, tmp_path, sign):
        """On prompts and noise that training did not see."""

        def brightness(images, prompts):
            return sign * images.mean((1, 2, 3))

        held_out = ["bee", "ant"] * 4
        trainer = make_trainer(
            tmp_path, brightness, eval_prompts=["bee", "ant"], max_steps=12, learning_rate=1e-2, num_generations=6
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

    def test_without_a_distance_term_the_reference_is_not_asked(self, tmp_path):
        trainer = make_trainer(tmp_path, max_steps=1, kl_coef=0.0, profile=True)
        trainer.train()
        stages = trainer.timer.stages
        assert "reference, training" not in stages
        assert stages["old policy, training"].latents == stages["policy, training"].latents == 2 * 3 * 2

    def test_videos(self, tmp_path):
        def brightness(videos, prompts):
            assert videos.shape[1:] == (3, 5, 32, 32)
            return videos.mean((1, 2, 3, 4))

        args = make_args(tmp_path, max_steps=1, num_frames=5, max_sequence_length=4)
        dataset = Dataset.from_dict({"prompt": PROMPTS})
        trainer = DiffusionNFTTrainer(
            tiny_wan_pipeline(), brightness, args, train_dataset=dataset, peft_config=make_lora()
        )
        before = trainable(trainer)
        trainer.train()
        assert any(not torch.equal(value, before[name]) for name, value in trainable(trainer).items())


class TestLoss:
    @pytest.mark.parametrize(
        "options", [{}, {"loss_weighting": "none", "scale_rewards": "group", "beta": 1.0, "advantage_clip": 1.0}]
    )
    def test_equals_an_independent_float64_reference(self, tmp_path, options):
        recorder = GradientRecorder()
        options = {"beta": 0.3, "kl_coef": 0.5, "advantage_clip": 2.0} | options
        arguments = {"max_steps": 1, "max_grad_norm": 0.0, "self_check": False, "activation_checkpointing": False}
        trainer = make_trainer(tmp_path, callbacks=[recorder], **arguments, **options)
        randomize_adapter(trainer)
        initial = copy.deepcopy(trainer.model.state_dict())
        start = trainer.old_policy.on_train_begin

        def start_elsewhere(*args, **kwargs):
            start(*args, **kwargs)
            other_old_policy(trainer)

        trainer.old_policy.on_train_begin = start_elsewhere
        trainer.old_policy.on_step_end = lambda *args, **kwargs: None
        rollouts = RolloutRecorder(trainer)
        trainer.train()
        trainer.model.load_state_dict(initial)
        reference = Reference(trainer, rollouts.pairs[0])
        loss = reference.loss()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
        parameters = [p for p in reference.model.parameters() if p.requires_grad]
        for (name, gradient), value in zip(
            recorder.gradients.items(), torch.autograd.grad(loss, parameters), strict=True
        ):
            scale = value.abs().max().item()
            torch.testing.assert_close(gradient.double(), value, rtol=2e-3, atol=2e-3 * scale + 1e-7, msg=name)

    def test_half_precision_keeps_the_two_policies_apart(self, tmp_path):
        """Autocast keeps copies of weights that it has cast, and must not take those of the old policy for the trained ones."""
        trainer = make_trainer(tmp_path, bf16=True)
        randomize_adapter(trainer)
        other_old_policy(trainer)
        samples = trainer.rollout(rows(PROMPTS[:2]), seed_step=0)
        (chunk,) = samples.transitions(100)
        parameters = list(trainer.old_policy.parameters.values())
        results = []
        for context in (trainer.accelerator.autocast(), nullcontext()):
            with context:
                losses, _, metrics = trainer.transition_losses(trainer.model, chunk)
            gradients = torch.autograd.grad(losses.mean(), parameters)
            results.append((metrics["distance/old"], torch.cat([value.flatten() for value in gradients])))
        (distance, gradient), (exact_distance, exact_gradient) = results
        assert exact_distance.min() > 1e-4
        torch.testing.assert_close(distance, exact_distance, rtol=0.1, atol=0)
        assert torch.cosine_similarity(gradient, exact_gradient, dim=0) > 0.99

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


class TestOldPolicy:
    def test_decay(self):
        assert [soft_update_decay(i, 0.1, 0.5) for i in (0, 1, 4, 5, 9)] == [0, 0.1, 0.4, 0.5, 0.5]
        assert [soft_update_decay(i, 0.1, 0.5, start=3) for i in (2, 3, 5)] == [0, 0, 0.2]

    def test_is_the_moving_average_and_draws_the_samples(self, tmp_path):
        options = {"old_policy_decay_rate": 0.4, "old_policy_max_decay": 0.9, "max_steps": 4, "learning_rate": 0.03}
        trainer = make_trainer(tmp_path, **options)
        expected, seen = trainable(trainer), []
        sample, end = trainer.sampler.sample, trainer.old_policy.on_step_end

        def watch_samples(model, *args):
            seen.append(trainable(trainer))
            return sample(model, *args)

        def watch_end(args, state, control, **kwargs):
            decay = [None, 0.4, 0.8, 0.9, 0.9][state.global_step]
            for name, value in trainable(trainer).items():
                expected[name] = decay * expected[name] + (1 - decay) * value
            end(args, state, control, **kwargs)

        trainer.sampler.sample, trainer.old_policy.on_step_end = watch_samples, watch_end
        starts = [dict(expected)]
        trainer.old_policy.on_step_begin = lambda *args, **kwargs: starts.append(dict(expected))
        trainer.train()
        for name, value in trainer.old_policy.weights.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-8)
        for sampling, average in zip(seen, starts[1:], strict=True):
            for name, value in sampling.items():
                torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-8)
        assert any((seen[-1][name] - value).abs().max() > 1e-3 for name, value in trainable(trainer).items())
        logged = [log["old_policy/decay"] for log in trainer.state.log_history if "old_policy/decay" in log]
        assert logged == pytest.approx([0, 0.4, 0.8, 0.9])

    def test_waits_until_a_rollout_is_used_up(self, tmp_path):
        trainer = make_trainer(tmp_path, num_iterations=2, max_steps=3, old_policy_max_decay=0.0)
        before = trainable(trainer)
        ends, end = [], trainer.old_policy.on_step_end

        def watch(args, state, control, **kwargs):
            end(args, state, control, **kwargs)
            ends.append({name: value.clone() for name, value in trainer.old_policy.weights.items()})

        trainer.old_policy.on_step_end = watch
        trainer.train()
        names = list(before)
        assert all(torch.equal(ends[0][name], before[name]) for name in names)
        assert any(not torch.equal(ends[1][name], before[name]) for name in names)
        assert all(torch.equal(ends[2][name], ends[1][name]) for name in names)

    def test_evaluation_samples_with_the_trained_policy(self, tmp_path):
        trainer = make_trainer(tmp_path, eval_prompts=["bee", "ant"])
        first = trainer.evaluate()
        other_old_policy(trainer)
        assert trainer.evaluate()["eval_reward"] == first["eval_reward"]

    def test_a_checkpoint_without_it_is_refused(self, tmp_path):
        trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1)
        trainer.train()
        checkpoint = tmp_path / "out" / "checkpoint-1"
        saved = load_file(checkpoint / OLD_POLICY_FILE)
        assert saved.keys() == trainable(trainer).keys()
        with pytest.raises(FileNotFoundError, match=OLD_POLICY_FILE):
            trainer.old_policy.load(tmp_path)


class TestRollouts:
    def test_advantages_and_order_of_rows(self, tmp_path):
        trainer = make_trainer(tmp_path, scale_rewards="group")
        samples = trainer.rollout(rows(PROMPTS[:2]), seed_step=0)
        images = trainer.policy.decode(samples.samples)
        expected = redness(images, None).view(3, 2).T
        torch.testing.assert_close(samples.rewards, expected, rtol=1e-4, atol=1e-5)
        (chunk,) = samples.transitions(100)
        assert chunk.advantages[:6].tolist() == samples.advantages.T.flatten().tolist()
        assert torch.equal(chunk.samples[6:], samples.samples) and torch.equal(chunk.sigmas[6:], samples.sigmas[1])

    def test_seeded_by_row_and_step_not_by_batch(self, tmp_path):
        trainer = make_trainer(tmp_path)
        together = trainer.rollout(rows()[:3], seed_step=3)
        alone = trainer.rollout(rows()[2:3], seed_step=3)
        other = trainer.rollout(rows()[2:3], seed_step=4)
        assert torch.equal(together.noise[:, 2::3], alone.noise)
        assert torch.equal(together.sigmas[:, 2::3], alone.sigmas)
        assert not torch.equal(alone.noise, other.noise)

    def test_levels(self, tmp_path):
        trainer = make_trainer(tmp_path, num_noise_levels=None)
        levels = trainer.rollout(rows()[:2], seed_step=0).sigmas
        steps = trainer.sampler.scheduler.sigmas[:-1]
        assert levels.shape == (3, 6) and torch.isin(levels, steps).all()
        assert all(len(column.unique()) == 3 for column in levels.T)
        assert len(levels.unique()) == 4
        trainer = make_trainer(tmp_path / "b", num_noise_levels=7, timestep_sampling="logit_normal")
        levels = trainer.rollout(rows()[:2], seed_step=0).sigmas
        assert levels.shape == (7, 6) and torch.isin(levels, training_sigmas(trainer.sampler.scheduler)).all()

    @pytest.mark.slow
    def test_evaluation_is_repeatable_and_does_not_disturb_training(self, tmp_path):
        plain = make_trainer(tmp_path / "a", max_steps=3)
        plain.train()
        watched = make_trainer(
            tmp_path / "b", max_steps=3, eval_prompts=["bee", "ant", "fly"], eval_strategy="steps", eval_steps=1
        )
        watched.train()
        for name, value in trainable(plain).items():
            torch.testing.assert_close(trainable(watched)[name], value, rtol=0, atol=1e-6)
        first, second = watched.evaluate(), watched.evaluate()
        for name in ("eval_loss", "eval_reward", "eval_distance/old"):
            assert first[name] == second[name] and math.isfinite(first[name])


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
    @pytest.mark.parametrize("options", [{}, {"peft": False}, {"bf16": True}, {"num_iterations": 4}])
    def test_resume_is_exact(self, tmp_path, options):
        """With an old policy far from the trained one, and in the middle of a rollout."""
        options = {"learning_rate": 0.02, "old_policy_decay_rate": 0.3, "old_policy_max_decay": 0.9} | options
        if not options.get("peft", True):
            options["learning_rate"] = 1e-3
        check_resume_is_exact(make_trainer, tmp_path, **options)
        files = [tmp_path / run / "out" / "checkpoint-4" / OLD_POLICY_FILE for run in ("a", "b")]
        first, second = map(load_file, files)
        assert all(torch.equal(value, second[name]) for name, value in first.items())

    def test_model_card(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.train()
        trainer.save_model()
        card = (tmp_path / "out" / "README.md").read_text()
        assert "diffusion-nft" in card and "zheng2026diffusionnft" in card and "load_lora_weights" in card
        assert "| `num_noise_levels` | 2 |" in card and str(tmp_path) not in card
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 4


class TestBadInput:
    @pytest.mark.parametrize(
        "kwargs",
        [
            {"num_generations": 1},
            {"num_noise_levels": 0},
            {"num_noise_levels": 5},
            {"beta": 0.0},
            {"advantage_clip": 0.0},
            {"kl_coef": -1.0},
            {"old_policy_max_decay": 1.0},
            {"old_policy_decay_rate": -0.1},
            {"timestep_sampling": "normal"},
            {"loss_weighting": "linear"},
            {"scale_rewards": "all"},
        ],
    )
    def test_configuration(self, tmp_path, kwargs):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            make_args(tmp_path, **kwargs)

    def test_a_reference_that_follows_needs_a_distance_term(self, tmp_path):
        with pytest.raises(ValueError, match="kl_coef"):
            make_args(tmp_path, sync_ref_model=True, kl_coef=0.0)
