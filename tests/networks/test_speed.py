# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from datasets import Dataset
from diffusers.models.attention_dispatch import AttentionBackendName
from peft import LoraConfig
from torch import nn

from tapo_trl import SLRMModel, TAPOConfig, TAPOTrainer
from tapo_trl.networks import attention
from tapo_trl.networks.attention import set_attention_backend
from tapo_trl.networks.float8 import Float8Linear
from tapo_trl.policies import load_policy
from tapo_trl.runs.checks import check_dynamo_backend, check_speed_options
from tests.testing_utils import tiny_sd3_pipeline, tiny_wan_pipeline
from tests.trainer.policy_checks import trainable


PIPELINES = {"sd3": tiny_sd3_pipeline, "wan": tiny_wan_pipeline}
BLOCKS = {"sd3": "JointTransformerBlock", "wan": "WanTransformerBlock"}


def redness(images, prompts):
    return images[:, 0].flatten(1).mean(1)


def make_args(tmp_path, family="sd3", **kwargs):
    defaults = {
        "cache_dir": str(tmp_path / "cache"),
        "resolution": 32,
        "num_frames": 5 if family == "wan" else None,
        "max_sequence_length": 3,
        "num_inference_steps": 4,
        "num_sde_steps": 2,
        "num_candidates": 2,
        "guidance_scale": 2.0,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TAPOConfig(str(tmp_path / "out"), **defaults | kwargs)


def make_trainer(tmp_path, family="sd3", reward=redness, peft=True, model=None, **kwargs):
    torch.manual_seed(0)
    return TAPOTrainer(
        model or PIPELINES[family](),
        reward,
        make_args(tmp_path, family, **kwargs),
        train_dataset=Dataset.from_dict({"prompt": ["cat", "dog", "fox", "owl"]}),
        peft_config=LoraConfig(r=2, lora_alpha=4, init_lora_weights="gaussian") if peft else None,
    )


def make_slrm(family):
    torch.manual_seed(1)
    return SLRMModel.from_policy(load_policy(PIPELINES[family]()), max_sequence_length=3)


def assert_same_training(found, expected, **tolerance):
    found.train()
    expected.train()
    for name, value in trainable(expected).items():
        torch.testing.assert_close(trainable(found)[name], value, **tolerance)


class TestFloat8:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_weights_are_rounded_by_row(self, dtype):
        linear = nn.Linear(64, 32).to(dtype).requires_grad_(False)
        with torch.no_grad():
            linear.weight *= torch.logspace(-6, 3, 32)[:, None]  # far from what float8 can hold by itself
        rounded = Float8Linear(linear)
        assert rounded.weight.dtype == dtype and rounded.weight_bytes.element_size() == 1
        error = (rounded.weight - linear.weight).float().norm(dim=1) / linear.weight.float().norm(dim=1)
        assert 0.005 < error.max() < 0.04

    def test_gradient_is_that_of_the_rounded_layer(self):
        rounded = Float8Linear(nn.Linear(16, 8).requires_grad_(False))
        plain = nn.Linear(16, 8)
        plain.load_state_dict({"weight": rounded.weight, "bias": rounded.bias})
        inputs = torch.randn(2, 3, 5, 16, requires_grad=True)
        output, expected = rounded(inputs), plain(inputs)
        assert torch.equal(output, expected)
        gradient = torch.randn_like(output)
        found = torch.autograd.grad(output, inputs, gradient)[0]
        torch.testing.assert_close(found, torch.autograd.grad(expected, inputs, gradient)[0])

    def test_bytes_survive_casts(self):
        rounded = Float8Linear(nn.Linear(16, 8).requires_grad_(False))
        before = rounded.weight_bytes.clone()
        assert torch.equal(rounded.bfloat16().weight_bytes, before)
        assert rounded.weight.dtype == torch.bfloat16

    @pytest.mark.slow
    @pytest.mark.parametrize(("family", "bf16"), [("sd3", False), ("wan", True)])
    def test_training(self, tmp_path, family, bf16):
        """The self-check of the start, ln 2, is on. Memory shrinks, the rest of the base stays, and LoRA is trained."""
        plain = make_trainer(tmp_path, family, bf16=bf16)
        trainer = make_trainer(tmp_path, family, bf16=bf16, layerwise_casting=True)
        layers = {n: m for n, m in trainer.policy.transformer.named_modules() if isinstance(m, Float8Linear)}
        assert any("to_q.base_layer" in name for name in layers) and any(".ff" in name for name in layers)
        assert not any("norm" in name or "pos_embed" in name or "patch_embedding" in name for name in layers)
        for name, layer in layers.items():
            weight = plain.policy.transformer.get_submodule(name).weight
            assert (layer.weight - weight).float().norm() < 0.04 * weight.float().norm()
        before = trainable(trainer)
        bytes_before = {name: layer.weight_bytes.clone() for name, layer in layers.items()}
        trainer.train()
        assert not any(
            torch.equal(value, before[name])
            for name, value in trainable(trainer).items()
            if "_B" in name and "2.attn.add_q" not in name
        )
        assert all(torch.equal(layer.weight_bytes, bytes_before[name]) for name, layer in layers.items())
        trainer.save_model()
        PIPELINES[family]().load_lora_weights(trainer.args.output_dir)

    def test_refused(self, tmp_path):
        with pytest.raises(ValueError, match="`layerwise_casting=True` needs LoRA"):
            make_trainer(tmp_path, layerwise_casting=True, peft=False)


class TestAttentionBackend:
    @pytest.fixture(autouse=True)
    def default_backend(self):
        yield
        tiny_wan_pipeline().transformer.set_attention_backend("native")  # diffusers keeps the last one for the process

    @pytest.mark.slow
    def test_policy_and_reward(self, tmp_path):
        expected = make_trainer(tmp_path, "wan", make_slrm("wan"))
        trainer = make_trainer(tmp_path, "wan", make_slrm("wan"), attention_backend="_native_math")
        for network in (trainer.policy.transformer, trainer.reward.rewards[0].model.transformer):
            backends = {m.processor._attention_backend for m in network.modules() if hasattr(m, "processor")}
            assert backends == {AttentionBackendName._NATIVE_MATH}
        assert_same_training(trainer, expected, rtol=1e-3, atol=1e-4)

    def test_sd3_does_not_ask(self, tmp_path):
        with pytest.raises(ValueError, match="would change nothing.*`SD3Transformer2DModel`"):
            make_trainer(tmp_path, attention_backend="native")

    def test_unknown(self, tmp_path):
        with pytest.raises(ValueError, match=r"must be one of \['flash', .*'native'.*got 'fast'"):
            make_trainer(tmp_path, "wan", attention_backend="fast")

    def test_not_installed(self, tmp_path):
        with pytest.raises(
            ValueError, match="`attention_backend='sage'` does not work here: .*install `sageattention"
        ):
            make_trainer(tmp_path, "wan", attention_backend="sage")

    @pytest.mark.parametrize(
        ("break_it", "message"),
        [(torch.Tensor.detach, "no gradients"), (lambda x: 1.2 * x, "its values or gradients")],
    )
    def test_without_gradients_or_wrong(self, monkeypatch, break_it, message):
        attend = attention.dispatch_attention_fn

        def broken(*args, backend):
            output = attend(*args, backend=backend)
            return break_it(output) if backend == "_native_math" else output

        monkeypatch.setattr(attention, "dispatch_attention_fn", broken)
        network = tiny_wan_pipeline().transformer
        with pytest.raises(ValueError, match=message):
            set_attention_backend(network, "_native_math", torch.device("cpu"), torch.float32)
        assert network.blocks[0].attn1.processor._attention_backend == AttentionBackendName.NATIVE


class TestCompile:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("family", "checkpointing", "backend"), [("sd3", True, "eager"), ("wan", False, "aot_eager")]
    )
    def test_training(self, tmp_path, family, checkpointing, backend):
        """With the self-check of the start, ln 2: policy and reference go through the same compiled blocks."""
        options = {"activation_checkpointing": checkpointing, "transition_batch_size": 1}
        slrm = make_slrm(family)
        expected = make_trainer(tmp_path, family, slrm, **options)
        expected.train()
        options |= {"torch_compile": True, "torch_compile_backend": backend}
        trainer = make_trainer(tmp_path, family, slrm, **options)
        compiled = [m for m in trainer.model.modules() if m._compiled_call_impl is not None]
        assert {type(m).__name__ for m in compiled} == {BLOCKS[family]} and len(compiled) == 3
        assert sum(m._compiled_call_impl is not None for m in slrm.modules()) == 3
        trainer.train()
        assert trainer.accelerator.state.dynamo_plugin.backend.value == "NO"
        assert trainer.model_wrapped is trainer.model
        for name, value in trainable(expected).items():
            torch.testing.assert_close(trainable(trainer)[name], value, rtol=1e-3, atol=1e-4)

    def test_full_fine_tuning_compiles_the_reference(self, tmp_path):
        trainer = make_trainer(tmp_path, peft=False, torch_compile=True, torch_compile_backend="eager")
        for network in (trainer.model, trainer.ref_model):
            assert sum(m._compiled_call_impl is not None for m in network.modules()) == 3

    def test_launchers_way_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
        with pytest.raises(ValueError, match="`dynamo_backend`, which compiles the policy but not its reference"):
            check_dynamo_backend()

    @pytest.mark.parametrize("option", ["reward_layerwise_casting", "reward_group_offload"])
    def test_with_weights_on_the_move(self, tmp_path, option):
        args = make_args(tmp_path, torch_compile=True, **{option: True})
        with pytest.raises(ValueError, match=f"`torch_compile=True` and `{option}=True` exclude each other"):
            check_speed_options(args, LoraConfig())
