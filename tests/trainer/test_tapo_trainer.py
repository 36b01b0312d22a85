# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import copy
import json
import math
from contextlib import nullcontext
from itertools import permutations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from tapo_trl import SLRMModel, TAPOConfig, TAPOTrainer
from tapo_trl.callbacks.base import TAPOCallback
from tapo_trl.policies import SD3Policy
from tapo_trl.rollouts import TAPOSampler, TrajectoryPairs
from tapo_trl.rollouts.subset import draw_examples
from tapo_trl.trainer import tapo_trainer
from tests.testing_utils import tiny_sd3_pipeline as make_pipeline
from tests.trainer.policy_checks import (
    check_full_fine_tuning_is_saved_as_a_transformer,
    check_lora_loads_into_diffusers_exactly,
    check_resume_is_exact,
    trainable,
)


PROMPTS = ["cat", "dog", "fox", "owl"]


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def make_args(tmp_path, **kwargs):
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
        "resolution": 32,
        "max_sequence_length": 3,
        "num_inference_steps": 6,
        "num_sde_steps": 3,
        "num_candidates": 2,
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
    return TAPOConfig(**defaults | kwargs)


def make_lora():
    return LoraConfig(r=2, lora_alpha=4, init_lora_weights="gaussian")


def make_trainer(tmp_path, reward=redness, peft=True, callbacks=None, prompts=PROMPTS, eval_prompts=None, **kwargs):
    torch.manual_seed(0)
    return TAPOTrainer(
        make_pipeline(),
        reward,
        make_args(tmp_path, **kwargs),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        eval_dataset=None if eval_prompts is None else Dataset.from_dict({"prompt": eval_prompts}),
        callbacks=callbacks,
        peft_config=make_lora() if peft else None,
    )


def make_slrm():
    return SLRMModel.from_policy(SD3Policy(make_pipeline()), max_sequence_length=3, resolution=32)


def randomize_adapter(trainer, std=0.05):
    generator = torch.Generator().manual_seed(5)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(std * torch.randn(parameter.shape, generator=generator))


