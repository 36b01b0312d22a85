# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""The first blocks of a transformer compute what they compute in the whole one, and are all that runs."""

import pytest
import torch
from torch import nn

from tapo_trl.policies import SD3Policy, WanPolicy
from tapo_trl.rewards.backbones.features import check_layers, proportional_layers
from tapo_trl.rewards.backbones.sd3 import SD3FeatureTransformer2DModel
from tapo_trl.rewards.backbones.wan import WanFeatureTransformer3DModel
from tests.testing_utils import tiny_sd3_pipeline, tiny_wan_pipeline


FAMILIES = {
    "sd3": (SD3FeatureTransformer2DModel, lambda: SD3Policy(tiny_sd3_pipeline(num_layers=6)), (4, 8, 8)),
    "wan": (WanFeatureTransformer3DModel, lambda: WanPolicy(tiny_wan_pipeline(num_layers=6)), (4, 2, 4, 4)),
}


def blocks_of(transformer) -> nn.ModuleList:
    return next(module for module in transformer.children() if isinstance(module, nn.ModuleList))


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    """The class, a policy, and the arguments of its transformer."""
    feature_class, make_policy, shape = FAMILIES[request.param]
    policy = make_policy()
    generator = torch.Generator().manual_seed(1)
    embeds = policy.encode_prompts(["cat", "dog"], 16)
    arguments = {
        "hidden_states": torch.randn(2, *shape, generator=generator),
        "timestep": torch.tensor([300.0, 800.0]),
        "encoder_hidden_states": embeds.prompt_embeds,
    }
    if embeds.pooled_prompt_embeds is not None:
        arguments["pooled_projections"] = embeds.pooled_prompt_embeds
    return feature_class, policy.transformer, arguments


@torch.no_grad()
def test_features_are_those_of_the_whole_transformer(family):
    feature_class, transformer, arguments = family
    seen, layers = {}, [1, 3, 4]
    for number, block in enumerate(blocks_of(transformer), start=1):
        block.register_forward_hook(lambda module, args, output, number=number: seen.update({number: output}))
    transformer(**arguments)
    features = feature_class.from_base(transformer, layers).eval()(**arguments)
    assert len(features.visual) == len(features.text) == 3 and len(seen) == 6
    for number, visual, text in zip(layers, features.visual, features.text, strict=True):
        if feature_class is SD3FeatureTransformer2DModel:
            assert torch.equal(text, seen[number][0]) and torch.equal(visual, seen[number][1])
        else:
            assert torch.equal(visual, seen[number])
            embedded = transformer.condition_embedder.text_embedder(arguments["encoder_hidden_states"])
            assert torch.equal(text, embedded)
    assert features.time.shape == (2, features.visual[0].shape[2])


@torch.no_grad()
def test_blocks_behind_the_last_tapped_one_neither_run_nor_take_memory(family):
    feature_class, transformer, arguments = family
    model = feature_class.from_base(transformer, [2, 3])
    ran = []
    for block in blocks_of(model):
        block.register_forward_hook(lambda module, args, output: ran.append(module))
    model(**arguments)
    assert len(ran) == len(blocks_of(model)) == 3
    left_out = sum(p.numel() for block in blocks_of(transformer)[3:] for p in block.parameters())
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in transformer.parameters()) - left_out


def test_is_a_copy(family):
    feature_class, transformer, _ = family
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    model = feature_class.from_base(transformer, [2])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in transformer.state_dict().items())


def test_recomputed_activations_give_the_same_gradients(family):
    feature_class, transformer, arguments = family
    gradients = []
    for checkpointing in (False, True):
        model = feature_class.from_base(transformer, [1, 3]).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        sum(tokens.square().sum() for tokens in model(**arguments).visual).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 20
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_adapters_must_be_merged_first(family):
    from peft import LoraConfig

    feature_class, transformer, _ = family
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="merge or detach its adapters first"):
        feature_class.from_base(transformer, [2])


def test_after_the_last_block_sd3_has_no_text():
    policy = SD3Policy(tiny_sd3_pipeline())
    embeds = policy.encode_prompts(["cat"], 16)
    model = SD3FeatureTransformer2DModel.from_base(policy.transformer, [2, 3])
    with torch.no_grad():
        features = model(
            torch.randn(1, 4, 8, 8), torch.tensor([300.0]), embeds.prompt_embeds, embeds.pooled_prompt_embeds
        )
    assert features.text[0] is not None and features.text[1] is None
    assert SD3FeatureTransformer2DModel.last_layer_with_text(3) == 2


@pytest.mark.parametrize("layers", [[], [0, 1], [2, 1], [1, 1], [3, 7]])
def test_layers_that_are_not_there(layers):
    with pytest.raises(
        ValueError, match=r"`layers` must be blocks of the transformer, 1 to 6 in ascending order, got"
    ):
        check_layers(layers, 6, "layers")


def test_proportional_layers():
    assert proportional_layers([1 / 6, 1 / 3, 1 / 2], 24) == [4, 8, 12]
    assert proportional_layers([1 / 6, 1 / 3, 1 / 2], 30) == [5, 10, 15]
    assert proportional_layers([0.75], 24) == [18]
    assert proportional_layers([1 / 6, 1 / 3, 1 / 2], 2) == [1]
