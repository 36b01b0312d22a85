# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import copy
import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import TrainingArguments

from tapo_trl import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    EMACallback,
    RewardHackingGuardCallback,
    SampleGridCallback,
)
from tapo_trl.losses import rare_pair_weights
from tapo_trl.policies import SD3Policy
from tapo_trl.policies.flux import FluxPolicy
from tests.data.preference_pairs import color_pairs, latent_pairs
from tests.data.video_files import color_videos
from tests.testing_utils import tiny_sd3_pipeline, tiny_wan_pipeline
from tests.trainer.policy_checks import (
    check_full_fine_tuning_is_saved_as_a_transformer,
    check_lora_loads_into_diffusers_exactly,
    check_resume_is_exact,
    trainable,
)
from tests.trainer.test_tapo_trainer import GradientRecorder, make_lora, randomize_adapter


VARIANTS = ("diffusion_dpo", "inversion_dpo", "dense_reward")


def make_args(tmp_path, **kwargs):
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
        "resolution": 32,
        "max_sequence_length": 3,
        "num_inference_steps": 6,
        "guidance_scale": 2.0,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "eval_sigmas": [0.3, 0.8],
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return DiffusionDPOConfig(**defaults | kwargs)


def make_trainer(tmp_path, pairs=None, peft=True, callbacks=None, eval_pairs=None, pipeline=None, **kwargs):
    torch.manual_seed(0)
    return DiffusionDPOTrainer(
        tiny_sd3_pipeline() if pipeline is None else pipeline,
        make_args(tmp_path, **kwargs),
        train_dataset=latent_pairs(8) if pairs is None else pairs,
        eval_dataset=eval_pairs,
        callbacks=callbacks,
        peft_config=make_lora() if peft else None,
    )