class GradientRecorder(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


class RolloutRecorder:
    """Keeps the rollouts of a trainer."""

    def __init__(self, trainer):
        self.pairs, generate = [], trainer.rollout

        def record(*args, **kwargs):
            self.pairs.append(generate(*args, **kwargs))
            return self.pairs[-1]

        trainer.rollout = record


def reference_loss(trainer, pairs):
    """Eq. 11 and 13 written down once more, in float64, one transition at a time, with the KL divergence of its sides."""
    model = copy.deepcopy(trainer.model).double()
    model.forward = type(model).forward.__get__(model)
    args, sigmas = trainer.args, trainer.scheduler.sigmas.double()
    embeds = pairs.prompt_embeds
    negative = trainer.negative_prompt_embeds

    def velocity(x, sigma, prompt):
        out = []
        for e, row in ((negative, 0), (embeds, prompt)):
            out.append(
                model(
                    hidden_states=x[None],
                    timestep=(sigma * 1000)[None],
                    encoder_hidden_states=e.prompt_embeds[row : row + 1].double(),
                    pooled_projections=e.pooled_prompt_embeds[row : row + 1].double(),
                    return_dict=False,
                )[0][0]
            )
        return out[0] + args.guidance_scale * (out[1] - out[0])

    losses = []
    for step, index in enumerate(pairs.step_indices.tolist()):
        t, t_next = sigmas[index], sigmas[index + 1]
        s = args.noise_level * (t / (1 - t)).sqrt()
        for prompt in range(len(embeds)):
            log_ratios, divergences = [], []
            for side in range(2):
                x = pairs.latents[step, side % pairs.latents.shape[1], prompt].double()
                x_next = pairs.next_latents[step, side, prompt].double()
                log_probs, means = [], []
                for context in (nullcontext(), model.disable_adapter()):
                    with context:
                        v = velocity(x, t, prompt)
                    mean = x - (v + s**2 / (2 * t) * (x + (1 - t) * v)) * (t - t_next)
                    means.append(mean)
                    log_probs.append((-((x_next - mean) ** 2) / (2 * s**2 * (t - t_next))).mean())
                log_ratios.append(log_probs[0] - log_probs[1])
                divergences.append(((means[0] - means[1]) ** 2 / (2 * s**2 * (t - t_next))).mean())
            loss = -torch.nn.functional.logsigmoid(args.beta * (log_ratios[0] - log_ratios[1]))
            losses.append(pairs.weights[step, prompt] * (loss + args.kl_coef * sum(divergences) / 2))
    return torch.stack(losses).mean(), model


class TestTraining:
    @pytest.mark.parametrize("peft", [True, False])
    def test_only_what_is_trained_changes(self, tmp_path, peft):
        trainer = make_trainer(tmp_path, peft=peft)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        for name, parameter in trainer.model.named_parameters():
            changed = not torch.equal(parameter, before[name])
            last_query = "blocks.2.attn.add_q_proj" in name or "blocks.2.attn.norm_added_q" in name  # has no output
            if not last_query:
                assert changed == (not peft or "lora_" in name), name
        if not peft:
            reference = dict(trainer.ref_model.named_parameters())
            assert all(torch.equal(reference[name], value) for name, value in before.items())

    def test_the_literal_call_with_an_slrm(self, tmp_path):
        """`TAPOTrainer(model, reward_model, args).train()`: prompts of the package, full fine-tuning."""
        make_pipeline().save_pretrained(tmp_path / "pipeline")
        make_slrm().save_pretrained(tmp_path / "slrm")
        args = make_args(tmp_path, max_steps=1, max_sequence_length=3)
        output = TAPOTrainer(str(tmp_path / "pipeline"), str(tmp_path / "slrm"), args).train()
        assert output.training_loss == pytest.approx(math.log(2), abs=1e-6)

    def test_loss_is_ln_2_at_the_start_on_every_step(self, tmp_path):
        trainer = make_trainer(tmp_path, reward=make_slrm(), max_steps=1)
        trainer.train()
        logs = trainer.state.log_history[0]
        losses = [logs[f"step_{index:02d}/loss"] for index in (1, 3, 5)]
        assert losses == pytest.approx([math.log(2)] * 3, abs=1e-7)
        assert logs["kl"] == 0 and logs["rewards/margins"] == 0 and logs["rewards/accuracies"] == 0.5

    @pytest.mark.parametrize("precision", [{"bf16": True}, {"weights": torch.bfloat16}, {"weights": torch.float16}])
    @pytest.mark.parametrize("peft", [True, False])
    def test_loss_is_ln_2_at_the_start_in_half_precision(self, tmp_path, precision, peft):
        precision = dict(precision)
        pipeline = make_pipeline().to(precision.pop("weights", torch.float32))
        dataset = Dataset.from_dict({"prompt": PROMPTS})
        args = make_args(tmp_path, max_steps=1, **precision)
        trainer = TAPOTrainer(
            pipeline, redness, args, train_dataset=dataset, peft_config=make_lora() if peft else None
        )
        assert trainer.train().training_loss == pytest.approx(math.log(2), abs=1e-6)

    def test_loss_is_ln_2_at_the_start_under_float16_autocast(self, tmp_path):
        trainer = make_trainer(tmp_path)
        rows = [{"prompt": prompt, "tapo_row": row} for row, prompt in enumerate(PROMPTS)]
        with torch.autocast("cpu", dtype=torch.float16):
            pairs = trainer.rollout(rows, seed_step=0)
            for chunk in pairs.transitions(5):
                loss = trainer.compute_loss(trainer.model, chunk).item()
                assert loss / chunk.share == pytest.approx(math.log(2), abs=1e-6)

    def test_self_check_names_a_policy_that_is_not_the_reference(self, tmp_path):
        trainer = make_trainer(tmp_path)
        randomize_adapter(trainer)
        with pytest.raises(RuntimeError, match="not ln 2"):
            trainer.train()

    @pytest.mark.parametrize("sign", [1, -1])
    def test_learns_a_preference_and_its_opposite(self, tmp_path, sign):
        """On prompts and noise that training did not see."""

        def brightness(images, prompts):
            return sign * images.mean((1, 2, 3))

        held_out = ["bee", "ant"] * 4
        trainer = make_trainer(
            tmp_path, brightness, eval_prompts=["bee", "ant"], max_steps=12, learning_rate=3e-2, num_candidates=4
        )
        before = trainer.generate(held_out, seed=100).mean()
        trainer.train()
        assert sign * (trainer.generate(held_out, seed=100).mean() - before) > 2e-4

    def test_several_rewards_are_weighted_and_logged(self, tmp_path):
        def constant(images, prompts):
            return torch.full((len(prompts),), 2.0)

        trainer = make_trainer(tmp_path, [make_slrm(), redness, constant], reward_weights=[1.0, 0.0, 3.0], max_steps=1)
        trainer.train()
        logs = trainer.state.log_history[0]
        assert logs["rewards/constant/mean"] == 2 and logs["rewards/constant/std"] == 0
        assert logs["reward"] == pytest.approx(logs["rewards/slrm/mean"] + 6, abs=1e-5)

    @pytest.mark.parametrize("velocity_target", ["parent", "policy", "reference", "initial_noise", "none"])
    def test_every_velocity_target_trains(self, tmp_path, velocity_target):
        trainer = make_trainer(tmp_path, make_slrm(), velocity_target=velocity_target, max_steps=1)
        assert math.isfinite(trainer.train().training_loss)

    @pytest.mark.parametrize("velocity_target", [None, "none"])
    def test_scores_of_estimates(self, tmp_path, velocity_target):
        options = {"score_estimates": True, "velocity_target": velocity_target}
        trainer = make_trainer(tmp_path, make_slrm(), max_steps=1, **options)
        seen = []
        trainer.reward.rewards[0].model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[1]), with_kwargs=True
        )
        assert math.isfinite(trainer.train().training_loss)
        assert len(seen) == trainer.args.num_sde_steps and all(sigma.max() == 0 for sigma in seen)

    @pytest.mark.parametrize(
        "trained_with, expected", [("ground_truth", "parent"), ("reference", "reference"), ("none", "none")]
    )
    def test_the_velocity_target_follows_the_training_of_the_slrm(self, tmp_path, trained_with, expected):
        slrm = make_slrm()
        slrm.register_to_config(velocity_target=trained_with)
        assert make_trainer(tmp_path, slrm).reward.rewards[0].velocity_target == expected
        explicit = make_trainer(tmp_path, slrm, velocity_target="initial_noise")
        assert explicit.reward.rewards[0].velocity_target == "initial_noise"

    def test_reward_columns(self, tmp_path):
        seen = []

        def by_label(images, prompts, label):
            seen.extend(zip(prompts, label, strict=True))
            return torch.tensor(label, dtype=torch.float32)

        dataset = Dataset.from_dict({"prompt": PROMPTS, "label": [0, 1, 2, 3]})
        TAPOTrainer(
            make_pipeline(), by_label, make_args(tmp_path), train_dataset=dataset, peft_config=make_lora()
        ).train()
        assert set(seen) == set(zip(PROMPTS, range(4), strict=True))


