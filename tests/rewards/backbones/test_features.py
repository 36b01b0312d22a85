# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""The first blocks of a transformer compute what they compute in the whole one, and are all that runs."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tapo_trl.policies import SD3Policy, load_policy
from tapo_trl.policies.base import cast_inputs
from tapo_trl.policies.loading import FAMILIES, family_of_transformer
from tapo_trl.rewards import DiNaModel, LRMModel
from tapo_trl.rewards.backbones.features import check_layers, proportional_layers
from tapo_trl.rewards.backbones.sd3 import SD3FeatureTransformer2DModel
from tapo_trl.rewards.backbones.wan import WanFeatureTransformer3DModel
from tests.testing_utils import tiny_sd3_pipeline


PROMPTS = ["red cat", "a blue dog"]
IMAGE_TOKENS = 8
SIX_BLOCKS = {
    "StableDiffusion3Pipeline": {"num_layers": 6},
    "FluxPipeline": {"num_layers": 2, "num_single_layers": 4},
    "Flux2KleinPipeline": {"num_layers": 2, "num_single_layers": 4},
    "QwenImagePipeline": {"num_layers": 6},
    "QwenImage21Pipeline": {"num_layers": 6},
    "ZImagePipeline": {"n_layers": 6},
    "WanPipeline": {"num_layers": 6},
    "HunyuanVideoPipeline": {"num_layers": 2, "num_single_layers": 4},
    "HunyuanVideo15Pipeline": {"num_layers": 6},
}


def blocks_of(transformer) -> list[nn.Module]:
    names = family_of_transformer(type(transformer).__name__).backbone_class("features").blocks_names
    return [block for name in names for block in getattr(transformer, name)]


def expected_features(family, output, transformer, arguments):
    """Visual and text tokens in what a block of the family returns."""
    if family.feature_class is WanFeatureTransformer3DModel:
        return output, transformer.condition_embedder.text_embedder(arguments["encoder_hidden_states"])
    if "HunyuanVideo" in family.pipeline:
        return output
    if isinstance(output, tuple):
        return output[1], output[0]
    if family.pipeline == "ZImagePipeline":  # the image up to 32 tokens, and prompts behind it
        rows = [output[i, 32 : 32 + len(tokens)] for i, tokens in enumerate(arguments["cap_feats"])]
        return output[:, :IMAGE_TOKENS], nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return output[:, -IMAGE_TOKENS:], output[:, :-IMAGE_TOKENS]


@pytest.fixture(params=SIX_BLOCKS)
def family(request):
    """A family's feature class, a policy, and the arguments of its transformer."""
    family = next(family for family in FAMILIES if family.pipeline == request.param)
    policy = load_policy(family.policy_class.tiny(**SIX_BLOCKS[request.param]))
    shape = policy.latent_shape(32, 64, 5 if policy.modality == "video" else None)
    torch.manual_seed(1)
    prompts, latents = policy.encode_prompts(PROMPTS, 16), torch.randn(2, *shape)
    inputs = policy.model_inputs(policy.transformer.config, latents, torch.tensor([0.3, 0.8]), prompts)
    return SimpleNamespace(
        pipeline=family.pipeline,
        feature_class=family.backbone_class("features"),
        policy=policy,
        transformer=policy.transformer,
        arguments=cast_inputs(inputs, torch.float32),
        latents=latents,
        prompts=prompts,
    )


@torch.no_grad()
def test_features_are_those_of_the_whole_transformer(family):
    transformer, arguments, seen, layers = family.transformer, family.arguments, {}, [1, 3, 4]
    for number, block in enumerate(blocks_of(transformer), start=1):
        block.register_forward_hook(lambda module, args, output, number=number: seen.update({number: output}))
    transformer(**arguments)
    model = family.feature_class.from_base(transformer, layers).eval()
    features = model(**arguments)
    assert len(features.visual) == len(features.text) == 3 and len(seen) == 6
    for number, visual, text in zip(layers, features.visual, features.text, strict=True):
        expected = expected_features(family, seen[number], transformer, arguments)
        if family.pipeline == "HunyuanVideo15Pipeline":  # whose transformer moves the tokens that count to the front
            torch.testing.assert_close(visual, expected[0], rtol=0, atol=2e-6)
            rows = zip(text, features.text_mask, expected[1], strict=True)
            for own, mask, tokens in rows:
                torch.testing.assert_close(own[mask], tokens[: mask.sum()], rtol=0, atol=2e-6)
        else:
            assert torch.equal(visual, expected[0]) and torch.equal(text, expected[1])
        assert visual.shape[2] == text.shape[2] == model.feature_dim
    assert features.time.shape == (2, model.time_dim)
    if features.text_mask is not None:
        assert features.text_mask.sum(1).tolist() == family.prompts.tensors["prompt_embeds_mask"].sum(1).tolist()
        assert features.text_mask.shape == features.text[0].shape[:2]


@torch.no_grad()
def test_the_score_does_not_depend_on_batch_mates(family):
    """Padding of the shorter prompt must not count."""
    torch.manual_seed(2)
    model = DiNaModel.from_policy(family.policy, layers=[2, 4], max_sequence_length=16)
    sigma = torch.tensor([0.3, 0.8])
    both = model.score(family.latents, sigma, **family.prompts.tensors)
    alone = [model.score(family.latents[[i]], sigma[[i]], **family.prompts[[i]].tensors) for i in range(2)]
    torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=2e-6)
    other = model.score(family.latents.flip(0), sigma, **family.prompts.tensors)
    assert (both - other).abs().min() > 1e-5


def test_the_default_layers_count_all_blocks(family):
    assert DiNaModel.without_weights(family.policy).config.layers == [1, 2, 3]


def test_lrm_needs_a_pooled_prompt(family):
    if family.prompts.pooled_prompt_embeds is None or family.pipeline == "HunyuanVideoPipeline":
        with pytest.raises(ValueError, match="pooled prompt embeddings"):
            LRMModel.from_policy(family.policy)
        return
    model = LRMModel.from_policy(family.policy, max_sequence_length=16)
    assert model.config.layer == 4  # three quarters, to the even number
    score = model.score(family.latents, torch.tensor([0.3, 0.8]), **family.prompts.tensors)
    score.sum().backward()
    assert score.shape == (2,) and model.head.visual_projection.weight.grad.abs().max() > 0


@torch.no_grad()
def test_blocks_behind_the_last_tapped_one_neither_run_nor_take_memory(family):
    transformer = family.transformer
    model = family.feature_class.from_base(transformer, [2, 3])
    ran = []
    for block in model.block_list:
        block.register_forward_hook(lambda module, args, output: ran.append(module))
    model(**family.arguments)
    assert len(ran) == len(model.block_list) == 3
    left_out = sum(p.numel() for block in blocks_of(transformer)[3:] for p in block.parameters())
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in transformer.parameters()) - left_out


def test_is_a_copy(family):
    transformer = family.transformer
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    model = family.feature_class.from_base(transformer, [2])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in transformer.state_dict().items())


def test_recomputed_activations_give_the_same_gradients(family):
    gradients = []
    for checkpointing in (False, True):
        model = family.feature_class.from_base(family.transformer, [1, 3]).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        sum(tokens.square().sum() for tokens in model(**family.arguments).visual).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 20
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_adapters_must_be_merged_first(family):
    from peft import LoraConfig

    family.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="merge or detach its adapters first"):
        family.feature_class.from_base(family.transformer, [2])


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