def first_batch(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


class TestTraining:
    @pytest.mark.parametrize("peft", [True, False])
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_only_what_is_trained_changes(self, tmp_path, variant, peft):
        trainer = make_trainer(tmp_path, variant=variant, peft=peft)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        for name, parameter in trainer.model.named_parameters():
            changed = not torch.equal(parameter, before[name])
            if "blocks.2.attn.add_q_proj" not in name and "blocks.2.attn.norm_added_q" not in name:  # have no output
                assert changed == (not peft or "lora_" in name), name
        if not peft:
            reference = dict(trainer.ref_model.named_parameters())
            assert all(torch.equal(reference[name], value) for name, value in before.items())

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize(
        "precision",
        [{}, {"bf16": True}, {"weights": torch.bfloat16}, {"weights": torch.float16, "peft": True}],
        ids=str,
    )
    @pytest.mark.parametrize("peft", [True, False])
    def test_loss_is_ln_2_at_the_start(self, tmp_path, variant, precision, peft):
        precision = {"peft": peft} | precision
        pipeline = tiny_sd3_pipeline().to(precision.pop("weights", torch.float32))
        trainer = make_trainer(tmp_path, pipeline=pipeline, variant=variant, max_steps=1, **precision)
        assert trainer.train().training_loss == pytest.approx(math.log(2), abs=1e-6)
        logs = trainer.state.log_history[0]
        assert logs["rewards/margins"] == logs["rewards/chosen"] == 0 and logs["rewards/accuracies"] == 0.5
        assert logs["error/chosen"] > 0 and logs["error/rejected"] > 0

    def test_loss_is_ln_2_at_the_start_under_float16_autocast(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.model.train()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = trainer.compute_loss(trainer.model, first_batch(trainer))
        assert loss.item() == pytest.approx(math.log(2), abs=1e-6)

    def test_self_check_names_a_policy_that_is_not_the_reference(self, tmp_path):
        trainer = make_trainer(tmp_path)
        randomize_adapter(trainer)
        with pytest.raises(RuntimeError, match="not ln 2"):
            trainer.train()

    @pytest.mark.slow
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_learns_a_separable_preference(self, tmp_path, variant):
        """On pairs and noise that training did not see."""
        held_out = latent_pairs(16, seed=1)
        kwargs = {"max_steps": 30, "learning_rate": 1e-2, "per_device_train_batch_size": 8}
        trainer = make_trainer(tmp_path, latent_pairs(32), variant=variant, eval_pairs=held_out, beta=200.0, **kwargs)
        trainer.train()
        metrics = trainer.evaluate()
        assert metrics["eval_rewards/accuracies"] > 0.9
        assert metrics["eval_rewards/margins"] > 0.1
        assert metrics["eval_loss"] < math.log(2) - 0.05

    @pytest.mark.slow
    @pytest.mark.parametrize("sign", [1, -1])
    def test_samples_move_towards_the_chosen_side(self, tmp_path, sign):
        pairs = latent_pairs(32)
        if sign < 0:
            pairs = pairs.rename_columns({"chosen": "rejected", "rejected": "chosen"})
        kwargs = {"max_steps": 25, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "beta": 200.0}
        trainer = make_trainer(tmp_path, pairs, **kwargs)

        def first_channel():
            return trainer.policy.sample(
                trainer.model,
                trainer.prompt_cache.load(["thing 1"] * 8),
                latent_shape=trainer.latent_shape,
                num_inference_steps=6,
                guidance_scale=1.0,
                generators=[torch.Generator().manual_seed(seed) for seed in range(8)],
            )[:, 0].mean()

        before = first_channel()
        trainer.train()
        assert sign * (first_channel() - before) > 0.05

    @pytest.mark.parametrize("cache_latents", [True, False])
    def test_images(self, tmp_path, cache_latents):
        trainer = make_trainer(
            tmp_path, color_pairs(8), cache_latents=cache_latents, vae_tiling=True, vae_slicing=True
        )
        trainer.train()
        assert trainer.state.global_step == 2

    def test_the_literal_call(self, tmp_path):
        tiny_sd3_pipeline().save_pretrained(tmp_path / "pipeline")
        args = make_args(tmp_path, max_steps=1)
        output = DiffusionDPOTrainer(str(tmp_path / "pipeline"), args, train_dataset=latent_pairs(4)).train()
        assert output.training_loss == pytest.approx(math.log(2), abs=1e-6)


def reference_loss(trainer, inputs):
    """The loss written down once more, in float64, one latent at a time."""
    model = copy.deepcopy(trainer.model).double()
    model.forward = type(model).forward.__get__(model)
    args, embeds = trainer.args, inputs["prompt_embeds"]
    steps, noise = trainer._draw(inputs["row"].tolist())
    grid = trainer.policy.build_scheduler(6, trainer.latent_shape).sigmas.double()

    def velocity(x, sigma, pair):
        return model(
            hidden_states=x[None],
            timestep=(sigma * 1000)[None],
            encoder_hidden_states=embeds.prompt_embeds[pair : pair + 1].double(),
            pooled_projections=embeds.pooled_prompt_embeds[pair : pair + 1].double(),
            return_dict=False,
        )[0][0]

    losses = []
    for pair, step in enumerate(steps.tolist()):
        sigma = trainer.sigmas.double()[step]
        changes = []
        for side in ("chosen", "rejected"):
            clean = inputs[f"{side}_latents"][pair].double()
            if args.variant == "inversion_dpo":
                x = clean
                with torch.no_grad(), model.disable_adapter():
                    for index in range(5, step - 1, -1):
                        x = x + (grid[index] - grid[index + 1]) * velocity(x, grid[index + 1], pair)
            else:
                x = (1 - sigma) * clean + sigma * noise[pair].double()
            errors = []
            for context in (nullcontext(), model.disable_adapter()):
                with context:
                    errors.append((velocity(x, sigma, pair) - (x - clean) / sigma).square().mean())
            changes.append(errors[0] - errors[1])
        losses.append(-torch.log(torch.sigmoid(-args.beta / 2 * (changes[0] - changes[1]))))
    return torch.stack(losses).mean(), model


class TestGradient:
    def gradients(self, tmp_path, **kwargs):
        recorder = GradientRecorder()
        defaults = {"max_steps": 1, "max_grad_norm": 0.0, "self_check": False, "activation_checkpointing": False}
        trainer = make_trainer(tmp_path, callbacks=[recorder], **defaults | kwargs)
        randomize_adapter(trainer)
        initial = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        trainer.model.load_state_dict(initial)
        trainer.state.global_step = 0
        return trainer, recorder.gradients

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_equals_an_independent_float64_reference(self, tmp_path, variant):
        trainer, gradients = self.gradients(tmp_path, pairs=latent_pairs(4), variant=variant, beta=30.0)
        loss, model = reference_loss(trainer, first_batch(trainer))
        assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert abs(loss.item() - math.log(2)) > 1e-3
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        expected = torch.autograd.grad(loss, parameters.values())
        for (name, gradient), value in zip(gradients.items(), expected, strict=True):
            scale = value.abs().max().item()
            torch.testing.assert_close(gradient.double(), value, rtol=2e-3, atol=2e-3 * scale + 1e-7, msg=name)

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize(
        "kwargs",
        [{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, {"activation_checkpointing": True}],
        ids=str,
    )
    def test_neither_accumulation_nor_checkpointing_matters(self, tmp_path, variant, kwargs):
        _, expected = self.gradients(tmp_path / "a", variant=variant, per_device_train_batch_size=8)
        _, gradients = self.gradients(
            tmp_path / "b", **{"variant": variant, "per_device_train_batch_size": 8} | kwargs
        )
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3 * expected[name].abs().max())

    def test_margins_and_ties(self, tmp_path):
        pairs = latent_pairs(8)
        losses = {}
        for name, column in {"plain": [], "margin": [2.0] * 8, "label": [0.5] * 8}.items():
            data = pairs.add_column(name, column) if column else pairs
            trainer = make_trainer(tmp_path / name, data, max_steps=1, per_device_train_batch_size=8)
            trainer.train()
            losses[name] = trainer.state.log_history[0]["loss"]
            assert ("rewards/accuracies" in trainer.state.log_history[0]) == (name != "label")
        assert losses["plain"] == losses["label"] == pytest.approx(math.log(2), abs=1e-6)
        assert losses["margin"] == pytest.approx(math.log(1 + math.exp(2)), abs=1e-5)

        trainer = make_trainer(tmp_path / "tie", pairs.add_column("label", [0.5] * 8), self_check=False, beta=200.0)
        randomize_adapter(trainer)
        trainer.model.train()
        inputs = first_batch(trainer)
        swapped = inputs | {
            "chosen_latents": inputs["rejected_latents"],
            "rejected_latents": inputs["chosen_latents"],
        }
        losses = [trainer.compute_loss(trainer.model, batch).item() for batch in (inputs, swapped)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert losses[0] > math.log(2)


class TestNoisyLatents:
    def test_depend_on_seed_update_and_row_alone(self, tmp_path):
        trainer = make_trainer(tmp_path)
        steps, noise = trainer._draw([3, 1])
        other_steps, other_noise = trainer._draw([1, 7, 3])
        assert steps[0] == other_steps[2] and torch.equal(noise[0], other_noise[2])
        assert not torch.equal(noise[0], noise[1])
        trainer.state.global_step = 1
        assert not torch.equal(trainer._draw([3])[1][0], noise[0])
        assert not torch.equal(make_trainer(tmp_path, seed=7)._draw([3])[1][0], noise[0])

    def test_both_sides_share_noise_and_level(self, tmp_path):
        trainer = make_trainer(tmp_path)
        inputs = first_batch(trainer)
        noisy, target, sigma = trainer._noisy_latents(inputs, *trainer._draw(inputs["row"].tolist()))
        (chosen_sigma, rejected_sigma), level = sigma.chunk(2), sigma.view(-1, 1, 1, 1)
        assert torch.equal(chosen_sigma, rejected_sigma) and len(set(chosen_sigma.tolist())) == 4
        chosen, rejected = (noisy + (1 - level) * target).chunk(2)  # x1 of each side
        torch.testing.assert_close(chosen, rejected)

    @pytest.mark.parametrize("law", ["uniform", "logit_normal"])
    def test_levels_are_those_of_diffusers_training_scripts(self, tmp_path, law):
        trainer = make_trainer(tmp_path, timestep_sampling=law)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        assert torch.equal(trainer.sigmas, scheduler.sigmas)
        torch.testing.assert_close(trainer.sigmas * 1000, scheduler.timesteps)
        steps = trainer._draw(list(range(1500)))[0]
        assert 0 <= steps.min() and steps.max() <= 999
        spread = {"uniform": 1 / math.sqrt(12), "logit_normal": 0.208}[law]
        assert steps.float().mean() / 1000 == pytest.approx(0.5, abs=0.02)
        assert steps.float().std() / 1000 == pytest.approx(spread, abs=0.015)

    def test_dense_reward_discounts_steps_from_the_noise_on(self, tmp_path):
        trainer = make_trainer(tmp_path, variant="dense_reward", gamma=0.6)
        assert torch.equal(trainer.sigmas, trainer.policy.build_scheduler(6, trainer.latent_shape).sigmas[:-1])
        steps = trainer._draw(list(range(3000)))[0]
        shares = torch.bincount(steps, minlength=6) / 3000
        weights = 0.6 ** torch.arange(6)
        torch.testing.assert_close(shares, weights / weights.sum(), rtol=0, atol=0.03)
        plain = make_trainer(tmp_path, variant="dense_reward", gamma=1.0)
        torch.testing.assert_close(plain.step_probabilities, torch.full((6,), 1 / 6))

    @pytest.mark.parametrize("peft", [True, False])
    def test_inversions_are_the_references(self, tmp_path, peft):
        trainer = make_trainer(tmp_path, variant="inversion_dpo", peft=peft, max_steps=3, learning_rate=1e-2)
        inputs = first_batch(trainer)
        steps = torch.tensor([0, 5, 2, 2])
        before = trainer._noisy_latents(dict(inputs), steps, None)
        trainer.train()
        after = trainer._noisy_latents(dict(inputs), steps, None)
        assert all(torch.equal(*values) for values in zip(before, after, strict=True))
        noisy, target, sigma = before
        clean = torch.cat([inputs["chosen_latents"], inputs["rejected_latents"]])
        torch.testing.assert_close(noisy - sigma.view(-1, 1, 1, 1) * target, clean, rtol=1e-4, atol=1e-4)

    def test_the_noise_levels_of_a_bucket_are_those_of_its_inversion(self, tmp_path):
        """FLUX.1 shifts them by the number of tokens."""
        options = {"variant": "inversion_dpo", "max_sequence_length": 4, "resolution": 256}
        pairs = color_pairs(2, size=256)
        trainer = make_trainer(tmp_path, pipeline=FluxPolicy.tiny(), pairs=pairs, **options)
        policy, inputs = trainer.policy, first_batch(trainer)
        clean = torch.randn(2, *policy.latent_shape(128, 256), generator=torch.Generator().manual_seed(0))
        inputs |= {"chosen_latents": clean, "rejected_latents": clean + 0.1}
        steps = torch.tensor([2, 4])
        noisy, target, sigma = trainer._noisy_latents(inputs, steps, torch.zeros_like(clean))
        of_bucket = policy.build_scheduler(trainer.args.num_inference_steps, clean.shape[1:]).sigmas
        assert sigma.tolist() == of_bucket[steps].repeat(2).tolist() != trainer.sigmas[steps].repeat(2).tolist()
        torch.testing.assert_close(noisy, torch.cat([clean, clean + 0.1]) + sigma.view(-1, 1, 1, 1) * target)

    def test_cached_inversions_are_the_computed_ones(self, tmp_path, monkeypatch):
        kwargs = {"variant": "inversion_dpo", "max_steps": 4, "eval_pairs": latent_pairs(4, seed=1)}
        plain = make_trainer(tmp_path, **kwargs)
        plain.train()
        calls, invert = [], SD3Policy.invert

        def counted(self, *args, **kwargs):
            calls.append(kwargs)
            return invert(self, *args, **kwargs)

        monkeypatch.setattr(SD3Policy, "invert", counted)
        cached = make_trainer(tmp_path, cache_inversions=True, **kwargs)
        cached.train()
        assert len(calls) == 2  # one per batch of the first epoch
        metrics = [cached.evaluate(), cached.evaluate(), plain.evaluate()]
        assert len({values["eval_loss"] for values in metrics}) == 1
        assert len(calls) == 4  # a cached and a plain evaluation
        for name, value in trainable(plain).items():
            assert torch.equal(value, trainable(cached)[name]), name

        other = tiny_sd3_pipeline()
        other.transformer.proj_out.weight.data[0, 0] += 0.1
        folders = [
            make_trainer(tmp_path, pipeline=pipeline, cache_inversions=True, **kwargs | changes).inversion_cache.folder
            for pipeline, changes in (
                (tiny_sd3_pipeline(), {}),
                (other, {}),
                (tiny_sd3_pipeline(), {"num_inference_steps": 5}),
                (tiny_sd3_pipeline(), {"bf16": True}),
                (tiny_sd3_pipeline(), {"max_sequence_length": 5}),
            )
        ]
        assert folders[0] == cached.inversion_cache.folder and len(set(folders)) == 5


class TestEvaluation:
    @pytest.mark.slow
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_is_repeatable_and_does_not_disturb_training(self, tmp_path, variant):
        held_out = latent_pairs(5, seed=1)
        plain = make_trainer(tmp_path / "a", variant=variant)
        plain.train()
        watched = make_trainer(
            tmp_path / "b", variant=variant, eval_pairs=held_out, eval_strategy="steps", eval_steps=1
        )
        start = watched.evaluate()
        assert start["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
        watched.train()
        first, second = watched.evaluate(), watched.evaluate()
        levels = [name for name in first if name.startswith("eval_rewards/accuracies/sigma_")]
        assert len(levels) == 2
        for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies", "eval_error/chosen", *levels):
            assert first[name] == second[name]
        assert first["eval_rewards/accuracies"] == pytest.approx(sum(first[name] for name in levels) / 2)
        assert sum("eval_loss" in log for log in watched.state.log_history) >= 2
        for name, value in trainable(plain).items():
            assert torch.equal(value, trainable(watched)[name]), name

    def test_levels_are_the_nearest_of_the_training(self, tmp_path):
        trainer = make_trainer(tmp_path, eval_sigmas=[0.9, 0.5, 0.1])
        torch.testing.assert_close(
            trainer.sigmas[trainer.eval_steps], torch.tensor([0.9, 0.5, 0.1]), rtol=0, atol=2e-3
        )
        trainer = make_trainer(tmp_path, variant="dense_reward", eval_sigmas=[0.0, 0.001, 1.0])
        assert trainer.eval_steps == [0, 5]

    def test_several_and_new_datasets(self, tmp_path):
        splits = {"near": latent_pairs(4, seed=1), "far": latent_pairs(3, seed=2)}
        trainer = make_trainer(tmp_path, eval_pairs=splits)
        metrics = trainer.evaluate()
        assert "eval_near_loss" in metrics and "eval_far_loss" in metrics
        assert trainer.evaluate(latent_pairs(3, seed=4))["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


class TestSaving:
    def test_lora_loads_into_diffusers_exactly(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.train()
        check_lora_loads_into_diffusers_exactly(trainer, "thing 1", tmp_path / "base")
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 4

    def test_full_fine_tuning_is_saved_as_a_transformer(self, tmp_path):
        trainer = make_trainer(tmp_path, peft=False)
        trainer.train()
        check_full_fine_tuning_is_saved_as_a_transformer(trainer)

    @pytest.mark.parametrize(
        ("variant", "peft"), [*((variant, True) for variant in VARIANTS), ("diffusion_dpo", False)]
    )
    def test_resume_is_exact(self, tmp_path, variant, peft):
        check_resume_is_exact(make_trainer, tmp_path, variant=variant, peft=peft)

    @pytest.mark.parametrize(
        ("variant", "paper"),
        [("diffusion_dpo", "wallace2024"), ("inversion_dpo", "li2025"), ("dense_reward", "yang2024")],
    )
    def test_model_card(self, tmp_path, variant, paper):
        trainer = make_trainer(tmp_path, variant=variant)
        trainer.train()
        trainer.save_model()
        card = (tmp_path / "out" / "README.md").read_text()
        for text in ("**Diffusion-DPO**", paper, "load_lora_weights", f"| `variant` | {variant} |", "diffusion-dpo"):
            assert text in card, text
        assert "TAPO draws" not in card and str(tmp_path) not in card


class TestVideoDPO:
    def pairs(self, number=8, **columns):
        data = latent_pairs(number)
        for name, values in columns.items():
            data = data.add_column(name, values)
        return data

    def gradients(self, tmp_path, **kwargs):
        return TestGradient().gradients(tmp_path, beta=30.0, **kwargs)

    def test_loss_is_the_weighted_one_of_diffusion_dpo(self, tmp_path):
        """With the gradient of the weighted sum, one pair at a time."""
        chosen, rejected = [0.5, 0.9, 0.9, 0.7], [0.1, 0.1, 0.5, 0.1]
        pairs = self.pairs(4, chosen_score=chosen, rejected_score=rejected)
        trainer, gradients = self.gradients(tmp_path / "a", pairs=pairs, variant="video_dpo")
        weights = rare_pair_weights(torch.tensor(chosen), torch.tensor(rejected))
        assert torch.equal(trainer.pair_weights, weights) and weights.std() > 0.1
        total, loss = None, 0.0
        for row in range(4):
            inputs = trainer._prepare_inputs(trainer._collator([trainer.train_dataset[row]]))
            losses, _ = trainer._pair_losses(trainer.model, inputs, *trainer._draw([row]))
            parameters = [p for p in trainer.model.parameters() if p.requires_grad]
            own = torch.autograd.grad(losses.sum() * weights[row].float() / 4, parameters)
            total = own if total is None else [one + other for one, other in zip(total, own, strict=True)]
            loss += losses.item() * weights[row].item() / 4
        assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-4)
        for (name, gradient), value in zip(gradients.items(), total, strict=True):
            torch.testing.assert_close(
                gradient, value, rtol=2e-3, atol=2e-3 * value.abs().max().item() + 1e-7, msg=name
            )

    def test_without_alpha_it_is_diffusion_dpo(self, tmp_path):
        pairs = self.pairs(4, chosen_score=[0.5, 0.9, 0.9, 0.7], rejected_score=[0.1, 0.1, 0.5, 0.1])
        _, plain = self.gradients(tmp_path / "a", pairs=pairs)
        _, same = self.gradients(tmp_path / "b", pairs=pairs, variant="video_dpo", pair_weight_alpha=0.0)
        _, other = self.gradients(tmp_path / "c", pairs=pairs, variant="video_dpo")
        assert all(torch.equal(value, same[name]) for name, value in plain.items())
        assert any((value - other[name]).abs().max() > 0.05 * value.abs().max() for name, value in plain.items())

    def test_given_weights_belong_to_rows(self, tmp_path):
        weights = [0.0, 2.0, 0.5, 0.0, 1.0, 3.0, 0.25, 0.75]
        options = {"variant": "video_dpo", "max_steps": 1, "per_device_train_batch_size": 4}
        trainer = make_trainer(tmp_path, self.pairs(weight=weights), **options)
        rows, draw = [], trainer._draw
        trainer._draw = lambda batch, shape=None: rows.extend(batch) or draw(batch, shape)
        loss = trainer.train().training_loss
        assert loss == pytest.approx(math.log(2) * sum(weights[row] for row in rows) / 4, rel=1e-6)

    def test_evaluation_has_no_weights(self, tmp_path):
        pairs = self.pairs(weight=[5.0] * 8)
        trainer = make_trainer(tmp_path, pairs, variant="video_dpo", eval_pairs=latent_pairs(4, seed=1))
        assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)

    @pytest.mark.slow
    def test_resume_is_exact(self, tmp_path):
        pairs = self.pairs(weight=[0.0, 2.0, 0.5, 0.0, 1.0, 3.0, 0.25, 0.75])
        check_resume_is_exact(make_trainer, tmp_path, pairs=pairs, variant="video_dpo")

    def test_card(self, tmp_path):
        trainer = make_trainer(tmp_path, self.pairs(weight=[1.0] * 8), variant="video_dpo")
        trainer.create_model_card()
        card = (tmp_path / "out" / "README.md").read_text()
        assert "**VideoDPO**" in card and "liu2025videodpo" in card and "video-dpo" in card

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({}, "needs the columns `chosen_score` and `rejected_score`, or `weight`"),
            ({"chosen_score": [1.0] * 8}, "needs the columns"),
            ({"weight": [-1.0] + [1.0] * 7}, "weights at least 0"),
            ({"chosen_score": [float("nan")] * 8, "rejected_score": [1.0] * 8}, "finite numbers"),
        ],
    )
    def test_bad_columns(self, tmp_path, columns, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, self.pairs(**columns), variant="video_dpo")

    def test_options_without_effect(self, tmp_path):
        with pytest.raises(ValueError, match="`pair_weight_alpha=0.5` has no effect with the column `weight`"):
            make_trainer(tmp_path, self.pairs(weight=[1.0] * 8), variant="video_dpo", pair_weight_alpha=0.5)
        for name in ("pair_weight_alpha", "score_bin_width"):
            with pytest.raises(ValueError, match=f"`{name}=0.5` has no effect with `variant='diffusion_dpo'`"):
                make_args(tmp_path, **{name: 0.5})
        make_args(tmp_path, variant="video_dpo", timestep_sampling="uniform")


class TestCallbacks:
    def test_samples_and_average(self, tmp_path):
        ema = EMACallback(decay=0.9)
        grid = SampleGridCallback(["newt", "bee"], every_n_steps=2, ema=ema)
        trainer = make_trainer(tmp_path, callbacks=[ema, grid])
        trainer.train()
        folder = Path(trainer.args.output_dir)
        assert sorted(path.name for path in folder.glob("samples/*.png")) == ["step_000000.png", "step_000002.png"]
        assert (folder / "ema" / "pytorch_lora_weights.safetensors").is_file()

    def test_generate_equals_the_pipeline(self, tmp_path):
        trainer = make_trainer(tmp_path)
        images = trainer.generate(["thing 1", "thing 2"], seed=7)
        expected = tiny_sd3_pipeline()(
            ["thing 1", "thing 2"],
            height=32,
            width=32,
            num_inference_steps=6,
            guidance_scale=2.0,
            generator=[torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)],
            max_sequence_length=3,
            output_type="pt",
        ).images
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)

    def test_the_guard_has_no_training_reward_here(self, tmp_path):
        guard = RewardHackingGuardCallback(lambda images, prompts: images.mean((1, 2, 3)), ["newt"], every_n_steps=1)
        with pytest.raises(ValueError, match="training reward"):
            make_trainer(tmp_path, callbacks=[guard])


