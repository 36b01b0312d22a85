# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What Qwen-Image-2.1 alone has: rotations of each row, an opacity, and noise levels in the pipeline's configuration."""

from functools import partial

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21AttnProcessor

from tapo_trl.estimate.meta_models import load_meta_policy, prompts_of_shapes
from tapo_trl.policies import load_policy
from tapo_trl.policies.base import cast_inputs
from tapo_trl.policies.qwen_image21 import QwenImage21Policy, forward_of_shapes
from tapo_trl.rewards import DiNaModel, SLRMModel


PROMPTS = ["red cat", "a blue dog that runs"]


@pytest.fixture(scope="module")
def policy():
    return load_policy(QwenImage21Policy.tiny())


def inputs(policy):
    torch.manual_seed(0)
    latents, prompts = torch.randn(2, *policy.latent_shape(32, 64)), policy.encode_prompts(PROMPTS)
    named = policy.model_inputs(policy.transformer.config, latents, torch.tensor([0.3, 0.9]), prompts)
    return cast_inputs(named, torch.float32)


@torch.no_grad()
def test_rows_are_kept_apart_by_the_attention():
    """With that of diffusers, the longer prompt moves the other sample's image."""
    policy = load_policy(QwenImage21Policy.tiny())
    torch.manual_seed(0)
    latents, sigma, prompts = torch.randn(2, 8, 2, 4), torch.tensor([0.3, 0.9]), policy.encode_prompts(PROMPTS)
    velocity = partial(policy.velocity, policy.transformer)
    alone, both = velocity(latents[:1], sigma[:1], prompts[[0]]), velocity(latents, sigma, prompts)[:1]
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-6)
    policy.transformer.set_attn_processor(QwenImage21AttnProcessor())
    assert torch.equal(velocity(latents[:1], sigma[:1], prompts[[0]]), alone)
    assert (velocity(latents, sigma, prompts)[:1] - alone).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("causal_condition", [True, False])
def test_the_forward_of_dry_runs_is_that_of_the_transformer(causal_condition):
    policy = load_policy(QwenImage21Policy.tiny(causal_condition=causal_condition))
    named = inputs(policy)
    (expected,), (found,) = (
        policy.transformer(**named, return_dict=False),
        forward_of_shapes(policy.transformer, **named),
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_without_weights(tmp_path):
    """The pipeline cannot be made without a processor."""
    QwenImage21Policy.tiny().save_pretrained(tmp_path)
    policy, source = load_meta_policy(str(tmp_path))
    assert source == "the folder's configuration" and policy.transformer.device.type == "meta"
    prompts = prompts_of_shapes(policy, 2, 6)
    latents = torch.empty(2, *policy.latent_shape(32, 64), device="meta")
    velocity = policy.velocity(policy.transformer, latents, 0.5, prompts, prompts[[0]], 3.0)
    assert velocity.is_meta and velocity.shape == latents.shape
    sigma = torch.empty(2, device="meta")
    for model in (SLRMModel.without_weights(policy), DiNaModel.without_weights(policy)):
        assert model(latents, sigma, **prompts.tensors).logits.shape == (2,)


@torch.no_grad()
def test_score_tokens_of_a_transformer_that_modulates_all_tokens():
    policy = load_policy(QwenImage21Policy.tiny(causal_condition=False))
    slrm, named = SLRMModel.from_policy(policy, num_task_tokens=3), inputs(policy)
    (expected,) = policy.transformer(**named, return_dict=False)
    velocity, _ = slrm.transformer(**named, mask_task_tokens=True)
    torch.testing.assert_close(velocity, expected[:, -8:], rtol=0, atol=1e-6)


@torch.no_grad()
def test_score_tokens_have_the_precision_of_the_stream(policy):
    """Under autocast, as the velocity of the base."""
    slrm, named, seen = SLRMModel.from_policy(policy, num_task_tokens=3), inputs(policy), []
    slrm.transformer.transformer_blocks[1].register_forward_pre_hook(lambda block, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (expected,) = policy.transformer(**named, return_dict=False)
        velocity, _ = slrm.transformer(**named, mask_task_tokens=True)
    assert seen == [torch.bfloat16]
    torch.testing.assert_close(velocity, expected[:, -8:], rtol=0, atol=2e-2)


def test_template_and_length(policy):
    """The prompt's bytes are left, with those around it: the user's turn, and the start of the assistant's."""
    around = len("S" + "user\n" + "E" + "\n" + "S" + "assistant\n")  # S and E: special tokens
    rows = policy.encode_prompts(["red cat", "é"]).rows()
    assert [len(row["prompt_embeds"]) for row in rows] == [7 + around, 2 + around]
    (cut,) = policy.encode_prompts(["red cat"], 5).rows()
    torch.testing.assert_close(cut["prompt_embeds"], rows[0]["prompt_embeds"][:5])


def test_noise_levels_of_the_configuration():
    pipeline = QwenImage21Policy.tiny()
    pipeline.register_to_config(sample_sigmas=[1.0, 0.6, 0.3])
    policy = load_policy(pipeline)
    assert policy.defaults.num_inference_steps == 3
    shape = policy.latent_shape(32, 64)
    pipeline.set_progress_bar_config(disable=True)
    pipeline("cat", height=32, width=64, output_type="latent")
    torch.testing.assert_close(policy.build_scheduler(3, shape).sigmas, pipeline.scheduler.sigmas)
    with pytest.raises(ValueError, match="samples with 3 noise levels of its own.*set `num_inference_steps` to 3"):
        policy.build_scheduler(4, shape)


def test_opacity(policy, monkeypatch):
    """Images are encoded as opaque ones. What is transparent looks white."""
    seen = []
    encode = policy.vae.encode
    monkeypatch.setattr(policy.vae, "encode", lambda pixels: seen.append(pixels) or encode(pixels))
    policy.encode(torch.zeros(1, 3, 32, 32))
    assert (seen[0][:, :3] == -1).all() and (seen[0][:, 3] == 1).all()
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 32, 32)
    for opacity in (1.0, 0.5, -1.0):
        rgba = torch.cat([red, torch.full_like(red[:, :1], opacity)], dim=1)
        monkeypatch.setattr(policy.vae, "decode", lambda latents, rgba=rgba, **kwargs: (rgba,))
        pixels = policy.decode(torch.zeros(1, 8, 2, 2))
        white = 1 - (opacity + 1) / 2
        assert pixels[0, :, 0, 0].tolist() == [1.0, white, white]
