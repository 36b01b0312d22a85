# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model

from tapo_trl.policies import PromptEmbeddings, SD3Policy, load_policy
from tests.testing_utils import tiny_sd3_pipeline as make_pipeline


PROMPTS = ["a red fox", "cat"]


def generators(count=2):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


class TestPromptEncoding:
    def test_equals_the_pipeline(self, tiny_sd3_pipeline, tiny_sd3_policy):
        expected, _, expected_pooled, _ = tiny_sd3_pipeline.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=3
        )
        embeds = tiny_sd3_policy.encode_prompts(PROMPTS, max_sequence_length=3)
        assert torch.equal(embeds.prompt_embeds, expected)
        assert torch.equal(embeds.pooled_prompt_embeds, expected_pooled)
        assert embeds.prompt_embeds.shape == (2, 8 + 3, 24)

    @pytest.mark.parametrize("absent, columns", [("text_encoder", slice(0, 8)), ("text_encoder_2", slice(8, 20))])
    def test_zeros_stand_in_for_an_absent_encoder(self, tiny_sd3_pipeline, tiny_sd3_policy, absent, columns):
        full = tiny_sd3_policy.encode_prompts(PROMPTS, 3)
        tiny_sd3_pipeline.register_modules(**{absent: None})
        embeds = tiny_sd3_policy.encode_prompts(PROMPTS, 3)
        for name in ("prompt_embeds", "pooled_prompt_embeds"):
            expected = getattr(full, name).clone()
            expected[..., columns] = 0
            assert torch.equal(getattr(embeds, name), expected)

    def test_after_unloading_there_is_a_clear_error(self, tiny_sd3_policy):
        tiny_sd3_policy.unload_text_encoders()
        assert tiny_sd3_policy.pipeline.text_encoder is None
        with pytest.raises(ValueError, match="no text encoders"):
            tiny_sd3_policy.encode_prompts(PROMPTS)


class TestSampling:
    @pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
    def test_equals_the_pipeline_bit_for_bit(self, tiny_sd3_pipeline, tiny_sd3_policy, guidance_scale):
        expected = tiny_sd3_pipeline(
            PROMPTS,
            height=32,
            width=32,
            num_inference_steps=5,
            guidance_scale=guidance_scale,
            generator=generators(),
            max_sequence_length=3,
            output_type="latent",
        ).images
        latents = tiny_sd3_policy.sample(
            tiny_sd3_policy.transformer,
            tiny_sd3_policy.encode_prompts(PROMPTS, 3),
            tiny_sd3_policy.encode_prompts([""] * 2, 3),
            latent_shape=tiny_sd3_policy.latent_shape(32, 32),
            num_inference_steps=5,
            guidance_scale=guidance_scale,
            generators=generators(),
        )
        assert torch.equal(latents, expected)
        assert latents.std() > 0.1

    @pytest.mark.parametrize("shift", [{"shift": 3.0}, {"use_dynamic_shifting": True}])
    def test_grid_is_the_pipelines(self, tiny_sd3_pipeline, tiny_sd3_policy, shift):
        tiny_sd3_pipeline.scheduler = type(tiny_sd3_pipeline.scheduler)(**shift)
        tiny_sd3_pipeline(PROMPTS, height=32, width=32, num_inference_steps=6, output_type="latent")
        scheduler = tiny_sd3_policy.build_scheduler(6, tiny_sd3_policy.latent_shape(32, 32), noise_level=0.1)
        assert torch.equal(scheduler.sigmas, tiny_sd3_pipeline.scheduler.sigmas)
        assert scheduler.config.noise_level == 0.1

    def test_decode_equals_the_pipeline(self, tiny_sd3_pipeline, tiny_sd3_policy):
        images = tiny_sd3_pipeline(
            PROMPTS, height=32, width=32, num_inference_steps=2, generator=generators(), output_type="pt"
        ).images
        latents = tiny_sd3_pipeline(
            PROMPTS, height=32, width=32, num_inference_steps=2, generator=generators(), output_type="latent"
        ).images
        torch.testing.assert_close(tiny_sd3_policy.decode(latents), images)

    def test_encode_inverts_the_normalisation(self, tiny_sd3_policy):
        vae, images = tiny_sd3_policy.vae, torch.rand(2, 3, 32, 32)
        latents = tiny_sd3_policy.encode(images)
        assert latents.shape == (2, *tiny_sd3_policy.latent_shape(32, 32)[:1], 8, 8)
        raw = vae.encode(images * 2 - 1).latent_dist.mode()
        torch.testing.assert_close(latents / vae.config.scaling_factor + vae.config.shift_factor, raw)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_weights_give_float32_velocities(self, dtype):
        policy = SD3Policy(make_pipeline().to(dtype))
        embeds = policy.encode_prompts(PROMPTS, 3)
        velocity = policy.velocity(
            policy.transformer, torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9]), embeds, embeds, 3.0
        )
        assert velocity.dtype == torch.float32 and velocity.isfinite().all()

    def test_timesteps_reach_the_model_in_float32(self, tiny_sd3_policy):
        seen = []
        model = tiny_sd3_policy.transformer.to(torch.bfloat16)
        model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True)
        embeds = PromptEmbeddings(torch.zeros(1, 2, 24), torch.zeros(1, 20))
        tiny_sd3_policy.velocity(model, torch.zeros(1, 4, 8, 8), 0.8333, embeds)
        assert seen[0].dtype == torch.float32 and seen[0].item() == pytest.approx(833.3)

    def test_guidance_needs_negative_prompts(self, tiny_sd3_policy):
        embeds = tiny_sd3_policy.encode_prompts(PROMPTS, 3)
        with pytest.raises(ValueError, match="negative_prompt_embeds"):
            tiny_sd3_policy.velocity(tiny_sd3_policy.transformer, torch.zeros(2, 4, 8, 8), 0.5, embeds, None, 4.0)


