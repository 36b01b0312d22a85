# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from tapo_trl import DiffusionSFTConfig, DiffusionSFTTrainer, RewardHackingGuardCallback
from tapo_trl.policies import SD3Policy
from tapo_trl.schedulers.noise_levels import training_sigmas
from tests.testing_utils import tiny_sd3_pipeline as make_pipeline
from tests.testing_utils import tiny_wan_pipeline
from tests.trainer.policy_checks import (
    check_full_fine_tuning_is_saved_as_a_transformer,
    check_lora_loads_into_diffusers_exactly,
    check_resume_is_exact,
    trainable,
)
from tests.trainer.test_tapo_trainer import PROMPTS, GradientRecorder, make_lora, randomize_adapter


def images(number=6, size=(32, 32), seed=0, red=150):
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(number):
        pixels = rng.integers(0, 80, (size[0], size[1], 3), dtype=np.uint8)
        pixels[..., 0] += red
        pictures.append(Image.fromarray(pixels))
    prompts = [PROMPTS[row % len(PROMPTS)] for row in range(number)]
    return Dataset.from_dict({"prompt": prompts, "image": pictures})


def make_args(tmp_path, **kwargs):
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
        "resolution": 32,
        "max_sequence_length": 3,
        "num_inference_steps": 4,
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
    return DiffusionSFTConfig(**defaults | kwargs)


def make_trainer(tmp_path, peft=True, callbacks=None, data=None, eval_data=None, **kwargs):
    torch.manual_seed(0)
    return DiffusionSFTTrainer(
        make_pipeline(),
        make_args(tmp_path, **kwargs),
        train_dataset=images() if data is None else data,
        eval_dataset=eval_data,
        callbacks=callbacks,
        peft_config=make_lora() if peft else None,
    )


def batch_of(trainer, rows=(0, 1)):
    return trainer._prepare_inputs(trainer._collator([trainer.train_dataset[row] for row in rows]))


class TestLoss:
    @pytest.mark.parametrize("peft", [True, False])
    def test_equals_an_independent_float64_reference(self, tmp_path, peft):
        recorder = GradientRecorder()
        arguments = {"max_steps": 1, "max_grad_norm": 0.0, "activation_checkpointing": False}
        trainer = make_trainer(tmp_path, peft, callbacks=[recorder], **arguments)
        if peft:
            randomize_adapter(trainer)
        initial, drawn, draw = copy.deepcopy(trainer.model.state_dict()), [], trainer._draw

        def watch(rows, shape):
            drawn.append((rows, *draw(rows, shape)))
            return drawn[-1][1:]

        trainer._draw = watch
        trainer.train()
        trainer.model.load_state_dict(initial)
        model = copy.deepcopy(trainer.model).double()
        model.forward = type(model).forward.__get__(model)
        ((rows, steps, noise, dropped),) = drawn
        assert not dropped.any()
        policy, losses = SD3Policy(make_pipeline()), []
        for row, step, x1 in zip(rows, steps, noise.double(), strict=True):
            pixels = torch.from_numpy(np.array(images()[row]["image"])).permute(2, 0, 1)[None] / 255
            x0, t = policy.encode(pixels)[0].double(), trainer.sigmas[step].double()
            embeds = policy.encode_prompts([images()[row]["prompt"]], 3)
            velocity = model(
                hidden_states=((1 - t) * x0 + t * x1)[None],
                timestep=(t * 1000)[None],
                encoder_hidden_states=embeds.prompt_embeds.double(),
                pooled_projections=embeds.pooled_prompt_embeds.double(),
                return_dict=False,
            )[0][0]
            losses.append(((velocity - x1 + x0) ** 2).mean())
        loss = torch.stack(losses).mean()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for (name, gradient), value in zip(recorder.gradients.items(), gradients, strict=True):
            value = torch.zeros_like(gradient, dtype=torch.float64) if value is None else value
            scale = value.abs().max().item()
            torch.testing.assert_close(gradient.double(), value, rtol=2e-3, atol=2e-3 * scale + 1e-6, msg=name)

    @pytest.mark.parametrize("law", ["logit_normal", "uniform"])
    def test_levels_are_those_of_the_training_schedule(self, tmp_path, law):
        trainer = make_trainer(tmp_path, timestep_sampling=law)
        schedule = training_sigmas(trainer.policy.build_scheduler(4, trainer.latent_shape))
        steps, _, _ = trainer._draw(list(range(2000)), (1,))
        assert torch.equal(trainer.sigmas, schedule)
        middle = ((steps > 250) & (steps < 750)).float().mean().item()
        assert middle == pytest.approx(0.5 if law == "uniform" else 0.728, abs=0.04)  # P(|N(0, 1)| < ln 3) = 0.728

    def test_prompts_are_dropped_with_the_probability_and_replaced(self, tmp_path):
        trainer = make_trainer(tmp_path, prompt_dropout=0.25, negative_prompt="worst")
        _, _, dropped = trainer._draw(list(range(2000)), (1,))
        assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
        inputs, noise = batch_of(trainer), torch.zeros(2, *trainer.latent_shape)
        steps = torch.tensor([300, 600])
        trainer.model.train()
        trainer._draw = lambda rows, shape: (steps, noise, torch.tensor([False, True]))
        losses = trainer.compute_loss(trainer.model, inputs, return_outputs=True)[1]["losses"]
        embeds = trainer.prompt_cache.load([inputs["prompt"][0], "worst"])
        expected = trainer._sample_losses(
            trainer.model, {"prompt_embeds": embeds}, inputs["image_latents"], steps, noise
        )
        torch.testing.assert_close(losses, expected)
        full = trainer.prompt_cache.load(inputs["prompt"])
        other = trainer._sample_losses(trainer.model, {"prompt_embeds": full}, inputs["image_latents"], steps, noise)
        assert losses[0] == other[0] and losses[1] != other[1]


