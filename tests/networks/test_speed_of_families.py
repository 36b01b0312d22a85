# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""For every family, compiled blocks, attention backends, activation checkpointing and float8 act, and change no values."""

from dataclasses import dataclass

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn

from tapo_trl import DiNaModel, SLRMModel
from tapo_trl.estimate.meta_models import blocks_of
from tapo_trl.networks.attention import set_attention_backend
from tapo_trl.networks.compilation import compile_blocks
from tapo_trl.networks.float8 import Float8Linear, store_base_in_float8
from tapo_trl.policies import load_policy
from tapo_trl.rewards import LatentRewardModel
from tapo_trl.trainer.reward_setup import offload_blocks, store_in_float8
from tests.policies.test_families import GUIDED, family, lora_model, reward_base, world  # noqa: F401


MATH = AttentionBackendName._NATIVE_MATH
# Layers of a block that float8 leaves alone: modulations, whose names have a "norm" in them, and score tokens
KEPT = ("norm", "lora_", "score_")


@dataclass
class Subject:
    """
    A policy with LoRA or a reward model on its transformer.

    Args:
        model (`nn.Module`): what is trained.
        network (`nn.Module`): the transformer in it.
        call (`Callable`): `() -> output`, a forward of prompts of two lengths.
    """

    model: nn.Module
    network: nn.Module
    call: callable

    def gradients(self):
        self.model.zero_grad()
        self.call().square().sum().backward()
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


def make_policy(family, world):  # noqa: F811
    policy = load_policy(family.policy_class.tiny())
    model = lora_model(policy).train()
    inputs = world.latents, world.sigma, world.prompts, world.negative, GUIDED
    return Subject(model, policy.transformer, lambda: policy.velocity(model, *inputs))


def make_reward(family, world):  # noqa: F811
    torch.manual_seed(0)
    policy = load_policy(family.policy_class.tiny())
    model = SLRMModel.from_policy(reward_base(policy), num_task_tokens=2).train()
    inputs = world.latents, world.sigma

    def call():
        output = model(*inputs, **world.prompts.tensors)
        return torch.cat([output.velocity.flatten(), output.logits])

    return Subject(model, model.transformer, call)


def make_features(family, world):  # noqa: F811
    torch.manual_seed(0)
    model = DiNaModel.from_policy(reward_base(load_policy(family.policy_class.tiny())), layers=[1, 2]).train()
    inputs = world.latents, world.sigma
    return Subject(model, model.transformer, lambda: model(*inputs, **world.prompts.tensors).logits)


@pytest.fixture(params=[make_policy, make_reward, make_features], ids=["policy", "slrm", "dina"])
def subject(request, family, world):  # noqa: F811
    return request.param(family, world)


def assert_same(found, expected, atol=1e-5):
    assert found.keys() == expected.keys() and found
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("subject", [make_policy], ids=["policy"], indirect=True)
def test_blocks_are_compiled(subject):
    """All of them, with and without gradients, and none breaks into several graphs. Reward models: test_speed.py."""
    expected = subject.gradients()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks([subject.network], backend)
    assert all(block._compiled_call_impl is not None for block in blocks_of(subject.network))
    assert subject.model._compiled_call_impl is None
    found = subject.gradients()
    assert len(graphs) >= len({type(block) for block in blocks_of(subject.network)})
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_same(found, expected)
    before = len(graphs)
    with torch.no_grad():
        subject.call()
    assert len(graphs) > before


class TestAttentionBackend:
    @pytest.fixture
    def calls(self, monkeypatch):
        """Calls of the backend `_native_math`."""
        calls, attend = [], _AttentionBackendRegistry._backends[MATH]

        def count(*args, **kwargs):
            calls.append(None)
            return attend(*args, **kwargs)

        monkeypatch.setitem(_AttentionBackendRegistry._backends, MATH, count)
        active, _ = _AttentionBackendRegistry.get_active_backend()
        _AttentionBackendRegistry.set_active_backend(
            AttentionBackendName.NATIVE
        )  # an earlier test may have left another
        yield calls
        _AttentionBackendRegistry.set_active_backend(active)  # diffusers keeps the last one for the process

    def test_every_block_asks_for_it(self, subject, calls, request):
        if any(name in request.node.name for name in ("SD3Policy-policy", "SD3Policy-dina")):
            with pytest.raises(ValueError, match="would change nothing.*`SD3.*Transformer2DModel`"):
                set_attention_backend(subject.network, MATH.value, torch.device("cpu"), torch.float32)
            return
        expected = subject.call()
        assert not calls
        set_attention_backend(subject.network, MATH.value, torch.device("cpu"), torch.float32)
        calls.clear()
        found = subject.call()
        blocks = [block for block in blocks_of(subject.network) if type(block).__name__.endswith("Block")]
        assert len(calls) >= len(blocks) >= 2
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_activations_are_computed_again(subject):
    """In the backward pass, and then gradients are the same."""
    expected, ran = subject.gradients(), []
    blocks = [block for block in blocks_of(subject.network) if type(block).__name__.endswith("Block")]
    hooks = [block.register_forward_pre_hook(lambda *_: ran.append(None)) for block in blocks]
    subject.network.enable_gradient_checkpointing()
    found = subject.gradients()
    [hook.remove() for hook in hooks]
    assert len(ran) == 2 * len(blocks)
    assert_same(found, expected, atol=1e-7)


def is_float8(module):
    return isinstance(module, Float8Linear) or (
        isinstance(module, nn.Linear) and module.weight.dtype == torch.float8_e4m3fn
    )


def test_base_in_float8(subject):
    """Linear layers of blocks have weights of one byte, values stay near, and what is trained gets gradients."""
    expected, gradients = subject.call().detach(), subject.gradients()
    if isinstance(subject.model, LatentRewardModel):
        subject.model.requires_grad_(False)
        store_in_float8(subject.model)
    else:
        store_base_in_float8(subject.network)
    blocks = [block for block in blocks_of(subject.network) if type(block).__name__.endswith("Block")]
    layers = {
        name: module
        for block in blocks
        for name, module in block.named_modules()
        if isinstance(module, (nn.Linear, Float8Linear)) and not any(part in name for part in KEPT)
    }
    assert layers and [name for name, module in layers.items() if not is_float8(module)] == []
    found = subject.call().detach()
    assert 0 < (found - expected).norm() < 0.2 * expected.norm()
    if not isinstance(subject.model, LatentRewardModel):
        trained = subject.gradients()
        assert trained.keys() == gradients.keys()
        assert all(trained[name].any() == gradient.any() for name, gradient in gradients.items())


@torch.no_grad()
def test_blocks_of_rewards_on_the_move(subject):
    """Each block is loaded for its own forward."""
    if not isinstance(subject.model, LatentRewardModel):
        pytest.skip("policies stay where they are")
    expected = subject.call()
    offload_blocks(subject.model, torch.device("cpu"))
    hooks = [block._diffusers_hook for block in blocks_of(subject.network) if hasattr(block, "_diffusers_hook")]
    assert len(hooks) >= len(blocks_of(subject.network))
    assert torch.equal(subject.call(), expected)
