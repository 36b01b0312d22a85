# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
The fixture was made with the original's evaluation script and modules (Kwai-Kolors/MPS, commit be9027f, which is no package) in
transformers 4.45.2 and float32, with three thresholds: weights by `recipes.filled`, image by image.
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from tapo_trl import get_reward
from tapo_trl.policies.tiny import tiny_clip_tokenizer
from tapo_trl.rewards.pretrained.mps import CONDITION

from .checks import check_scorer, pictures
from .fixtures import recipes


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with weights and a base model, and what the original made of them."""
    facts, state, scores = recipes.read("mps")
    folder = tmp_path_factory.mktemp("mps")
    state["model.logit_scale"] = torch.tensor(facts["logit_scale"])
    save_file({f"mps.{name}": tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors")
    torch.save(state, folder / "MPS_overall.pth")
    tiny_clip_tokenizer(16).save_pretrained(folder / "base")
    (folder / "base" / "config.json").write_text(json.dumps(facts["config"]))
    return folder, facts, scores


def load(folder, weights=None, **kwargs):
    options = {"base_model": folder / "base", "condition": "color, shape"} | kwargs
    return get_reward("mps", weights=weights or folder, **options)


def images_of(facts):
    return [recipes.as_pixels(recipes.picture(*size, seed))[None] for seed, size in enumerate(facts["pictures"])]


@pytest.mark.parametrize("row", [0, 1, 2])
def test_scores_are_those_of_the_original(published, row):
    folder, facts, scores = published
    reward = load(folder, threshold=facts["thresholds"][row])
    for image, prompt, size, score in zip(
        images_of(facts), facts["prompts"], facts["pictures"], scores[row], strict=True
    ):
        tolerance = 1e-5 if size == [24, 24] else 0.02  # the original resizes 8-bit images
        torch.testing.assert_close(reward(image, [prompt])[0], score, atol=tolerance, rtol=0)
    assert scores[row].std() > 0.1


def test_thresholds_matter(published):
    _, facts, scores = published
    assert facts["thresholds"] == [0.3, 0.01, 0.8]
    assert (scores[0] - scores[2]).abs().max() > 0.01
    assert load(published[0]).threshold == 0.01


def test_weights_of_a_state_dict(published):
    folder, facts, scores = published
    reward = load(folder, folder / "MPS_overall.pth", threshold=0.3)
    torch.testing.assert_close(reward(images_of(facts)[0], facts["prompts"][:1])[0], scores[0, 0], atol=1e-5, rtol=0)


def test_gradients_and_batches(published):
    """Each prompt has its own largest similarity: the original's batch would share one."""
    folder, facts, _ = published
    check_scorer(load(folder, threshold=0.8), pictures(30, 24), facts["prompts"][:3])


def test_condition(published):
    folder, facts, _ = published
    image, prompt = images_of(facts)[1], facts["prompts"][1:2]
    found = [load(folder, condition=condition, threshold=0.6)(image, prompt) for condition in ("color, shape", "fast")]
    assert (found[0] - found[1]).abs() > 1e-4
    assert len(CONDITION.split(", ")) == 22


def test_half_precision(published):
    folder, facts, scores = published
    reward = load(folder, torch_dtype="bfloat16", threshold=0.3)
    assert reward.cross[0]["attention"].query.weight.dtype is torch.bfloat16
    assert reward.clip.logit_scale.dtype is torch.float32
    assert 0 < (reward(images_of(facts)[0], facts["prompts"][:1])[0] - scores[0, 0]).abs() < 0.3
