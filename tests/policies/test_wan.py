# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
)
from peft import LoraConfig, get_peft_model

from tapo_trl import SLRMModel
from tapo_trl.policies import WanPolicy, load_policy
from tests.policies.ti2v import TI2VPolicy
from tests.testing_utils import tiny_wan_pipeline as make_pipeline


PROMPTS = ["A red fox, running!", "cat"]
SIZE = {"height": 32, "width": 48, "num_frames": 5}
LENGTH = 12


def generators(count=2):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def run_pipeline(pipeline, num_inference_steps=5, guidance_scale=1.0, output_type="latent"):
    return pipeline(
        PROMPTS,
        **SIZE,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=generators(),
        max_sequence_length=LENGTH,
        output_type=output_type,
    ).frames


def unipc(flow_shift=3.0):
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)


class TestWan22TI2V:
    @pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
    def test_one_timestep_per_video_equals_one_per_token(self, guidance_scale):
        size = {"height": 32, "width": 64, "num_frames": 5}
        policy = load_policy(TI2VPolicy.tiny())
        shape = policy.latent_shape(**size)
        assert shape == (8, 2, 2, 4)
        policy.pipeline.scheduler = policy.build_scheduler(4, shape)
        seen = []
        hook = policy.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["timestep"].ndim), with_kwargs=True
        )
        options = {"num_inference_steps": 4, "guidance_scale": guidance_scale}
        expected, pictures = (
            policy.pipeline(
                PROMPTS,
                generator=generators(),
                max_sequence_length=LENGTH,
                output_type=kind,
                **size,
                **options,
            ).frames
            for kind in ("latent", "pt")
        )
        assert set(seen) == {2}
        hook.remove()
        prompts, negative = policy.encode_prompts(PROMPTS, LENGTH), policy.encode_prompts([""], LENGTH)
        latents = policy.sample(
            policy.transformer, prompts, negative, latent_shape=shape, generators=generators(), **options
        )
        torch.testing.assert_close(latents, expected, rtol=0, atol=5e-6)
        torch.testing.assert_close(policy.decode(latents), pictures.transpose(1, 2), rtol=0, atol=5e-6)
        assert policy.encode(policy.decode(latents)).shape == latents.shape

    def test_score_tokens(self):
        policy = load_policy(TI2VPolicy.tiny())
        slrm = SLRMModel.from_policy(policy, num_task_tokens=3)
        latents, sigma, prompts = (
            torch.randn(2, 8, 2, 2, 4),
            torch.tensor([0.3, 0.8]),
            policy.encode_prompts(PROMPTS, LENGTH),
        )
        with torch.no_grad():
            masked = slrm(latents, sigma, **prompts.tensors, mask_task_tokens=True).velocity
            expected = policy.velocity(policy.transformer, latents, sigma, prompts)
        torch.testing.assert_close(masked, expected, rtol=0, atol=1e-6)
        with pytest.raises(ValueError, match="in_channels"):
            slrm.check_compatible(WanPolicy(make_pipeline()))


class TestPromptEncoding:
    def test_equals_the_pipeline(self, tiny_wan_pipeline, tiny_wan_policy):
        prompts = ["  A  red fox&amp;cat", "cat", "a very long text that is truncated"]
        with torch.no_grad():
            expected, negative = tiny_wan_pipeline.encode_prompt(prompts, max_sequence_length=LENGTH)
        embeds = tiny_wan_policy.encode_prompts(prompts, LENGTH)
        assert torch.equal(embeds.prompt_embeds, expected)
        assert torch.equal(tiny_wan_policy.encode_prompts([""] * 3, LENGTH).prompt_embeds, negative)
        assert embeds.pooled_prompt_embeds is None
        assert embeds.prompt_embeds.shape == (3, LENGTH, 16)
        assert (embeds.prompt_embeds[1, 5:] == 0).all() and (embeds.prompt_embeds[1, :5] != 0).any()

    def test_length_is_the_models_own_by_default(self, tiny_wan_policy):
        assert tiny_wan_policy.encode_prompts(["cat"]).prompt_embeds.shape == (1, 512, 16)

    def test_after_unloading_there_is_a_clear_error(self, tiny_wan_policy):
        tiny_wan_policy.unload_text_encoders()
        with pytest.raises(ValueError, match="no text encoder"):
            tiny_wan_policy.encode_prompts(PROMPTS)


