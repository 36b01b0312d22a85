# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
import torch.nn.functional as F

from tapo_trl.rewards.backbones.sd3 import SD3ScoreTransformer2DModel
from tests.testing_utils import tiny_sd3_pipeline


# Kernels may round by layout and alignment of a tensor in memory, a few units of the last place of velocities around 2
ROUNDING = 2e-6

CONFIGURATIONS = {
    "sd3": {"dual_attention_layers": (), "qk_norm": None},
    "sd3.5": {},
    "all dual": {"dual_attention_layers": (0, 1, 2)},
}


def inputs(batch_size: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch_size, 4, 8, 8, generator=generator),
        "timestep": torch.linspace(100, 900, batch_size),
        "encoder_hidden_states": torch.randn(batch_size, 9, 24, generator=generator),
        "pooled_projections": torch.randn(batch_size, 20, generator=generator),
    }


def score_transformer(rank: int | None = None, **config) -> tuple[torch.nn.Module, SD3ScoreTransformer2DModel]:
    base = tiny_sd3_pipeline(**config).transformer
    return base, SD3ScoreTransformer2DModel.from_base(base, num_task_tokens=3, task_projection_rank=rank)


class TestThirdStream:
    @pytest.mark.parametrize("rank", [None, 2])
    @pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
    def test_masked_stream_gives_the_velocity_of_the_base(self, config, rank):
        base, model = score_transformer(rank, **config)
        with torch.no_grad():
            expected = base(**inputs()).sample
            velocity, _ = model(**inputs(), mask_task_tokens=True)
        torch.testing.assert_close(velocity, expected, rtol=0, atol=ROUNDING)

    def test_attention_reads_the_memory_layout_of_the_base(self, monkeypatch):
        # On some processors, kernels round differently by layout, so that equal values alone are not enough.
        attention, strides = F.scaled_dot_product_attention, []

        def record(query, key, value, **kwargs):
            strides.append((query.shape, query.stride(), key.stride(), value.stride()))
            return attention(query, key, value, **kwargs)

        monkeypatch.setattr(F, "scaled_dot_product_attention", record)
        base, model = score_transformer()
        with torch.no_grad():
            base(**inputs())
            expected, strides = strides, []
            model(**inputs(), mask_task_tokens=True)
        num_score_tokens = 3
        assert [entry for entry in strides if entry[0][2] != num_score_tokens] == expected

    def test_task_tokens_influence_the_velocity_unless_masked(self):
        _, model = score_transformer()
        with torch.no_grad():
            before, masked_before = model(**inputs())[0], model(**inputs(), mask_task_tokens=True)[0]
            model.task_tokens.add_(torch.randn_like(model.task_tokens))
            after, masked_after = model(**inputs())[0], model(**inputs(), mask_task_tokens=True)[0]
        assert (after - before).abs().max() > 1e-4
        torch.testing.assert_close(masked_after, masked_before, rtol=0, atol=ROUNDING)

    @pytest.mark.parametrize("source", ["hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"])
    def test_logits_depend_on_every_input_of_their_own_sample_alone(self, source):
        _, model = score_transformer()
        changed = inputs()
        changed[source][0] += 0.5 * changed[source][0].abs().mean() + 1
        with torch.no_grad():
            before, after = model(**inputs())[1], model(**changed)[1]
        assert (after[0] - before[0]).abs() > 1e-5
        assert after[1] == before[1]

    def test_projections_start_at_the_text_streams(self):
        _, model = score_transformer()
        for block in model.transformer_blocks:
            assert torch.equal(block.score_projections.query.weight, block.attn.add_q_proj.weight)
            assert torch.equal(block.score_projections.key.weight, block.attn.add_k_proj.weight)
            assert torch.equal(block.score_projections.value.bias, block.attn.add_v_proj.bias)

    def test_zero_low_rank_update_equals_full_projections(self):
        _, full = score_transformer()
        _, low_rank = score_transformer(rank=2)
        with torch.no_grad():
            low_rank.task_tokens.copy_(full.task_tokens)
            low_rank.score_head.load_state_dict(full.score_head.state_dict())
            torch.testing.assert_close(low_rank(**inputs())[1], full(**inputs())[1])

    def test_a_copied_last_block_would_be_a_text_block(self):
        # The output path of the last block starts as the previous block's text stream: the same function of the same
        # inputs, apart from the projections before the attention.
        _, model = score_transformer()
        previous, path = model.transformer_blocks[-2], model.transformer_blocks[-1].score_output
        temb, tokens, attention = torch.randn(2, 16), torch.randn(2, 3, 16), torch.randn(2, 3, 16)
        _, gate, shift, scale, gate_mlp = previous.norm1_context(tokens, emb=temb)
        expected = tokens + gate.unsqueeze(1) * previous.attn.to_add_out(attention)
        normed = previous.norm2_context(expected) * (1 + scale[:, None]) + shift[:, None]
        expected = expected + gate_mlp.unsqueeze(1) * previous.ff_context(normed)

        modulation = path.modulation(torch.nn.functional.silu(temb)).chunk(4, dim=1)
        output = tokens + modulation[0].unsqueeze(1) * path.to_out(attention)
        normed = path.norm(output) * (1 + modulation[2][:, None]) + modulation[1][:, None]
        output = output + modulation[3].unsqueeze(1) * path.ff(normed)
        torch.testing.assert_close(output, expected)

    def test_one_block_is_refused(self):
        with pytest.raises(ValueError, match="at least 2 blocks"):
            score_transformer(num_layers=1, dual_attention_layers=())

    def test_a_transformer_with_an_adapter_is_refused(self):
        from peft import LoraConfig

        base = tiny_sd3_pipeline().transformer
        base.add_adapter(LoraConfig(target_modules=["to_q"]))
        with pytest.raises(ValueError, match="merge or detach"):
            SD3ScoreTransformer2DModel.from_base(base, num_task_tokens=2)