class TestVideos:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_trains_from_files_and_saves_lora_weights(self, tmp_path, variant):
        pairs = color_videos(tmp_path, 4)
        trainer = make_trainer(
            tmp_path,
            pairs,
            pipeline=tiny_wan_pipeline(),
            eval_pairs=pairs,
            variant=variant,
            height=32,
            width=48,
            num_frames=5,
            max_sequence_length=16,
        )
        trainer.train()
        logs = trainer.state.log_history
        assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert logs[1]["rewards/margins"] != 0
        assert trainer.generate([pairs["prompt"][0]]).shape == (1, 3, 5, 32, 48)
        assert math.isfinite(trainer.evaluate()["eval_loss"])
        trainer.save_model()
        pipeline = tiny_wan_pipeline()
        pipeline.load_lora_weights(trainer.args.output_dir)
        assert any((p != 0).any() for name, p in pipeline.transformer.named_parameters() if ".lora_B" in name)

    def test_levels_have_the_pipelines_shift(self, tmp_path):
        pairs = latent_pairs(4, (4, 2, 4, 4))
        trainer = make_trainer(tmp_path, pairs, pipeline=tiny_wan_pipeline(), num_frames=5, max_sequence_length=16)
        assert torch.equal(trainer.sigmas, FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas)