class TestScheduler:
    """Euler steps on the grid of `flow_shift`: UniPC is multistep and has another grid, and `from_config` drops it."""

    @pytest.mark.parametrize("flow_shift", [3.0, 5.0])
    def test_grid_is_the_pipelines_with_an_euler_scheduler(self, flow_shift):
        pipeline = make_pipeline()
        pipeline.scheduler = unipc(flow_shift)
        policy = WanPolicy(pipeline)
        scheduler = policy.build_scheduler(6, policy.latent_shape(**SIZE), noise_level=0.1)
        assert scheduler.config.shift == flow_shift and scheduler.config.noise_level == 0.1

        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=flow_shift)
        run_pipeline(pipeline, num_inference_steps=6)
        assert torch.equal(scheduler.sigmas, pipeline.scheduler.sigmas)
        assert torch.equal(scheduler.timesteps, pipeline.scheduler.timesteps)
        assert torch.equal(policy.build_scheduler(6, policy.latent_shape(**SIZE)).sigmas, scheduler.sigmas)

    def test_unipc_and_from_config_would_give_other_grids(self, tiny_wan_policy):
        ours = tiny_wan_policy.build_scheduler(40, tiny_wan_policy.latent_shape(**SIZE))
        solver = unipc()
        solver.set_timesteps(40)
        assert solver.timesteps.dtype == torch.int64 and ours.timesteps.dtype == torch.float32
        assert (solver.sigmas - ours.sigmas).abs().max() > 0.05
        assert FlowMatchEulerDiscreteScheduler.from_config(solver.config).config.shift == 1.0

    def test_a_scheduler_that_is_not_of_flow_matching_is_refused(self, tiny_wan_pipeline):
        for scheduler in (DDPMScheduler(), UniPCMultistepScheduler()):
            tiny_wan_pipeline.scheduler = scheduler
            with pytest.raises(ValueError, match="not one of flow matching"):
                WanPolicy(tiny_wan_pipeline)


class TestSampling:
    def sample(self, policy, guidance_scale):
        return policy.sample(
            policy.transformer,
            policy.encode_prompts(PROMPTS, LENGTH),
            policy.encode_prompts([""] * 2, LENGTH),
            latent_shape=policy.latent_shape(**SIZE),
            num_inference_steps=5,
            guidance_scale=guidance_scale,
            generators=generators(),
        )

    def test_equals_the_pipeline_bit_for_bit(self, tiny_wan_pipeline, tiny_wan_policy):
        latents = self.sample(tiny_wan_policy, 1.0)
        tiny_wan_pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        assert torch.equal(latents, run_pipeline(tiny_wan_pipeline))
        assert latents.std() > 0.1

    def test_equals_the_pipeline_with_guidance_but_for_rounding(self, tiny_wan_pipeline, tiny_wan_policy, monkeypatch):
        latents = self.sample(tiny_wan_policy, 5.0)
        tiny_wan_pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        expected = run_pipeline(tiny_wan_pipeline, guidance_scale=5.0)
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)

        # The pipeline makes two forwards, we make one of both halves: run apart, they are the pipeline's bits.
        def forward(self, model, *args):
            halves = [[part.chunk(2)[i] for part in args[:2]] + [args[2][2 * i : 2 * i + 2]] for i in range(2)]
            return torch.cat([original(self, model, *half) for half in halves])

        original = WanPolicy.forward
        monkeypatch.setattr(WanPolicy, "forward", forward)
        assert torch.equal(self.sample(tiny_wan_policy, 5.0), expected)

    def test_half_precision_keeps_what_the_model_keeps_in_float32(self, tiny_wan_pipeline, tmp_path):
        tiny_wan_pipeline.save_pretrained(tmp_path)
        policy = load_policy(str(tmp_path), torch_dtype=torch.bfloat16)
        dtypes = {name: parameter.dtype for name, parameter in policy.transformer.named_parameters()}
        assert policy.transformer.dtype == torch.bfloat16 and dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
        assert dtypes["blocks.0.scale_shift_table"] == dtypes["blocks.1.norm2.weight"] == torch.float32
        assert dtypes["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
        assert policy.vae.dtype == torch.float32 and policy.pipeline.text_encoder.dtype == torch.bfloat16

        # The pipeline's Euler scheduler rounds latents to bfloat16 after every step; ours stay in float32.
        policy.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        latents, expected = self.sample(policy, 1.0), run_pipeline(policy.pipeline)
        assert latents.dtype == torch.float32 and expected.dtype == torch.bfloat16
        torch.testing.assert_close(latents, expected.float(), rtol=0, atol=0.1)

    def test_timesteps_reach_the_model_in_float32(self, tiny_wan_policy):
        seen = []
        hook = tiny_wan_policy.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
        )
        tiny_wan_policy.transformer.to(torch.bfloat16)
        embeds = tiny_wan_policy.encode_prompts(["cat"], LENGTH)
        velocity = tiny_wan_policy.velocity(tiny_wan_policy.transformer, torch.zeros(1, 4, 2, 4, 4), 0.8333, embeds)
        hook.remove()
        assert seen[0].dtype == torch.float32 and seen[0].item() == pytest.approx(833.3)
        assert velocity.dtype == torch.float32


