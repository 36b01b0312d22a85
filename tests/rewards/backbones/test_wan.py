# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig

from tapo_trl.policies import SD3Policy, WanPolicy, load_policy
from tapo_trl.rewards import SLRMModel
from tapo_trl.rewards.backbones.wan import WanScoreTransformer3DModel
from tests.testing_utils import tiny_sd3_pipeline, tiny_wan_pipeline


# Kernels may round by layout and alignment of a tensor in memory, a few units of the last place of velocities around 2
ROUNDING = 2e-6

CONFIGURATIONS = {"wan2.1": {}, "without cross-attention norm": {"cross_attn_norm": False}}


def inputs(batch_size: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch_size, 4, 3, 4, 6, generator=generator),
        "timestep": torch.linspace(100, 900, batch_size),
        "encoder_hidden_states": torch.randn(batch_size, 9, 16, generator=generator),
    }


def score_transformer(rank: int | None = None, **config) -> tuple[torch.nn.Module, WanScoreTransformer3DModel]:
    base = tiny_wan_pipeline(**config).transformer
    return base, WanScoreTransformer3DModel.from_base(base, num_task_tokens=3, task_projection_rank=rank)


class TestScoreTokens:
    @pytest.mark.parametrize("rank", [None, 2])
    @pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
    def test_masked_tokens_give_the_velocity_of_the_base(self, config, rank):
        base, model = score_transformer(rank, **config)
        with torch.no_grad():
            expected = base(**inputs()).sample
            velocity, _ = model(**inputs(), mask_task_tokens=True)
        torch.testing.assert_close(velocity, expected, rtol=0, atol=ROUNDING)

    def test_they_influence_the_velocity_and_the_logit_unless_masked(self):
        _, model = score_transformer()
        with torch.no_grad():
            before, masked_before = model(**inputs()), model(**inputs(), mask_task_tokens=True)
            model.task_tokens.add_(torch.randn_like(model.task_tokens))
            after, masked_after = model(**inputs()), model(**inputs(), mask_task_tokens=True)
        assert (after[0] - before[0]).abs().max() > 1e-4
        assert (after[1] - before[1]).abs().min() > 1e-4
        torch.testing.assert_close(masked_after[0], masked_before[0], rtol=0, atol=ROUNDING)

    def test_the_base_with_appended_tokens_and_identity_rotary_is_the_same_function(self):
        """By hand: while P^S is the video's own projection, score tokens are video tokens at the rotary origin."""
        base, model = score_transformer()
        x = inputs()
        cos, sin = base.rope(x["hidden_states"])
        rotary = torch.cat([cos, torch.ones_like(cos[:, :3])], 1), torch.cat([sin, torch.zeros_like(sin[:, :3])], 1)
        with torch.no_grad():
            video = base.patch_embedding(x["hidden_states"]).flatten(2).transpose(1, 2)
            embedder = base.condition_embedder
            _, temb, text, _ = embedder(x["timestep"], x["encoder_hidden_states"])
            tokens = torch.cat([video, embedder.text_embedder(model.task_tokens).expand(2, -1, -1)], dim=1)
            for block in base.blocks:
                tokens = block(tokens, text, temb.unflatten(1, (6, -1)), rotary)
            expected = model.score_head(tokens[:, -3:])
            torch.testing.assert_close(model(**x)[1], expected)

            for block in model.blocks:  # and no longer once it is not
                block.score_projections.value.weight.mul_(-1)
            assert not torch.allclose(model(**x)[1], expected, atol=1e-4)

    @pytest.mark.parametrize("source", ["hidden_states", "timestep", "encoder_hidden_states"])
    def test_logits_depend_on_every_input_of_their_own_sample_alone(self, source):
        _, model = score_transformer()
        changed = inputs()
        changed[source][0] += 0.5 * changed[source][0].abs().mean() + 1
        with torch.no_grad():
            before, after = model(**inputs())[1], model(**changed)[1]
        assert (after[0] - before[0]).abs() > 1e-5
        torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-6)

    def test_projections_start_at_the_videos(self):
        _, model = score_transformer()
        for block in model.blocks:
            assert torch.equal(block.score_projections.query.weight, block.attn1.to_q.weight)
            assert torch.equal(block.score_projections.key.weight, block.attn1.to_k.weight)
            assert torch.equal(block.score_projections.value.bias, block.attn1.to_v.bias)

    def test_tokens_start_in_the_range_of_the_text_projection(self):
        torch.manual_seed(0)
        base, _ = score_transformer(text_dim=256)
        model = WanScoreTransformer3DModel.from_base(base, num_task_tokens=16)
        layer = model.condition_embedder.text_embedder.linear_1
        with torch.no_grad():
            assert (model.task_tokens @ layer.weight.T).std().item() == pytest.approx(1, rel=0.15)

    def test_zero_low_rank_update_equals_full_projections(self):
        _, full = score_transformer()
        _, low_rank = score_transformer(rank=2)
        with torch.no_grad():
            low_rank.task_tokens.copy_(full.task_tokens)
            low_rank.score_head.load_state_dict(full.score_head.state_dict())
            torch.testing.assert_close(low_rank(**inputs())[1], full(**inputs())[1])

    def test_positions_are_copied(self):
        """They are buffers that no file has, and the copy is built without memory."""
        base, model = score_transformer()
        assert torch.equal(model.rope.freqs_cos, base.rope.freqs_cos)
        assert model.rope.freqs_cos.data_ptr() != base.rope.freqs_cos.data_ptr()

    def test_a_transformer_with_an_adapter_is_refused(self):
        base = tiny_wan_pipeline().transformer
        base.add_adapter(LoraConfig(target_modules=["to_q"]))
        with pytest.raises(ValueError, match="merge or detach"):
            WanScoreTransformer3DModel.from_base(base, num_task_tokens=2)


