# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from tapo_trl.policies import SD3Policy, WanPolicy
from tapo_trl.rewards import LRMModel
from tapo_trl.rewards.lrm import LRMHead, enhanced_feature
from tests.testing_utils import tiny_sd3_pipeline, tiny_wan_pipeline


@pytest.fixture(scope="module")
def policy():
    return SD3Policy(tiny_sd3_pipeline(num_layers=4))


def inputs(policy, length: int = 16) -> tuple[torch.Tensor, ...]:
    embeds = policy.encode_prompts(["cat", "dog", "bird"], length)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return latents, torch.tensor([0.2, 0.5, 0.9]), embeds.prompt_embeds, embeds.pooled_prompt_embeds


def make(policy, **config) -> LRMModel:
    torch.manual_seed(3)
    return LRMModel.from_policy(policy, **({"max_sequence_length": 16} | config))


class TestHead:
    def test_is_clips_similarity(self):
        torch.manual_seed(0)
        head = LRMHead(6, 5)
        head.logit_scale.data.fill_(math.log(7))
        head.text_projection.weight.data.normal_()
        visual, text = torch.randn(4, 6), torch.randn(4, 5)
        for index, score in enumerate(head(visual, text).tolist()):
            left = head.visual_projection.weight @ visual[index]
            right = head.text_projection.weight @ text[index]
            cosine = torch.dot(left, right) / (left.norm() * right.norm())
            assert score == pytest.approx(7 * cosine.item(), rel=1e-5, abs=1e-5)

    def test_starts_at_the_text_as_clip_projected_it(self):
        head = LRMHead(6, 5)
        assert torch.equal(head.text_projection.weight, torch.eye(5))
        assert head.logit_scale.exp().item() == pytest.approx(100)

    def test_is_not_rounded_by_autocast(self):
        head, visual, text = LRMHead(6, 5), torch.randn(4, 6), torch.randn(4, 5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = head(visual, text)
        assert rounded.dtype == torch.float32 and torch.equal(rounded, head(visual, text))


class TestEnhancement:
    def test_is_guidance(self):
        unconditional, conditional = torch.randn(2, 3, 5)
        assert torch.equal(enhanced_feature(unconditional, conditional, 0.0), unconditional)
        torch.testing.assert_close(enhanced_feature(unconditional, conditional, 1.0), conditional)
        expected = 7.5 * conditional - 6.5 * unconditional
        torch.testing.assert_close(enhanced_feature(unconditional, conditional, 7.5), expected)

    @torch.no_grad()
    def test_of_the_model_is_that_of_two_forwards_through_the_whole_transformer(self, policy):
        tokens = []
        hook = policy.transformer.transformer_blocks[1].register_forward_hook(
            lambda module, args, output: tokens.append(output[1])
        )
        args = inputs(policy)
        latents, sigma, prompt_embeds, pooled = args
        null = policy.encode_prompts([""], 16)
        for embeds, pooled_embeds in (
            (null.prompt_embeds.repeat(3, 1, 1), null.pooled_prompt_embeds.repeat(3, 1)),
            (prompt_embeds, pooled),
        ):
            policy.transformer(latents, embeds, pooled_embeds, sigma * 1000)
        hook.remove()
        unconditional, conditional = (layer.mean(dim=1) for layer in tokens)

        model = make(policy, layer=2, guidance_scale=3.0)
        feature = model.visual_feature(*args)
        torch.testing.assert_close(feature, 3 * conditional - 2 * unconditional, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.score(*args), model.head(feature, pooled))
        assert (unconditional - conditional).abs().max() > 0.01

        plain = make(policy, layer=2, guidance_scale=1.0)
        torch.testing.assert_close(plain.visual_feature(*args), conditional, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(("scale", "latents_per_score"), [(1.0, 1), (7.5, 2)])
    def test_costs_twice_as_much(self, policy, scale, latents_per_score):
        model, seen = make(policy, guidance_scale=scale), []
        model.transformer.transformer_blocks[0].register_forward_hook(lambda m, args, out: seen.append(len(out[1])))
        with torch.no_grad():
            model.score(*inputs(policy))
        assert seen == [3 * latents_per_score]
        assert model.latents_per_score == latents_per_score

    def test_empty_prompt_of_another_length(self, policy):
        with pytest.raises(ValueError, match="encode prompts with the same `max_sequence_length`"):
            make(policy, max_sequence_length=8).score(*inputs(policy))


class TestModel:
    def test_blocks_that_run(self, policy):
        assert make(policy).config.layer == 3
        assert len(make(policy).transformer.transformer_blocks) == 3
        assert len(make(policy, layer=1).transformer.transformer_blocks) == 1
        assert len(make(policy, layer=4).transformer.transformer_blocks) == 4

    @pytest.mark.parametrize("layer", [0, 5])
    def test_layer_that_is_not_there(self, policy, layer):
        with pytest.raises(ValueError, match="`layer` must be blocks of the transformer, 1 to 4"):
            make(policy, layer=layer)

    def test_wan_has_no_pooled_prompt(self):
        with pytest.raises(ValueError, match="pooled prompt embeddings.* `WanTransformer3DModel` does not have"):
            LRMModel.from_policy(WanPolicy(tiny_wan_pipeline()))

    def test_without_weights_it_has_the_same_shapes(self, policy):
        shapes = {name: tensor.shape for name, tensor in make(policy).state_dict().items()}
        config = {"max_sequence_length": 16}
        assert {n: t.shape for n, t in LRMModel.without_weights(policy, **config).state_dict().items()} == shapes

    def test_needs_the_text_encoders(self):
        policy = SD3Policy(tiny_sd3_pipeline())
        policy.unload_text_encoders()
        with pytest.raises(ValueError, match="no text encoders"):
            LRMModel.from_policy(policy)