class TestGradients:
    @pytest.mark.parametrize("mask", [False, True])
    def test_the_logit_reaches_every_score_parameter_of_every_block(self, mask):
        _, model = score_transformer()
        model(**inputs(), mask_task_tokens=mask)[1].sum().backward()
        parameters = model.score_parameters()
        for index in range(3):
            for projection in ("query", "key", "value"):
                assert f"transformer_blocks.{index}.score_projections.{projection}.weight" in parameters
        without = [name for name, p in parameters.items() if p.grad is None or not p.grad.abs().max() > 0]
        # A constant added to all keys of the stream moves the logit only if other streams have keys too: it does here.
        assert without == []

    def test_low_rank_updates_get_gradients_once_they_are_not_zero(self):
        _, model = score_transformer(rank=2)
        for block in model.transformer_blocks:
            for update in (block.score_projections.query, block.score_projections.key, block.score_projections.value):
                torch.nn.init.normal_(update.up.weight)
        model(**inputs())[1].sum().backward()
        assert all(p.grad.abs().max() > 0 for p in model.score_parameters().values())

    def test_checkpointing_changes_nothing_but_memory(self):
        _, model = score_transformer()
        calls = []

        def loss():
            velocity, logits = model(**inputs())
            return logits.sum() + velocity.square().mean()

        loss().backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()

        def checkpoint(block, *args):
            calls.append(block)
            return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)

        model.enable_gradient_checkpointing(checkpoint)
        loss().backward()
        assert calls == list(model.transformer_blocks)
        for name, parameter in model.named_parameters():
            if name in expected:
                torch.testing.assert_close(parameter.grad, expected[name], msg=name)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype):
        base, model = score_transformer()
        base.to(dtype)
        half = SD3ScoreTransformer2DModel.from_base(base, num_task_tokens=3)
        assert {p.dtype for p in half.parameters()} == {dtype}
        half.load_state_dict(model.state_dict())
        cast = {name: value.to(dtype) if name != "timestep" else value for name, value in inputs().items()}
        with torch.no_grad():
            velocity, logits = half(**cast, mask_task_tokens=True)
            expected_velocity, expected_logits = model(**inputs(), mask_task_tokens=True)
            torch.testing.assert_close(velocity, base(**cast).sample, rtol=0, atol=0.03)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected_logits, atol=0.02, rtol=0.05)
        torch.testing.assert_close(velocity.float(), expected_velocity, atol=0.1, rtol=0.1)


@torch.no_grad()
def test_attention_backends():
    _, model = score_transformer()
    expected = model(**inputs())[1]
    model.set_attention_backend("_native_math")
    try:
        backends = {str(block.attn.processor._attention_backend.value) for block in model.transformer_blocks}
        assert backends == {"_native_math"}
        torch.testing.assert_close(model(**inputs())[1], expected)
    finally:
        model.set_attention_backend("native")