class TestGradient:
    def run(self, tmp_path, randomize=True, **kwargs):
        recorder = GradientRecorder()
        arguments = {"max_steps": 1, "max_grad_norm": 0.0, "self_check": False, "activation_checkpointing": False}
        trainer = make_trainer(tmp_path, callbacks=[recorder], **arguments | kwargs)
        if randomize:
            randomize_adapter(trainer)
        rollouts = RolloutRecorder(trainer)
        initial = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        trainer.model.load_state_dict(initial)
        return trainer, rollouts.pairs, recorder.gradients

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"kl_coef": 20.0},
            {"pairing": "tapo_within"},
            {"pairing": "spo", "pair_threshold": [0.0015]},
        ],
        ids=lambda options: "-".join(map(str, options.values())) or "defaults",
    )
    def test_equals_an_independent_float64_reference_and_finite_differences(self, tmp_path, options):
        trainer, (pairs,), gradients = self.run(tmp_path, beta=30.0, **options)
        assert pairs.weights.mean() == 1  # the mean over the pairs that count
        assert (pairs.weights == 0).any() == ("pair_threshold" in options)
        loss, model = reference_loss(trainer, pairs)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        expected = torch.autograd.grad(loss, parameters.values())
        for (name, gradient), value in zip(gradients.items(), expected, strict=True):
            scale = value.abs().max().item()
            torch.testing.assert_close(gradient.double(), value, rtol=2e-3, atol=2e-3 * scale + 1e-7, msg=name)

        direction = {name: torch.randn_like(p) for name, p in parameters.items()}
        losses = []
        for shift in (1e-3, -2e-3):  # to +1e-3 and then to -1e-3 of the parameters
            for name, parameter in trainer.model.named_parameters():
                if name in direction:
                    parameter.data += shift * direction[name].float()
            losses.append(reference_loss(trainer, pairs)[0].item())
        slope = (losses[0] - losses[1]) / 2e-3
        expected_slope = sum((gradients[name].double() * direction[name]).sum() for name in gradients).item()
        assert slope == pytest.approx(expected_slope, rel=2e-2)

    @pytest.mark.parametrize("transition_batch_size", [1, 2, 5, 100])
    def test_chunking_does_not_matter(self, tmp_path, transition_batch_size):
        _, _, expected = self.run(tmp_path / "a", transition_batch_size=6)
        _, _, gradients = self.run(tmp_path / "b", transition_batch_size=transition_batch_size)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3 * expected[name].abs().max())

    @pytest.mark.slow
    def test_accumulation_equals_a_larger_batch(self, tmp_path):
        _, _, expected = self.run(tmp_path / "a", per_device_train_batch_size=4)
        _, pairs, gradients = self.run(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=2)
        assert len(pairs) == 2
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3 * expected[name].abs().max())

    @pytest.mark.slow
    @pytest.mark.parametrize("train_cfg", [True, False])
    def test_train_cfg_scores_transitions_with_the_guidance_of_the_rollout(self, tmp_path, train_cfg):
        trainer = make_trainer(tmp_path, train_cfg=train_cfg, self_check=False, beta=30.0)
        randomize_adapter(trainer)
        rows = [{"prompt": prompt, "tapo_row": row} for row, prompt in enumerate(PROMPTS)]
        pairs = trainer.rollout(rows, seed_step=0)
        (chunk,) = pairs.transitions(100)
        expected, _ = reference_loss(trainer, pairs)
        difference = abs(trainer.compute_loss(trainer.model, chunk).item() - expected.item())
        assert difference < 1e-4 if train_cfg else difference > 1e-3

    @pytest.mark.slow
    def test_checkpointing_does_not_matter(self, tmp_path):
        _, _, expected = self.run(tmp_path / "a")
        trainer, _, gradients = self.run(tmp_path / "b", activation_checkpointing=True)
        assert trainer.policy.transformer.gradient_checkpointing
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)

    def test_step_weighting_evens_out_the_steps(self, tmp_path):
        trainer = make_trainer(tmp_path, step_weighting="velocity")
        weights = trainer.step_weights[torch.tensor(trainer.step_indices)]
        assert weights.mean().item() == pytest.approx(1)
        sigmas = trainer.scheduler.sigmas
        slopes = []
        for index in trainer.step_indices:
            t, dt = sigmas[index].item(), (sigmas[index] - sigmas[index + 1]).item()
            s = 0.7 * math.sqrt(t / (1 - t))
            slopes.append((1 + s**2 * (1 - t) / (2 * t)) * dt / (s * math.sqrt(dt)))
        products = [weight * slope for weight, slope in zip(weights.tolist(), slopes, strict=True)]
        assert products == pytest.approx([products[0]] * 3, rel=1e-4)
        assert max(weights) > 1.05