class TestTraining:
    @pytest.mark.parametrize("peft", [True, False])
    def test_only_what_is_trained_changes_and_there_is_no_reference(self, tmp_path, peft):
        trainer = make_trainer(tmp_path, peft=peft)
        assert trainer.ref_model is None
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
        assert changed and (not peft or all("lora_" in name for name in changed))

    @pytest.mark.slow
    def test_fits_its_samples(self, tmp_path):
        """The evaluation loss on fixed noise falls, also of rows that were not trained on."""
        trainer = make_trainer(
            tmp_path, peft=False, eval_data=images(seed=1), max_steps=40, learning_rate=3e-3, warmup_steps=5
        )
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
        assert after["eval_loss"] < 0.8 * before["eval_loss"]
        assert {f"eval_loss/sigma_{sigma}" for sigma in (0.1, 0.3, 0.5, 0.7, 0.9)} <= after.keys()

    @pytest.mark.parametrize("cache_latents", [True, False])
    def test_latents_are_those_of_the_pixels(self, tmp_path, cache_latents):
        trainer = make_trainer(tmp_path, cache_latents=cache_latents)
        inputs = batch_of(trainer, (0, 3))
        pixels = [torch.from_numpy(np.array(images()[row]["image"])).permute(2, 0, 1) / 255 for row in (0, 3)]
        torch.testing.assert_close(inputs["image_latents"], trainer.policy.encode(torch.stack(pixels)))
        assert any((tmp_path / "cache").rglob("latents/*.arrow")) == cache_latents
        trainer.train()

    def test_cached_and_encoded_batches_train_alike(self, tmp_path):
        weights = []
        for cache_latents in (True, False):
            trainer = make_trainer(tmp_path / str(cache_latents), cache_latents=cache_latents)
            trainer.train()
            weights.append(trainable(trainer))
        for name, value in weights[0].items():
            torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)

    def test_given_latents(self, tmp_path):
        latents = np.random.default_rng(0).normal(size=(4, 4, 8, 8)).astype(np.float32)
        data = Dataset.from_dict({"prompt": PROMPTS[:1] * 4, "image": latents.tolist()})
        trainer = make_trainer(tmp_path, data=data)
        torch.testing.assert_close(batch_of(trainer)["image_latents"], torch.from_numpy(latents[:2]))
        trainer.train()

    def test_aspect_ratio_buckets(self, tmp_path):
        wide, high = images(3, (32, 64)), images(3, (64, 32), seed=1)
        data = Dataset.from_dict({name: list(wide[name]) + list(high[name]) for name in ("prompt", "image")})
        trainer = make_trainer(tmp_path, data=data, aspect_ratio_buckets=True, max_steps=3)
        shapes = set()
        draw = trainer._draw
        trainer._draw = lambda rows, shape: shapes.add(tuple(shape)) or draw(rows, shape)
        trainer.train()
        assert len(shapes) == 2

    def test_videos(self, tmp_path):
        rng = np.random.default_rng(0)
        videos = rng.integers(0, 255, (2, 5, 32, 32, 3), dtype=np.uint8)
        data = Dataset.from_dict({"prompt": PROMPTS[:2], "video": videos.tolist()})
        args = make_args(tmp_path, max_steps=1, num_frames=5, max_sequence_length=4)
        trainer = DiffusionSFTTrainer(tiny_wan_pipeline(), args, train_dataset=data, peft_config=make_lora())
        before = trainable(trainer)
        trainer.train()
        assert any(not torch.equal(value, before[name]) for name, value in trainable(trainer).items())

    def test_evaluation_is_repeatable_and_ignores_padding(self, tmp_path):
        trainer = make_trainer(tmp_path, eval_data=images(5, seed=1), eval_sigmas=[0.5], per_device_eval_batch_size=2)
        first, second = trainer.evaluate(), trainer.evaluate()
        assert first["eval_loss"] == second["eval_loss"] == pytest.approx(first["eval_loss/sigma_0.5"], rel=1e-5)
        alone = make_trainer(
            tmp_path / "b", eval_data=images(5, seed=1), eval_sigmas=[0.5], per_device_eval_batch_size=5
        )
        assert alone.evaluate()["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-5)

    def test_neither_accumulation_nor_checkpointing_matter(self, tmp_path):
        gradients = []
        options = ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2})
        for index, own in enumerate((*options, {"activation_checkpointing": True})):
            recorder = GradientRecorder()
            arguments = {"max_steps": 1, "max_grad_norm": 0.0, "activation_checkpointing": False} | own
            make_trainer(tmp_path / str(index), callbacks=[recorder], **arguments).train()
            gradients.append(recorder.gradients)
        for other in gradients[1:]:
            for name, expected in gradients[0].items():
                torch.testing.assert_close(other[name], expected, rtol=1e-3, atol=1e-3 * expected.abs().max())


