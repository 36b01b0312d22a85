# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
import torch.nn.functional as F

from tapo_trl.policies import SD3Policy, WanPolicy
from tapo_trl.rewards import DiNaModel
from tapo_trl.rewards.backbones.features import Features
from tapo_trl.rewards.dina import CrossAttention, DiNaHead, FiLMAdapter
from tests.testing_utils import tiny_sd3_pipeline, tiny_wan_pipeline


DIM = 16


@pytest.fixture(scope="module")
def policy():
    return SD3Policy(tiny_sd3_pipeline(num_layers=6))


def inputs(policy, shape: tuple[int, ...] = (4, 8, 8)) -> tuple[torch.Tensor, ...]:
    embeds = policy.encode_prompts(["cat", "dog", "bird"], 16)
    latents = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    return latents, torch.tensor([0.2, 0.5, 0.9]), embeds.prompt_embeds, embeds.pooled_prompt_embeds


def random_features(num_layers: int = 2) -> Features:
    return Features(
        visual=[torch.randn(3, 9, DIM) for _ in range(num_layers)],
        text=[torch.randn(3, 5, DIM) for _ in range(num_layers)],
        time=torch.randn(3, DIM),
    )


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


class TestFiLMAdapter:
    def test_noise_level_has_no_influence_at_the_start(self):
        adapter, tokens = FiLMAdapter(DIM, 4), torch.randn(3, 9, DIM)
        expected = adapter.projection(tokens + adapter.layer_embedding)
        for scale in (0.0, 1.0, 100.0):
            assert torch.equal(adapter(tokens, scale * torch.randn(3, DIM)), expected)

    def test_scales_and_shifts(self):
        adapter, tokens, time = randomised(FiLMAdapter(DIM, 4)), torch.randn(3, 9, DIM), torch.randn(3, DIM)
        first, _, second = adapter.modulation
        for index in range(3):
            hidden = first.weight @ time[index] + first.bias
            modulation = second.weight @ (hidden * hidden.sigmoid()) + second.bias
            scale, shift = modulation[:DIM], modulation[DIM:]
            expected = adapter.projection(tokens[index] * (1 + scale) + shift + adapter.layer_embedding[0])
            torch.testing.assert_close(adapter(tokens, time)[index], expected, rtol=1e-4, atol=1e-4)

    def test_learns_the_noise_level(self):
        adapter, tokens, time = FiLMAdapter(DIM, 4), torch.randn(3, 9, DIM), torch.randn(3, DIM)
        adapter(tokens, time).square().sum().backward()
        assert adapter.modulation[-1].weight.grad.abs().max() > 0