class TestRollouts:
    def test_seeded_by_row_and_step_not_by_batch(self, tmp_path):
        trainers = [
            make_trainer(tmp_path, per_device_train_batch_size=size, max_steps=1, learning_rate=0.0) for size in (4, 1)
        ]
        noises = []
        for trainer in trainers:
            row = {"prompt": "fox", "tapo_row": 2}
            pairs = trainer.rollout([row], seed_step=3)
            noises.append(pairs.next_latents)
        assert torch.equal(*noises)
        other = trainers[0].rollout([row], seed_step=4).next_latents
        assert not torch.equal(noises[0], other)

    def test_a_rollout_can_be_asked_for(self, tmp_path):
        trainer = make_trainer(tmp_path)
        batch = [trainer.train_dataset[index] for index in (2, 0)]
        pairs = trainer.rollout(batch)
        assert isinstance(pairs, TrajectoryPairs) and pairs.rewards.shape[2] == 2
        assert torch.equal(pairs.next_latents, trainer.rollout(batch, seed_step=0).next_latents)

    @pytest.mark.slow
    def test_num_iterations_uses_a_rollout_again(self, tmp_path):
        trainer = make_trainer(
            tmp_path, num_iterations=3, max_steps=6, per_device_train_batch_size=1, gradient_accumulation_steps=2
        )
        rollouts = RolloutRecorder(trainer)
        trainer.train()
        assert len(rollouts.pairs) == 2 * 2
        kls = [log["kl"] for log in trainer.state.log_history if "kl" in log]
        assert kls[0] == 0 and all(kl > 0 for kl in kls[1:])

    def test_evaluation_is_repeatable_and_leaves_the_weights_alone(self, tmp_path):
        trainer = make_trainer(tmp_path, make_slrm(), eval_prompts=["bee", "ant"])
        before = trainable(trainer)
        first, second = trainer.evaluate(), trainer.evaluate()
        for name in ("eval_loss", "eval_reward", "eval_rewards/accuracies", "eval_step_03/loss"):
            assert first[name] == second[name]
        assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert all(torch.equal(value, before[name]) for name, value in trainable(trainer).items())

    @pytest.mark.slow
    def test_evaluation_and_sampling_do_not_disturb_training(self, tmp_path):
        class Look(TAPOCallback):
            def on_step_end(self, args, state, control, **kwargs):
                self.trainer.generate(self.prompts)

        plain = make_trainer(tmp_path / "a", max_steps=3)
        plain.train()
        watched = make_trainer(
            tmp_path / "b",
            max_steps=3,
            callbacks=[Look(["newt"])],
            eval_prompts=["bee"],
            eval_strategy="steps",
            eval_steps=1,
        )
        watched.train()
        assert sum("eval_reward" in log for log in watched.state.log_history) == 3
        for name, value in trainable(plain).items():
            assert torch.equal(value, trainable(watched)[name]), name

    def test_generate_equals_the_pipeline(self, tmp_path):
        trainer = make_trainer(tmp_path, eval_prompts=["bee"])
        images = trainer.generate(["cat", "bee"], seed=7)
        expected = make_pipeline()(
            ["cat", "bee"],
            height=32,
            width=32,
            num_inference_steps=6,
            guidance_scale=2.0,
            generator=[torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)],
            max_sequence_length=3,
            output_type="pt",
        ).images
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(KeyError, match="zebra"):
            trainer.generate(["zebra"])