class TestGradients:
    @pytest.mark.parametrize("mask", [False, True])
    def test_the_logit_reaches_every_score_parameter_of_every_block(self, mask):
        _, model = score_transformer()
        model(**inputs(), mask_task_tokens=mask)[1].sum().backward()
        parameters = model.score_parameters()
        for index in range(3):
            for projection in ("query", "key", "value"):
                assert f"blocks.{index}.score_projections.{projection}.weight" in parameters
        assert [name for name, p in parameters.items() if p.grad is None or not p.grad.abs().max() > 0] == []

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
        assert calls == list(model.blocks)
        for name, parameter in model.named_parameters():
            if name in expected:
                torch.testing.assert_close(parameter.grad, expected[name], msg=name)


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    tiny_wan_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(pipeline_folder):
    return load_policy(str(pipeline_folder))


def scored(policy) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    latents = torch.randn(3, *policy.latent_shape(32, 48, 9), generator=torch.Generator().manual_seed(1))
    return latents, torch.linspace(0.2, 0.9, 3), policy.encode_prompts(["cat", "dog", "bird"], 12).prompt_embeds


def make(policy, lora: bool = False, **config) -> SLRMModel:
    torch.manual_seed(3)
    model = SLRMModel.from_policy(policy, **{"num_task_tokens": 3, "max_sequence_length": 12} | config)
    if lora:
        targets = policy.lora_target_modules
        model.add_lora(LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False))
    return model