class TestSaving:
    def test_lora_loads_into_diffusers_exactly(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.train()
        check_lora_loads_into_diffusers_exactly(trainer, PROMPTS[0], tmp_path / "base")
        card = (tmp_path / "out" / "README.md").read_text()
        assert "diffusion-sft" in card and "lipman2023flow" in card and ", trained by **supervised" in card
        assert "with preferences" not in card and "preference data" not in card and str(tmp_path) not in card
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 4

    def test_full_fine_tuning_is_saved_as_a_transformer(self, tmp_path):
        trainer = make_trainer(tmp_path, peft=False)
        trainer.train()
        check_full_fine_tuning_is_saved_as_a_transformer(trainer)

    @pytest.mark.slow
    @pytest.mark.parametrize("options", [{}, {"peft": False}, {"prompt_dropout": 0.5, "bf16": True}])
    def test_resume_is_exact(self, tmp_path, options):
        check_resume_is_exact(make_trainer, tmp_path, **options)


class TestBadInput:
    @pytest.mark.parametrize(
        "kwargs",
        [{"timestep_sampling": "normal"}, {"prompt_dropout": 1.0}, {"eval_sigmas": [2.0]}, {"self_check": False}],
    )
    def test_configuration(self, tmp_path, kwargs):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            make_args(tmp_path, **kwargs)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({"prompt": ["a"], "picture": ["a.png"]}, "needs the columns `prompt` and `image` or `video`"),
            ({"prompt": ["a"], "video": ["a.mp4"]}, "needs the columns `prompt` and `image`, but"),
            ({"prompt": [None], "image": ["a.png"]}, "`prompt` must be a string"),
            ({"prompt": ["a"], "image": ["missing.png"]}, "Replace them, or leave their samples out"),
        ],
    )
    def test_datasets(self, tmp_path, data, message):
        with pytest.raises((ValueError, TypeError), match=message):
            make_trainer(tmp_path, data=Dataset.from_dict(data))

    def test_no_dataset(self, tmp_path):
        with pytest.raises(ValueError, match="give images or videos"):
            DiffusionSFTTrainer(make_pipeline(), make_args(tmp_path))

    def test_bad_files_are_left_out(self, tmp_path):
        for row, picture in enumerate(images(3)["image"]):
            picture.save(tmp_path / f"{row}.png")
        (tmp_path / "1.png").write_bytes(b"no picture")
        data = Dataset.from_dict({"prompt": PROMPTS[:3], "image": [str(tmp_path / f"{row}.png") for row in range(3)]})
        trainer = make_trainer(tmp_path, data=data, skip_bad_files=True)
        assert [int(row) for row in trainer.train_dataset["slrm_row"]] == [0, 2]

    def test_the_guard_has_no_reward(self, tmp_path):
        guard = RewardHackingGuardCallback(lambda images, prompts: images.mean((1, 2, 3)), ["a fox"], every_n_steps=1)
        with pytest.raises(ValueError, match="supervised fine-tuning does not have"):
            make_trainer(tmp_path, callbacks=[guard])