class TestConfig:
    def test_it_has_trainers_fields_and_no_reward(self, tmp_path):
        args = make_args(tmp_path)
        assert isinstance(args, TrainingArguments)
        assert args.variant == "diffusion_dpo" and args.timestep_sampling == "logit_normal"

    def test_every_field_has_help_and_is_documented(self):
        for name in DiffusionDPOConfig.__annotations__:
            assert DiffusionDPOConfig.__dataclass_fields__[name].metadata["help"], name
            if name != "gradient_checkpointing":
                assert f"{name}`" in DiffusionDPOConfig.__doc__ or f"{name} (" in DiffusionDPOConfig.__doc__, name

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("variant", "dpo"),
            ("timestep_sampling", "beta"),
            ("beta", 0.0),
            ("label_smoothing", 0.5),
            ("gamma", 0.0),
            ("gamma", 1.1),
            ("num_inference_steps", 0),
            ("cache_inversions", True),
            ("pair_weight_alpha", -1.0),
            ("score_bin_width", 0.0),
            ("eval_sigmas", []),
            ("eval_sigmas", [1.5]),
            ("resolution", 0),
            ("fps", 0),
            ("dimension_weights", {}),
            ("max_skipped_updates", -1),
        ],
    )
    def test_bad_values_name_their_field(self, tmp_path, field, value):
        with pytest.raises(ValueError, match=f"^`{field}`"):
            make_args(tmp_path, **{field: value})


class TestBadInput:
    def test_datasets(self, tmp_path):
        args = make_args(tmp_path)
        with pytest.raises(ValueError, match="`train_dataset` is missing"):
            DiffusionDPOTrainer(tiny_sd3_pipeline(), args)
        with pytest.raises(ValueError, match=r"lacks the columns \['rejected'\]"):
            make_trainer(tmp_path, latent_pairs(2).remove_columns("rejected"))
        with pytest.raises(ValueError, match=r"`eval_dataset\['a'\]` lacks the columns"):
            make_trainer(tmp_path, eval_pairs={"a": Dataset.from_dict({"prompt": ["a"]})})
        with pytest.raises(ValueError, match="neither a latent of shape"):
            make_trainer(tmp_path, latent_pairs(2, (4, 4, 4)))

    def test_sizes_and_precision(self, tmp_path):
        with pytest.raises(ValueError, match="multiple of 8"):
            make_trainer(tmp_path, resolution=36)
        with pytest.raises(ValueError, match="`num_frames=5` was given, but .* makes images"):
            make_trainer(tmp_path, num_frames=5)

    def test_output_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="cannot be created"):
            make_trainer(tmp_path, output_dir=str(tmp_path / "file" / "out"))