class TestVideos:
    def test_decode_equals_the_pipeline(self, tiny_wan_pipeline, tiny_wan_policy):
        tiny_wan_pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        frames = run_pipeline(tiny_wan_pipeline, num_inference_steps=2, output_type="pt")
        videos = tiny_wan_policy.decode(run_pipeline(tiny_wan_pipeline, num_inference_steps=2))
        assert videos.shape == (2, 3, 5, 32, 48) and videos.dtype == torch.float32
        assert 0 <= videos.min() and videos.max() <= 1
        torch.testing.assert_close(videos, frames.transpose(1, 2))

    def test_encode_inverts_the_normalisation(self, tiny_wan_policy):
        vae, videos = tiny_wan_policy.vae, torch.rand(2, 3, 5, 32, 48)
        latents = tiny_wan_policy.encode(videos)
        assert latents.shape == (2, *tiny_wan_policy.latent_shape(**SIZE)) and latents.dtype == torch.float32
        raw = vae.encode(videos * 2 - 1).latent_dist.mode()
        mean, std = (torch.tensor(values) for values in (vae.config.latents_mean, vae.config.latents_std))
        torch.testing.assert_close(latents.movedim(1, -1), (raw.movedim(1, -1) - mean) / std)
        decoded = vae.decode(raw, return_dict=False)[0] / 2 + 0.5
        torch.testing.assert_close(tiny_wan_policy.decode(latents), decoded.clamp(0, 1))

    def test_the_vae_stays_in_float32_inside_of_autocast(self, tiny_wan_policy):
        videos = torch.rand(1, 3, 5, 32, 48)
        latents = tiny_wan_policy.encode(videos)
        decoded = tiny_wan_policy.decode(latents)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(tiny_wan_policy.encode(videos), latents)
            assert torch.equal(tiny_wan_policy.decode(latents), decoded)

    def test_encode_refuses_frames_that_the_vae_would_drop(self, tiny_wan_policy):
        with pytest.raises(ValueError, match="nearest that fit are 32, 48 and 5"):
            tiny_wan_policy.encode(torch.rand(1, 3, 6, 32, 48))


