# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""TAPO on a video policy: the same trainer, with one more dimension."""

import math

import pytest
import torch
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from huggingface_hub import ModelCard
from PIL import Image

from tapo_trl import SampleGridCallback, SLRMModel, TAPOTrainer
from tapo_trl.policies import SD3Policy, WanPolicy
from tests.testing_utils import tiny_sd3_pipeline, tiny_wan_pipeline
from tests.trainer.policy_checks import check_resume_is_exact
from tests.trainer.test_tapo_trainer import GradientRecorder, make_args, make_lora, randomize_adapter


PROMPTS = ["cat", "dog"]
VIDEO = {
    "height": 32,
    "width": 48,
    "num_frames": 5,
    "max_sequence_length": 6,
    "num_inference_steps": 4,
    "num_sde_steps": 2,
}


def motion(videos, prompts):
    return (videos[:, :, 1:] - videos[:, :, :-1]).abs().mean((1, 2, 3, 4))


def make_slrm(**kwargs):
    return SLRMModel.from_policy(WanPolicy(tiny_wan_pipeline()), max_sequence_length=6, **kwargs)


def make_trainer(tmp_path, reward=None, peft=True, callbacks=None, pipeline=None, **kwargs):
    torch.manual_seed(0)
    return TAPOTrainer(
        tiny_wan_pipeline() if pipeline is None else pipeline,
        make_slrm() if reward is None else reward,
        make_args(tmp_path, **VIDEO | kwargs),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        callbacks=callbacks,
        peft_config=make_lora() if peft else None,
    )


class TestTraining:
    @pytest.mark.parametrize("peft", [True, False])
    def test_loss_is_ln_2_at_the_start_and_only_what_is_trained_changes(self, tmp_path, peft):
        trainer = make_trainer(tmp_path, peft=peft)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        logs = trainer.state.log_history[0]
        assert [logs[f"step_{index:02d}/loss"] for index in (1, 3)] == pytest.approx([math.log(2)] * 2, abs=1e-6)
        assert trainer.state.log_history[1]["kl"] > 0
        changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
        assert changed
        assert not peft or all("lora_" in name for name in changed)

    def test_loss_is_ln_2_with_weights_in_bfloat16(self, tmp_path):
        tiny_wan_pipeline().save_pretrained(tmp_path / "base")
        trainer = make_trainer(tmp_path, pipeline=str(tmp_path / "base"), bf16=True, max_steps=1)
        assert trainer.policy.transformer.blocks[0].attn1.to_q.base_layer.weight.dtype == torch.bfloat16
        assert trainer.policy.vae.dtype == torch.float32
        assert trainer.train().training_loss == pytest.approx(math.log(2), abs=1e-6)

    def test_a_function_of_videos_is_a_reward(self, tmp_path):
        trainer = make_trainer(tmp_path, reward=[make_slrm(), motion], score_batch_size=3, max_steps=1)
        trainer.train()
        assert trainer.state.log_history[0]["rewards/motion/mean"] > 0

    def gradients(self, tmp_path, **kwargs):
        recorder = GradientRecorder()
        trainer = make_trainer(
            tmp_path, callbacks=[recorder], max_steps=1, self_check=False, max_grad_norm=0, **kwargs
        )
        randomize_adapter(trainer)
        trainer.train()
        return trainer, recorder.gradients

    @pytest.mark.slow
    def test_offloaded_transitions_and_smaller_batches_give_the_same_gradient(self, tmp_path):
        _, expected = self.gradients(tmp_path / "a", offload_transitions=False)
        trainer, offloaded = self.gradients(tmp_path / "b", offload_transitions=True)
        _, chunked = self.gradients(tmp_path / "c", transition_batch_size=1, score_batch_size=1)
        assert trainer.sampler.store_on == "cpu"
        assert any(value.abs().max() > 0 for value in expected.values())
        for name, value in expected.items():
            assert torch.equal(offloaded[name], value), name
            torch.testing.assert_close(chunked[name], value, rtol=1e-3, atol=1e-3 * value.abs().max().item())

    @pytest.mark.parametrize(("offload", "expected"), [(None, "cpu"), (True, "cpu"), (False, None)])
    def test_transitions_of_videos_are_offloaded_by_default(self, tmp_path, offload, expected):
        assert make_trainer(tmp_path, offload_transitions=offload).sampler.store_on == expected

    def test_generate_equals_the_pipeline_with_euler_steps(self, tmp_path):
        trainer = make_trainer(tmp_path, vae_tiling=True, vae_slicing=True)
        assert trainer.policy.vae.use_tiling and trainer.policy.vae.use_slicing
        videos = trainer.generate(PROMPTS, seed=7)
        assert videos.shape == (2, 3, 5, 32, 48)
        pipeline = tiny_wan_pipeline()
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        frames = pipeline(
            PROMPTS,
            negative_prompt="",
            height=32,
            width=48,
            num_frames=5,
            num_inference_steps=4,
            guidance_scale=2.0,
            generator=[torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)],
            max_sequence_length=6,
            output_type="pt",
        ).frames
        torch.testing.assert_close(videos, torch.as_tensor(frames).transpose(1, 2), rtol=1e-4, atol=1e-4)