class TestSLRM:
    def test_masked_velocity_is_the_policys(self, policy):
        latents, sigma, prompt_embeds = scored(policy)
        with torch.no_grad():
            embeds = policy.encode_prompts(["cat", "dog", "bird"], 12)
            expected = policy.velocity(policy.transformer, latents, sigma, embeds)
            output = make(policy)(latents, sigma, prompt_embeds, mask_task_tokens=True)
        torch.testing.assert_close(output.velocity, expected, rtol=0, atol=ROUNDING)

    @pytest.mark.parametrize("lora", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_save_and_load_are_exact(self, pipeline_folder, lora, dtype, tmp_path):
        policy = load_policy(str(pipeline_folder), torch_dtype=dtype)
        size = {"height": 32, "width": 48, "num_frames": 9}
        model = make(policy, lora, task_projection_rank=2 if lora else None, **size)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path)
        loaded = SLRMModel.from_pretrained(tmp_path, torch_dtype=dtype)
        for name, tensor in model.state_dict().items():
            other = loaded.state_dict()[name]
            assert torch.equal(other, tensor) and other.dtype == tensor.dtype, name
        args = scored(policy)
        with torch.no_grad():
            expected, output = model(*args), loaded(*args)
        assert torch.equal(output.logits, expected.logits) and torch.equal(output.velocity, expected.velocity)
        assert {name: loaded.config[name] for name in size} == size
        loaded.check_compatible(policy, max_sequence_length=12)

    def test_half_precision_keeps_what_the_backbone_keeps_in_float32(self, policy, pipeline_folder):
        half = load_policy(str(pipeline_folder), torch_dtype=torch.bfloat16)
        model, full = make(half), make(policy)
        backbone = dict(half.transformer.named_parameters())
        for name, parameter in model.transformer.named_parameters():
            assert parameter.dtype == (backbone[name].dtype if name in backbone else torch.bfloat16), name
        full.load_state_dict(model.state_dict())
        args = scored(policy)
        with torch.no_grad():
            latents, sigma, embeds = args
            expected = half.transformer(latents.bfloat16(), sigma * 1000, embeds.bfloat16(), return_dict=False)[
                0
            ].float()
            velocity = model(*args, mask_task_tokens=True).velocity
            torch.testing.assert_close(velocity, expected, rtol=0, atol=0.03)
            torch.testing.assert_close(model(*args).logits, full(*args).logits, atol=0.02, rtol=0.05)

    def test_lora_trains_the_score_stream_in_float32_and_the_logit_reaches_all_of_it(self, pipeline_folder):
        policy = load_policy(str(pipeline_folder), torch_dtype=torch.bfloat16)
        model = make(policy, lora=True)
        trained = {name: p for name, p in model.transformer.named_parameters() if p.requires_grad}
        assert {p.dtype for p in trained.values()} == {torch.float32}
        assert set(model.transformer.score_parameters()) < set(trained)
        assert any("attn2.to_k.lora_A" in name for name in trained)
        output = model(*scored(policy))
        (output.logits.sum() + output.velocity.square().mean()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())

    def test_full_fine_tuning_is_float32(self, pipeline_folder):
        model = make(load_policy(str(pipeline_folder), torch_dtype=torch.bfloat16)).float()
        assert {p.dtype for p in model.parameters()} == {torch.float32}

    def test_check_compatible(self, policy):
        model = make(policy)
        model.check_compatible(policy)
        with pytest.raises(ValueError, match="`text_dim`: 16 in the SLRM, 24 in the policy"):
            model.check_compatible(WanPolicy(tiny_wan_pipeline(text_dim=24)))
        with pytest.raises(ValueError, match="transformer class: WanTransformer3DModel in the SLRM"):
            model.check_compatible(SD3Policy(tiny_sd3_pipeline()))

    def test_blocks_for_sharding_are_the_backbones(self, policy):
        assert make(policy)._no_split_modules == ["WanScoreBlock"]
        assert SLRMModel.from_policy(SD3Policy(tiny_sd3_pipeline()))._no_split_modules == ["JointScoreBlock"]


class TestFullSize:
    def test_score_stream_of_the_1_3b_model(self):
        """Built without memory: the configuration of Wan2.1-T2V-1.3B, and what the score stream adds to it."""
        with torch.device("meta"):
            base = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)
            model = WanScoreTransformer3DModel(8, **WanScoreTransformer3DModel.base_config(base))
            low_rank = WanScoreTransformer3DModel(8, 64, **WanScoreTransformer3DModel.base_config(base))
        assert base.num_parameters() == 1_418_996_800
        width, added = 1536, model.num_parameters() - base.num_parameters()
        assert added == sum(parameter.numel() for parameter in model.score_parameters().values())
        assert added == 8 * 4096 + 30 * 3 * (width + 1) * width + 2 * width + 1
        assert low_rank.num_parameters() - base.num_parameters() == 8 * 4096 + 30 * 3 * 2 * 64 * width + 2 * width + 1
        velocity, logits = model(
            torch.empty(2, 16, 21, 60, 104, device="meta"),
            torch.empty(2, device="meta"),
            torch.empty(2, 512, 4096, device="meta"),
        )
        assert velocity.shape == (2, 16, 21, 60, 104) and logits.shape == (2,)