class TestShapesAndLoading:
    @pytest.mark.parametrize("size", [(30, 32), (0, 32), (128, 128)])
    def test_rejects_sizes_that_do_not_fit(self, tiny_sd3_policy, size):
        with pytest.raises(ValueError, match="multiple of 8|at most 64"):
            tiny_sd3_policy.latent_shape(*size)

    def test_rejects_frames(self, tiny_sd3_policy):
        with pytest.raises(ValueError, match="num_frames"):
            tiny_sd3_policy.latent_shape(32, 32, num_frames=5)

    def test_load_policy_from_a_folder(self, tiny_sd3_pipeline, tmp_path):
        tiny_sd3_pipeline.save_pretrained(tmp_path)
        policy = load_policy(str(tmp_path))
        assert isinstance(policy, SD3Policy) and policy.name_or_path == str(tmp_path)
        assert load_policy(policy) is policy
        assert policy.vae_fingerprint() == SD3Policy(tiny_sd3_pipeline).vae_fingerprint()

    def test_other_schedulers_and_pipelines_are_rejected(self, tiny_sd3_pipeline):
        with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler"):
            tiny_sd3_pipeline.scheduler = DDPMScheduler()
            SD3Policy(tiny_sd3_pipeline)
        with pytest.raises(ValueError, match="no policy supports"):
            load_policy(torch.nn.Linear(1, 1))

    def test_vae_fingerprint_ignores_dtype_but_not_weights(self, tiny_sd3_policy):
        fingerprint = tiny_sd3_policy.vae_fingerprint()
        tiny_sd3_policy.vae.to(torch.float16)
        assert tiny_sd3_policy.vae_fingerprint() == fingerprint
        assert SD3Policy(make_pipeline(seed=1)).vae_fingerprint() != fingerprint


class TestLoRA:
    @pytest.mark.parametrize("lora_alpha", [4, 16])
    def test_diffusers_loads_it_exactly(self, tiny_sd3_pipeline, tiny_sd3_policy, tmp_path, lora_alpha):
        tiny_sd3_pipeline.save_pretrained(tmp_path / "base")
        config = LoraConfig(r=4, lora_alpha=lora_alpha, target_modules=tiny_sd3_policy.lora_target_modules)
        model = get_peft_model(tiny_sd3_policy.transformer, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        tiny_sd3_policy.save_lora_weights(tmp_path / "lora", model)

        loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path / "base", text_encoder_3=None, tokenizer_3=None)
        embeds = tiny_sd3_policy.encode_prompts(PROMPTS, 3)
        inputs = (torch.randn(2, 4, 8, 8), 0.7, embeds)
        base_velocity = SD3Policy(loaded).velocity(loaded.transformer, *inputs)
        loaded.load_lora_weights(str(tmp_path / "lora"))
        expected = tiny_sd3_policy.velocity(model, *inputs)
        assert torch.equal(SD3Policy(loaded).velocity(loaded.transformer, *inputs), expected)
        assert not torch.allclose(base_velocity, expected, atol=1e-3)

    def test_targets_cover_every_attention_projection(self, tiny_sd3_policy):
        model = get_peft_model(
            tiny_sd3_policy.transformer, LoraConfig(r=2, target_modules=tiny_sd3_policy.lora_target_modules)
        )
        adapted = {name for name, module in model.named_modules() if "lora_A" in dict(module.named_children())}
        linears = {
            name.removesuffix(".base_layer")
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and ".attn" in name and "lora" not in name
        }
        assert adapted == linears
        assert any(".attn2." in name for name in adapted)