class TestCrossAttention:
    @pytest.mark.parametrize("gated", [False, True])
    def test_against_a_loop(self, gated):
        torch.manual_seed(0)
        attention = randomised(CrossAttention(DIM, 2, gated))
        queries, contexts = torch.randn(2, 4, DIM), (torch.randn(2, 9, DIM), torch.randn(2, 5, DIM))

        def rms_norm(norm, tokens):
            return (
                norm.weight * tokens / (tokens.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
            )

        head_dim = DIM // attention.num_heads
        query = attention.query(rms_norm(attention.norm, queries))
        attended = torch.zeros_like(queries)
        for projections, tokens in zip(attention.contexts, contexts, strict=True):
            tokens = rms_norm(projections.norm, tokens)
            key, value = projections.key(tokens), projections.value(tokens)
            if gated:
                value = value * projections.gate(tokens).sigmoid()
            for head in range(attention.num_heads):
                part = slice(head * head_dim, (head + 1) * head_dim)
                weights = (query[..., part] @ key[..., part].mT / math.sqrt(head_dim)).softmax(-1)
                attended[..., part] += weights @ value[..., part]
        expected = queries + attention.output(attended)
        torch.testing.assert_close(attention(queries, *contexts), expected, rtol=1e-4, atol=1e-4)

    def test_gates_start_at_one_half(self):
        attention, queries, tokens = CrossAttention(DIM, 1, gated=True), torch.zeros(2, 4, DIM), torch.randn(2, 9, DIM)
        plain = CrossAttention(DIM, 1, gated=False)
        plain.load_state_dict(attention.state_dict(), strict=False)
        for module in (attention, plain):
            torch.nn.init.zeros_(module.output.bias)
        torch.testing.assert_close(attention(queries, tokens), plain(queries, tokens) / 2)


class TestHead:
    def test_of_each_query_a_score_whose_mean_counts(self):
        torch.manual_seed(0)
        head, features = randomised(DiNaHead(DIM, num_layers=2, num_queries=3)), random_features()
        visual = head.visual_adapter(features.visual, features.time)
        text = head.text_adapter(features.text, features.time)
        queries = head.joint_attention(head.queries.expand(3, -1, -1), visual, text)
        queries = head.visual_attention(queries, visual)
        first, _, second = head.ff
        queries = queries + second(F.gelu(first(head.ff_norm(queries))))
        scores = F.linear(queries, head.readout.weight, head.readout.bias).squeeze(2)
        torch.testing.assert_close(head(features), scores.mean(1), rtol=1e-4, atol=1e-4)

    def test_layers_are_brought_to_a_quarter_and_merged(self):
        adapter, features = DiNaHead(DIM, 2, 3).visual_adapter, random_features()
        parts = [layer(tokens, features.time) for layer, tokens in zip(adapter.adapters, features.visual, strict=True)]
        assert [part.shape for part in parts] == [(3, 9, DIM // 4)] * 2
        expected = adapter.merge(torch.cat(parts, dim=-1))
        assert torch.equal(adapter(features.visual, features.time), expected) and expected.shape == (3, 9, DIM)

    def test_everything_is_trained(self):
        head = DiNaHead(DIM, 2, 4)
        head(random_features()).square().sum().backward()
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None, name


class TestModel:
    @torch.no_grad()
    def test_score_is_the_heads_of_the_whole_transformers_features(self, policy):
        torch.manual_seed(3)
        model, args, seen = DiNaModel.from_policy(policy, layers=[1, 3]), inputs(policy), {}
        hooks = [
            policy.transformer.transformer_blocks[number - 1].register_forward_hook(
                lambda module, arguments, output, number=number: seen.update({number: output})
            )
            for number in (1, 3)
        ]
        hooks.append(
            policy.transformer.time_text_embed.register_forward_hook(lambda m, a, output: seen.update(time=output))
        )
        latents, sigma, prompt_embeds, pooled = args
        policy.transformer(latents, prompt_embeds, pooled, sigma * 1000)
        for hook in hooks:
            hook.remove()
        features = Features(
            visual=[seen[1][1], seen[3][1]], text=[seen[1][0], seen[3][0]], time=seen["time"]
        )  # fmt: skip
        torch.testing.assert_close(model.score(*args), model.head(features))
        assert model.score(*args).shape == (3,) and model.score(*args).std() > 0

    @pytest.mark.parametrize(
        ("make_policy", "shape"),
        [
            (lambda: SD3Policy(tiny_sd3_pipeline(num_layers=6)), (4, 8, 8)),
            (lambda: WanPolicy(tiny_wan_pipeline(num_layers=6)), (4, 2, 4, 4)),
        ],
        ids=["sd3", "wan"],
    )
    def test_half_of_the_blocks_run(self, make_policy, shape):
        policy = make_policy()
        model, ran = DiNaModel.from_policy(policy), []
        for block in model.transformer.block_list:
            block.register_forward_hook(lambda module, args, output: ran.append(module))
        with torch.no_grad():
            scores = model.score(*inputs(policy, shape))
        assert scores.shape == (3,) and scores.isfinite().all()
        assert model.config.layers == [1, 2, 3] and len(ran) == 3

    def test_layer_that_is_not_there_or_has_no_text(self, policy):
        with pytest.raises(ValueError, match="`layers` must be blocks of the transformer, 1 to 5"):
            DiNaModel.from_policy(policy, layers=[2, 6])
        wan = WanPolicy(tiny_wan_pipeline())
        assert len(DiNaModel.from_policy(wan, layers=[1, 3]).transformer.blocks) == 3
        with pytest.raises(ValueError, match="1 to 3"):
            DiNaModel.from_policy(wan, layers=[4])

    def test_unknown_backbone(self):
        class OtherTransformer(type(tiny_sd3_pipeline().transformer)):
            pass

        policy = SD3Policy(tiny_sd3_pipeline())
        policy.pipeline.transformer.__class__ = OtherTransformer
        with pytest.raises(ValueError, match="cannot read a `OtherTransformer`"):
            DiNaModel.from_policy(policy)