class TestSaving:
    @pytest.mark.slow
    def test_lora_loads_into_diffusers_exactly(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.train()
        trainer.save_model()
        loaded = tiny_wan_pipeline()
        loaded.load_lora_weights(trainer.args.output_dir)
        assert isinstance(loaded, WanPipeline)
        inputs = (torch.randn(1, *trainer.latent_shape), 0.6, trainer.prompt_cache.load(["cat"]))
        expected = trainer.policy.velocity(trainer.model.eval(), *inputs)
        base = WanPolicy(tiny_wan_pipeline())
        assert torch.equal(WanPolicy(loaded).velocity(loaded.transformer, *inputs), expected)
        assert not torch.equal(base.velocity(base.transformer, *inputs), expected)

        card = (tmp_path / "out" / "README.md").read_text()
        assert "WanPipeline.from_pretrained" in card and "text-to-video" in card and "| `num_frames` | 5 |" in card

    @pytest.mark.slow
    @pytest.mark.parametrize("peft", [True, False])
    def test_resume_is_exact(self, tmp_path, peft):
        check_resume_is_exact(make_trainer, tmp_path, peft=peft)

    @pytest.mark.slow
    def test_samples_are_videos_and_strips_and_are_in_the_card(self, tmp_path):
        pytest.importorskip("av")
        callback = SampleGridCallback(["owl"], every_n_steps=1)
        trainer = make_trainer(tmp_path, reward=motion, callbacks=[callback], max_steps=1)
        trainer.train()
        trainer.save_model()
        folder = tmp_path / "out" / "samples"
        assert sorted(path.name for path in folder.iterdir()) == [
            "prompts.txt",
            "step_000000.mp4",
            "step_000000.png",
            "step_000001.mp4",
            "step_000001.png",
        ]
        assert Image.open(folder / "step_000001.png").size == (5 * 192, 128)
        gallery = ModelCard.load(tmp_path / "out" / "README.md").data.widget
        assert "samples/step_000001.png" in [widget.get("output", {}).get("url") for widget in gallery]


class TestBadInput:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"num_frames": None}, "`num_frames` is missing"),
            ({"num_frames": 6}, "nearest that fit are 32, 48 and 5"),
            ({"height": 40}, "must be multiples"),
        ],
    )
    def test_sizes(self, tmp_path, kwargs, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, reward=motion, **kwargs)

    @pytest.mark.parametrize("name", ["fps", "height", "num_frames", "max_sequence_length"])
    def test_configuration(self, tmp_path, name):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1"):
            make_trainer(tmp_path, **{name: 0})

    def test_slrm_of_another_family(self, tmp_path):
        slrm = SLRMModel.from_policy(SD3Policy(tiny_sd3_pipeline()), max_sequence_length=6)
        with pytest.raises(ValueError, match="transformer class"):
            make_trainer(tmp_path, reward=slrm)