class TestProfile:
    def test_counts_every_forward(self, tmp_path, capsys):
        trainer = make_trainer(tmp_path, profile=True, max_steps=2, gradient_accumulation_steps=1)
        trainer.train()
        rows = {line[:28].strip(): line[28:].split() for line in capsys.readouterr().out.splitlines()}
        prompts, candidates = trainer.args.per_device_train_batch_size, trainer.args.num_candidates
        sde_steps = len(trainer.step_indices)
        # Steps 0 and 1 of one trajectory, 3 and 5 of two; a pixel reward has asked for the velocity of 2 and 4 before.
        assert trainer.step_indices == [1, 3, 5] and trainer.args.num_inference_steps == 6
        own = 1 + 1 + 2 + 2
        expected = {
            "policy": 2 * prompts * (own + 2 * sde_steps * candidates),
            "reward": 2 * prompts * 2 * sde_steps * candidates,
            "policy, training": 2 * prompts * 2 * sde_steps,
            "reference, training": 2 * prompts * 2 * sde_steps,
        }
        assert {name: int(rows[name][2]) for name in expected} == expected
        assert int(rows["optimizer"][1]) == 2 and float(rows["everything else"][0]) >= 0


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
        assert "tapo" in card and "xian2026consistent" in card and "load_lora_weights" in card
        assert str(tmp_path) not in card
        metadata = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
        assert all(name.startswith("transformer.") for name in metadata)
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 4

    def test_the_card_names_the_method_of_the_pairing(self, tmp_path):
        trainer = make_trainer(tmp_path, pairing="lpo", pair_threshold=[0.2, 0.4])
        trainer.create_model_card()
        card = (tmp_path / "out" / "README.md").read_text()
        assert "**LPO**" in card and "zhang2025diffusion" in card and "- lpo\n" in card and "[0.2, 0.4]" in card
        assert "xian2026consistent" not in card and "- tapo\n" not in card


class TestPairsThatDoNotCount:
    """Those below the threshold of SPO, and ties."""

    def test_the_loss_is_the_mean_over_the_others_however_the_batch_is_split(self, tmp_path):
        results = []
        for rows, splits in ((4, 1), (2, 2), (1, 4)):
            recorder = GradientRecorder()
            batch = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": splits, "max_steps": 1}
            options = {"pairing": "spo", "pair_threshold": [0.0015], "transition_batch_size": 2}
            trainer = make_trainer(tmp_path / f"{rows}", callbacks=[recorder], **batch | options)
            trainer.train()
            logs = trainer.state.log_history[0]
            assert 0.2 < logs["pairs_kept"] < 0.8
            assert logs["loss"] == pytest.approx(math.log(2), abs=1e-6)
            results.append(recorder.gradients)
        for name, gradient in results[0].items():
            for other in results[1:]:
                torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("loss", ["tapo", "spo"])
    def test_updates_without_a_pair_that_counts_log_no_loss(self, tmp_path, loss):
        def equal(images, prompts):
            return [1.0] * len(prompts)

        trainer = make_trainer(tmp_path, equal, pairing=loss, weight_decay=0.0, eval_prompts=["cat"], kl_coef=1.0)
        before = trainable(trainer)
        trainer.train()
        assert all(torch.equal(value, before[name]) for name, value in trainable(trainer).items())
        for logs in trainer.state.log_history[:2]:
            assert logs["pairs_kept"] == 0 and logs["skipped_updates"] == 0
            assert not {"loss", "rewards/margins", "kl"} & logs.keys()

    def test_a_loss_that_is_logged_over_several_updates_leaves_out_those_without(self, tmp_path):
        calls = []

        def sometimes_equal(images, prompts):
            calls.append(len(prompts))
            return [0.0] * len(prompts) if len(calls) <= 3 else redness(images, prompts)

        trainer = make_trainer(tmp_path, sometimes_equal, logging_steps=2, learning_rate=0.0)
        trainer.train()
        logs = trainer.state.log_history[0]
        assert logs["pairs_kept"] == 0.5 and logs["loss"] == pytest.approx(math.log(2), abs=1e-6)


class TestCallbacks:
    def test_prompts_of_callbacks_are_encoded_and_the_trainer_attached(self, tmp_path):
        class Look(TAPOCallback):
            def on_step_end(self, args, state, control, **kwargs):
                self.images = self.trainer.generate(self.prompts, seed=1)

        callback = Look(["newt"])
        trainer = make_trainer(tmp_path, callbacks=[callback], max_steps=1)
        trainer.train()
        assert callback.images.shape == (1, 3, 32, 32)

    def test_reference_can_follow_the_policy(self, tmp_path):
        trainer = make_trainer(
            tmp_path, peft=False, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0
        )
        trainer.train()
        for name, value in trainer.ref_model.state_dict().items():
            torch.testing.assert_close(value, trainer.model.state_dict()[name], rtol=0, atol=0)

    def test_reference_that_an_slrm_is_compared_with_stays(self, tmp_path):
        slrm = make_slrm()
        for target in (None, "reference"):
            slrm.register_to_config(velocity_target="reference")
            with pytest.raises(ValueError, match="`sync_ref_model=True` changes the reference"):
                make_trainer(tmp_path, reward=slrm, peft=False, sync_ref_model=True, velocity_target=target)
        make_trainer(tmp_path, reward=slrm, peft=False, sync_ref_model=True, velocity_target="parent")


