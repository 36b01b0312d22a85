# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import re
from pathlib import Path

import diffusers
import pytest
import torch

import tapo_trl
from tapo_trl.data import PromptCache
from tapo_trl.policies import FAMILIES, FlowPolicy, PromptEmbeddings, load_policy
from tapo_trl.policies.loading import base_license, family_of, family_of_transformer, known_pipelines
from tapo_trl.rewards.backbones.features import FeatureTransformerMixin
from tapo_trl.rewards.backbones.score_stream import ScoreTransformerMixin


FAMILY_CLASS = re.compile(
    r"\b(SD3|Wan|StableDiffusion3|Flux2?|QwenImage|ZImage|HunyuanVideo|AutoencoderKL|JointTransformer)[A-Z]\w+"
)
OWNERS = ("policies/", "rewards/backbones/")
LONG = '"' + "cat " * 100 + '"'  # HunyuanVideo-1.5 reads what is quoted once more


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.pipeline)
class TestTable:
    def test_names_are_classes(self, family):
        policy_class = family.policy_class
        assert issubclass(policy_class, FlowPolicy)
        assert issubclass(family.backbone_class("score"), ScoreTransformerMixin)
        assert family.features is None or issubclass(family.backbone_class("features"), FeatureTransformerMixin)
        transformer_class = getattr(diffusers, family.transformer)
        for kind in ("score", "features")[: 1 if family.features is None else 2]:
            assert family.backbone_class(kind).base_class is transformer_class
        first = family_of_transformer(family.transformer)
        assert (first.transformer, first.score, first.features) == (family.transformer, family.score, family.features)

    def test_tiny_pipelines(self, family):
        policy = load_policy(family.policy_class.tiny())
        assert type(policy) is family.policy_class and family_of(policy.pipeline) is family
        assert type(policy.transformer).__name__ == family.transformer
        other, same = family.policy_class.tiny(seed=1), family.policy_class.tiny()
        weights = [next(p.transformer.parameters()) for p in (policy.pipeline, same, other)]
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])

    def test_defaults_are_a_size_that_the_model_makes(self, family):
        policy = load_policy(family.policy_class.tiny())
        defaults = policy.defaults
        shape = policy.latent_shape(defaults.height, defaults.width, defaults.num_frames)
        assert (policy.modality == "video") == (defaults.num_frames is not None) == (len(shape) == 4)
        is_off = defaults.guidance_scale == policy.guidance_off  # Qwen-Image-2.1 is meant to be used without guidance
        assert policy.is_guided(defaults.guidance_scale) or policy.guidance != "classifier_free" or is_off

    def test_tokens_are_those_of_the_network(self, family):
        policy = load_policy(family.policy_class.tiny())
        shape = policy.latent_shape(32, 32, 5 if policy.modality == "video" else None)
        seen = []
        block = next(
            m
            for m in policy.transformer.modules()
            if type(m).__name__ in policy.transformer._no_split_modules and "Block" in type(m).__name__
        )
        block.register_forward_pre_hook(
            lambda module, args, kwargs: seen.extend(
                x.shape[1] for x in (*args, *kwargs.values()) if torch.is_tensor(x) and x.ndim > 1
            ),
            with_kwargs=True,
        )
        policy.velocity(policy.transformer, torch.zeros(1, *shape), 0.5, policy.encode_prompts([LONG], 3))
        visual, text = policy.num_tokens(shape, 3)
        if family.pipeline == "ZImagePipeline":  # whose first block has the image alone, in multiples of 32
            assert seen[0] == 32 and (visual, text) == (4, 3)
        elif family.pipeline == "QwenImage21Pipeline":  # which has one stream
            assert seen[0] == visual + text
        else:
            assert tuple(seen[:2]) == (visual, text)

    def test_shapes_of_prompts(self, family):
        """Of prompts of the full length, which need no mask."""
        policy = load_policy(family.policy_class.tiny())
        (row,) = policy.encode_prompts([LONG], 3).rows()
        shapes = {name: tuple(tensor.shape) for name, tensor in row.items() if not name.endswith("_mask")}
        assert shapes == policy.prompt_shapes(3)

    def test_known_configurations_are_those_of_the_classes(self, family):
        for repository, components in family.policy_class.known_configs.items():
            assert known_pipelines()[repository] == (family.pipeline, components)
            assert base_license(repository) is not None
            for class_name, config in components.values():
                names = getattr(diffusers, class_name).load_config.__self__._get_init_keys(
                    getattr(diffusers, class_name)
                )
                assert set(config) <= names


def test_licenses():
    assert base_license("stabilityai/stable-diffusion-3.5-large") == ("other", "stabilityai-ai-community")
    assert base_license("Wan-AI/Wan2.1-T2V-14B-Diffusers") == ("apache-2.0", None)
    assert base_license("black-forest-labs/FLUX.1-dev") == ("other", "flux-1-dev-non-commercial-license")
    assert base_license("black-forest-labs/FLUX.2-klein-base-4B") == ("apache-2.0", None)
    assert base_license("black-forest-labs/FLUX.2-klein-base-9B") == ("other", "flux-non-commercial-license")
    assert base_license("black-forest-labs/FLUX.2-dev") == ("other", "flux-dev-non-commercial-license")
    assert base_license("Qwen/Qwen-Image") == ("apache-2.0", None)
    assert base_license("Qwen/Qwen-Image-2.1") == ("other", "qwen-research")
    assert base_license("someone/else") is None


def test_nobody_else_names_a_family():
    root = Path(tapo_trl.__file__).parent
    files = {str(path.relative_to(root)) for path in root.rglob("*.py") if FAMILY_CLASS.search(path.read_text())}
    assert [file for file in files if not file.startswith(OWNERS)] == []


class Masked:
    """Encodes each word as a token of its length, and a mask."""

    def encode_prompts(self, prompts, max_sequence_length=None):
        words = [torch.tensor([[float(len(word))] for word in prompt.split(" ")]) for prompt in prompts]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(w)) for w in words], batch_first=True)
        return PromptEmbeddings(torch.nn.utils.rnn.pad_sequence(words, batch_first=True), prompt_embeds_mask=mask)


def test_cached_prompts_keep_their_own_length(tiny_sd3_policy, tmp_path, monkeypatch):
    """A zero row of a masked sequence may be a token, such as the last one of `"red "`."""
    cache = PromptCache(tiny_sd3_policy, tmp_path)
    monkeypatch.setattr(cache, "policy", Masked())
    prompts = ["a red fox", "red ", "owl"]
    cache.encode(prompts)
    embeds = cache.load(prompts)
    assert embeds.prompt_embeds[..., 0].tolist() == [[1, 3, 3], [3, 0, 0], [3, 0, 0]]
    assert embeds.tensors["prompt_embeds_mask"].sum(1).tolist() == [3, 2, 1]
    assert cache.load(["owl"]).prompt_embeds.shape == (1, 1, 1)