class TestShapesAndLoading:
    @pytest.mark.parametrize(
        ("height", "width", "num_frames", "shape"),
        [(480, 832, 81, (4, 21, 60, 104)), (480, 832, 49, (4, 13, 60, 104)), (32, 48, 1, (4, 1, 4, 6))],
    )
    def test_latent_shape(self, tiny_wan_policy, height, width, num_frames, shape):
        assert tiny_wan_policy.modality == "video"
        assert tiny_wan_policy.latent_shape(height, width, num_frames) == shape

    @pytest.mark.parametrize(
        ("size", "nearest"),
        [
            ((480, 832, 80), "480, 832 and 81"),
            ((480, 832, 82), "480, 832 and 81"),
            ((490, 850, 81), "496, 848 and 81"),
            ((471, 832, 81), "464, 832 and 81"),
            ((0, 32, 0), "16, 32 and 1"),
        ],
    )
    def test_rejects_sizes_that_do_not_fit(self, tiny_wan_policy, size, nearest):
        with pytest.raises(ValueError, match=f"multiples of 16 and 16 pixels.* {nearest}"):
            tiny_wan_policy.latent_shape(*size)

    def test_needs_frames(self, tiny_wan_policy):
        with pytest.raises(ValueError, match="`num_frames` is missing"):
            tiny_wan_policy.latent_shape(480, 832)

    def test_load_policy_from_a_folder(self, tiny_wan_pipeline, tmp_path):
        tiny_wan_pipeline.save_pretrained(tmp_path)
        policy = load_policy(str(tmp_path))
        assert isinstance(policy, WanPolicy) and policy.name_or_path == str(tmp_path)
        assert policy.vae_fingerprint() == WanPolicy(tiny_wan_pipeline).vae_fingerprint()
        embeds = policy.encode_prompts(PROMPTS, LENGTH).prompt_embeds
        assert torch.equal(embeds, WanPolicy(tiny_wan_pipeline).encode_prompts(PROMPTS, LENGTH).prompt_embeds)

    def test_image_to_video_is_refused(self):
        with pytest.raises(ValueError, match="Only Wan2.1 and Wan2.2.*image condition"):
            load_policy(make_pipeline(in_channels=8))

    def test_half_of_two_experts_is_refused(self, tiny_wan_pipeline):
        tiny_wan_pipeline.register_modules(transformer_2=tiny_wan_pipeline.transformer)
        with pytest.raises(ValueError, match="has some of them only"):
            load_policy(tiny_wan_pipeline)
        tiny_wan_pipeline.register_to_config(boundary_ratio=0.9)
        tiny_wan_pipeline.register_modules(transformer=None)
        with pytest.raises(ValueError, match="has some of them only"):
            load_policy(tiny_wan_pipeline)

    def test_other_wan_pipelines_are_refused(self, tiny_wan_pipeline):
        components = dict(tiny_wan_pipeline.components)
        pipeline = WanImageToVideoPipeline(**components, image_encoder=None, image_processor=None)
        with pytest.raises(ValueError, match="`WanImageToVideoPipeline`, which no policy supports"):
            load_policy(pipeline)


class TestLoRA:
    @pytest.mark.parametrize("lora_alpha", [4, 16])
    def test_diffusers_loads_it_exactly(self, tiny_wan_pipeline, tiny_wan_policy, tmp_path, lora_alpha):
        tiny_wan_pipeline.save_pretrained(tmp_path / "base")
        config = LoraConfig(r=4, lora_alpha=lora_alpha, target_modules=tiny_wan_policy.lora_target_modules)
        model = get_peft_model(tiny_wan_policy.transformer, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        tiny_wan_policy.save_lora_weights(tmp_path / "lora", model)

        loaded = WanPipeline.from_pretrained(tmp_path / "base")
        inputs = (torch.randn(2, 4, 2, 4, 4), 0.7, tiny_wan_policy.encode_prompts(PROMPTS, LENGTH))
        base_velocity = WanPolicy(loaded).velocity(loaded.transformer, *inputs)
        loaded.load_lora_weights(str(tmp_path / "lora"))
        expected = tiny_wan_policy.velocity(model, *inputs)
        assert torch.equal(WanPolicy(loaded).velocity(loaded.transformer, *inputs), expected)
        assert not torch.allclose(base_velocity, expected, atol=1e-3)

    def test_targets_cover_self_and_cross_attention(self, tiny_wan_policy):
        model = get_peft_model(
            tiny_wan_policy.transformer, LoraConfig(r=2, target_modules=tiny_wan_policy.lora_target_modules)
        )
        adapted = {name for name, module in model.named_modules() if "lora_A" in dict(module.named_children())}
        assert len(adapted) == 3 * 2 * 4
        assert any(".attn2.to_out.0" in name for name in adapted)