@pytest.mark.parametrize(
    ("options", "authors"),
    [
        ({"pairing": "spo", "beta": 1000.0}, "10"),
        ({"pairing": "lpo", "beta": 1000.0}, "500"),
        ({"pairing": "spo"}, None),
        ({"pairing": "lpo", "beta": 500.0}, None),
        ({"pairing": "tapo", "beta": 200.0}, None),
    ],
)
def test_beta_of_another_pairing(tmp_path, caplog, options, authors):
    make_args(tmp_path, **{"beta": None} | options)
    assert ("whose authors use" in caplog.text) == (authors is not None)
    assert authors is None or f"whose authors use {authors}:" in caplog.text


class TestCenteredLogRatios:
    def test_are_relative_to_the_mean_over_all_candidates(self, tmp_path, monkeypatch):
        """The log-ratios of all candidates one by one, by an own formula, against the margin of the trainer."""
        trainer = make_trainer(tmp_path, center_log_ratios=True, num_candidates=4, guidance_scale=1.0)
        drawn, draw = [], TAPOSampler._draw

        def record(self, *args):
            candidates, std = draw(self, *args)
            drawn.append(candidates.latents)
            return candidates, std

        monkeypatch.setattr(TAPOSampler, "_draw", record)
        rollout = trainer.rollout(list(trainer.train_dataset)[:2], seed_step=0)
        randomize_adapter(trainer)
        (chunk,) = rollout.transitions(rollout.num_examples)
        with torch.no_grad():
            metrics = trainer.transition_losses(trainer.model, chunk)[2]

        sigmas, margins, parents = trainer.scheduler.sigmas.double(), [], []
        for step, index in enumerate(rollout.step_indices.tolist()):
            t, dt = sigmas[index], sigmas[index] - sigmas[index + 1]
            s = trainer.args.noise_level * (t / (1 - t)).sqrt()
            for prompt in range(2):
                centered, means = [], []
                for side in range(2):
                    x, embeds = rollout.latents[step, side, prompt : prompt + 1], rollout.prompt_embeds[[prompt]]
                    of_policies = []
                    with torch.no_grad():
                        for context in (nullcontext(), trainer.model.disable_adapter()):
                            with context:
                                v = trainer.policy.velocity(trainer.model, x, t.float(), embeds).double()
                            of_policies.append(x - (v + s**2 / (2 * t) * (x + (1 - t) * v)) * dt)
                    own, ref = of_policies
                    of_candidates = drawn[step].view(2, 2, 4, *x.shape[1:])[side, prompt].double()

                    ratios = ((of_candidates - ref) ** 2 - (of_candidates - own) ** 2) / (2 * s**2 * dt)
                    means.append(ratios.mean())
                    x_next = rollout.next_latents[step, side, prompt].double()
                    centered.append((((x_next - ref) ** 2 - (x_next - own) ** 2) / (2 * s**2 * dt)).mean() - means[-1])
                margins.append(trainer.args.beta * (centered[0] - centered[1]))
                parents.append(trainer.args.beta * (means[0] - means[1]).abs())
        torch.testing.assert_close(metrics["rewards/margins"].double(), torch.stack(margins), atol=1e-2, rtol=1e-3)
        torch.testing.assert_close(metrics["logits/parents"].double(), torch.stack(parents), atol=1e-2, rtol=1e-3)
        assert metrics["logits/parents"].max() > 0.1

    def test_resume_is_exact_between_updates_from_the_same_rollouts(self, tmp_path):
        options = {
            "center_log_ratios": True,
            "num_iterations": 2,
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 3,
        }
        whole = make_trainer(tmp_path / "whole", **options)
        whole.train()
        resumed = make_trainer(tmp_path / "resumed", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole/out/checkpoint-3"))
        pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        assert whole.state.log_history[-2]["logits/parents"] > 0


class TestPairsPerUpdate:
    @pytest.mark.parametrize(
        ("number", "options"),
        [
            (1, {"pairing": "spo", "pair_threshold": [0.0015], "gradient_accumulation_steps": 2, "kl_coef": 3.0}),
            (2, {"step_weighting": "velocity"}),
        ],
        ids=["accumulated", "weighted"],
    )
    def test_the_mean_over_all_draws_is_the_gradient_of_all_pairs(self, tmp_path, monkeypatch, number, options):
        def gradients(order=None, **more):
            def draw(*args):
                with monkeypatch.context() as patch:
                    patch.setattr(torch, "randperm", lambda total, generator: torch.tensor(order))
                    return draw_examples(*args)

            monkeypatch.setattr(tapo_trainer, "draw_examples", draw)
            folder = tmp_path / "-".join(map(str, order or ["all"]))
            arguments = {"guidance_scale": 1.0, "beta": 30.0, "transition_batch_size": 2, **options, **more}
            _, rollouts, found = TestGradient().run(folder, **arguments)
            if "pair_threshold" in options:
                assert 0 < sum((pairs.weights == 0).sum() for pairs in rollouts) < 9
            return torch.cat([gradient.flatten() for gradient in found.values()]).double()

        expected = gradients()
        drawn = torch.stack([gradients(order, pairs_per_update=number) for order in permutations(range(3))])
        torch.testing.assert_close(drawn.mean(0), expected, rtol=1e-4, atol=1e-5 * expected.abs().max())
        assert (drawn - expected).norm(dim=1).min() > 0.05 * expected.norm()

    def test_all_of_them_change_nothing(self, tmp_path):
        weights = []
        for name, options in {"all": {}, "drawn": {"pairs_per_update": 3}}.items():
            trainer = make_trainer(tmp_path / name, transition_batch_size=4, **options)
            trainer.train()
            weights.append(trainable(trainer))
        assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())

    def test_every_step_draws_anew_and_a_resumed_run_the_same(self, tmp_path, monkeypatch):
        drawn = []

        def record(*args):
            drawn.append(draw_examples(*args))
            return drawn[-1]

        monkeypatch.setattr(tapo_trainer, "draw_examples", record)
        saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3}
        options = {"pairs_per_update": 1, "num_iterations": 2, "num_sde_steps": 5, "t_init": 0, **saving}
        whole = make_trainer(tmp_path / "whole", **options)
        whole.train()
        assert len(drawn) == 4 and drawn[0].latents is drawn[1].latents, "two updates from one rollout"
        assert drawn[0].examples.tolist() != drawn[1].examples.tolist()
        resumed = make_trainer(tmp_path / "resumed", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole/out/checkpoint-3"))
        assert torch.equal(drawn[4].examples, drawn[3].examples) and len(drawn) == 5
        assert all(torch.equal(value, trainable(resumed)[name]) for name, value in trainable(whole).items())

    def test_is_ln_2_at_every_step_of_a_policy_that_stays(self, tmp_path):
        """Also at the second update from a rollout, whose pairs are others."""
        trainer = make_trainer(tmp_path, pairs_per_update=1, num_iterations=2, learning_rate=0.0, max_steps=4)
        trainer.train()
        losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
        assert losses == pytest.approx([math.log(2)] * 4, abs=1e-6)

    def test_evaluation_uses_all_pairs(self, tmp_path):
        found = [
            make_trainer(tmp_path / name, eval_prompts=["cat"], **options).evaluate()["eval_step_03/loss"]
            for name, options in {"all": {}, "drawn": {"pairs_per_update": 1}}.items()
        ]
        assert found[0] == found[1]


class TestScaleOfBeta:
    def test_the_noise_of_logits_is_logged(self, tmp_path):
        trainer = make_trainer(tmp_path, max_steps=1)
        randomize_adapter(trainer)
        trainer.args.self_check, margins, transition_losses = False, [], trainer.transition_losses

        def record(*args):
            losses, weighted, metrics = transition_losses(*args)
            margins.append(metrics["rewards/margins"])
            return losses, weighted, metrics

        trainer.transition_losses = record
        trainer.train()
        logs, margins = trainer.state.log_history[0], torch.cat(margins)
        assert logs["logits/std"] == pytest.approx(margins.std(correction=0).item(), rel=1e-4)
        assert logs["logits/saturated"] == pytest.approx((margins.abs() > 4).float().mean().item())
        assert 0 < logs["logits/saturated"] < 1

    def test_is_transferred_by_the_size_of_the_latents(self, tmp_path):
        """The tiny latents have 4 x 8 x 8 = 256 dimensions: a reference of 64 doubles beta."""
        weights = []
        for name, options in {"doubled": {"beta": 20.0}, "transferred": {"beta_reference_dim": 64}}.items():
            trainer = make_trainer(tmp_path / name, **{"beta": 10.0, "max_steps": 2} | options)
            trainer.train()
            weights.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
        assert all(map(torch.equal, *weights))

    @pytest.mark.parametrize(
        ("options", "warns"),
        [
            ({"beta": 1000.0}, True),
            ({"beta": 1000.0, "beta_reference_dim": 65536}, False),
            ({"beta": 10.0}, False),
            ({"beta": 1000.0, "loss_type": "ipo"}, False),
            ({"beta": 1000.0, "logprob_reduction": "sum"}, False),
        ],
    )
    def test_a_beta_that_will_saturate_is_named(self, tmp_path, caplog, options, warns):
        make_trainer(tmp_path, **options)
        assert ("is large for latents of" in caplog.text) == warns


class TestBadInput:
    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"num_sde_steps": 9}, "num_sde_steps"),
            ({"num_sde_steps": 6}, "t_init"),
            ({"num_candidates": 1}, "num_candidates"),
            ({"noise_level": 0.0}, "noise_level"),
            ({"sde_type": "cps", "noise_level": 1.5}, 'at most 1 for `sde_type="cps"`'),
            ({"sde_type": "cps"}, "has no noise at the last sampling step"),  # the steps are 1, 3 and 5 of 0 to 5
            ({"beta": 0.0}, "beta"),
            ({"beta_reference_dim": 0}, "beta_reference_dim"),
            (
                {"center_log_ratios": True, "pairing": "spo"},
                "`center_log_ratios=True` has no effect with `pairing='spo'`",
            ),
            ({"beta_reference_dim": 64, "logprob_reduction": "sum"}, "`beta_reference_dim=64` has no effect"),
            ({"pairs_per_update": 0}, "`pairs_per_update` must be at least 1"),
            ({"pairs_per_update": 4}, "`pairs_per_update=4`, but 3 stochastic steps give a prompt only 3 pairs"),
            ({"pairs_per_update": 7, "pairing": "tapo_within"}, "a prompt only 6 pairs"),
            ({"kl_coef": -1.0}, "kl_coef"),
            ({"pairing": "dpo"}, "pairing"),
            ({"continue_with": "best"}, "continue_with"),
            ({"pairing": "spo", "continue_with": "worst"}, "continue_with"),
            ({"pair_threshold": [1.0]}, "pair_threshold"),
            ({"pairing": "lpo", "consistent_pairs": True}, "consistent_pairs"),
            ({"pair_threshold": [0.1, 0.2, 0.3]}, "pair_threshold"),
            ({"ratio_clip": 1.0}, "ratio_clip"),
            ({"label_smoothing": 0.5}, "label_smoothing"),
            ({"sde_type": "ddim"}, "sde_type"),
            ({"velocity_target": "child"}, "velocity_target"),
            (
                {"velocity_target": "parent", "score_estimates": True},
                "`velocity_target='parent'` has no effect with `score_estimates=True`",
            ),
            ({"loss_type": "dpo"}, "loss_type"),
            ({"remove_unused_columns": True}, "remove_unused_columns"),
            ({"auto_find_batch_size": True}, "auto_find_batch_size"),
            (
                {"loss_type": "hinge", "label_smoothing": 0.1},
                "`label_smoothing=0.1` has no effect with `loss_type='hinge'`",
            ),
            (
                {"loss_type": "ipo", "label_smoothing": 0.1},
                "`label_smoothing=0.1` has no effect with `loss_type='ipo'`",
            ),
            ({"ref_model_sync_steps": 8}, "`ref_model_sync_steps=8` has no effect without `sync_ref_model=True`"),
            ({"ref_model_mixup_alpha": 0.5}, "`ref_model_mixup_alpha=0.5` has no effect"),
            ({"transition_batch_size": 0}, "transition_batch_size"),
            ({"sync_ref_model": True, "ref_model_mixup_alpha": 2.0}, r"`ref_model_mixup_alpha` must be in \(0, 1\]"),
            ({"noise_level": float("nan")}, "`noise_level` must be a number, such as 0.5, but is NaN"),
            ({"reward_weights": [1.0, float("nan")]}, r"`reward_weights\[1\]` must be a number"),
        ],
    )
    def test_configuration(self, tmp_path, kwargs, message):
        with pytest.raises(ValueError, match=message):
            make_args(tmp_path, **kwargs)

    @pytest.mark.parametrize(
        "prompts, message", [([], "empty"), (["cat", None], "row 1"), ({"text": ["cat"]}, "needs a column `prompt`")]
    )
    def test_dataset(self, tmp_path, prompts, message):
        dataset = Dataset.from_dict(prompts if isinstance(prompts, dict) else {"prompt": prompts})
        with pytest.raises(ValueError, match=message):
            TAPOTrainer(make_pipeline(), redness, make_args(tmp_path), train_dataset=dataset)

    def test_sizes_and_rewards(self, tmp_path):
        with pytest.raises(ValueError, match="multiple of 8"):
            make_trainer(tmp_path, resolution=36)
        with pytest.raises(ValueError, match="reward_model"):
            make_trainer(tmp_path, reward=3)
        with pytest.raises(ValueError, match="sync_ref_model"):
            make_trainer(tmp_path, sync_ref_model=True)

    @pytest.mark.parametrize(
        ("rewards", "weights", "message"),
        [
            ([], None, "`reward_model` is an empty list"),
            (redness, [1.0, 2.0], "`reward_weights` has 2 entries for 1 reward models"),
            ([redness, redness], [], "`reward_weights` has 0 entries for 2 reward models"),
        ],
    )
    def test_number_of_rewards_before_anything_is_loaded(self, tmp_path, rewards, weights, message):
        with pytest.raises(ValueError, match=message):
            TAPOTrainer("no-such/model", rewards, make_args(tmp_path, reward_weights=weights))

    def test_slrm_of_another_vae_or_text_length(self, tmp_path):
        other = SLRMModel.from_policy(SD3Policy(make_pipeline(seed=1)), max_sequence_length=3)
        with pytest.raises(ValueError, match="VAE"):
            make_trainer(tmp_path, reward=other)
        with pytest.raises(ValueError, match="max_sequence_length"):
            make_trainer(tmp_path, reward=make_slrm(), max_sequence_length=4)

    def test_output_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="cannot be created"):
            make_trainer(tmp_path, output_dir=str(tmp_path / "file" / "out"))
