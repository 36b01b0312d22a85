# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The fixture was made with the original, see `fixtures/make_hpsv3.py`."""

import re

import pytest
import torch
from safetensors.torch import save_file

from tapo_trl import get_reward
from tapo_trl.rewards.pretrained import reward_class

from .checks import check_scorer, pictures
from .fixtures import recipes
from .qwen import save_base


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with weights as HPSv3 ships them, a base model and an instruction, and what the original made of them."""
    facts, state, scores = recipes.read("hpsv3")
    folder = tmp_path_factory.mktemp("hpsv3")
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "HPSv3.safetensors")
    (folder / "instruction.txt").write_text(facts["instruction"], newline="")
    save_base(folder / "base", facts["config"])
    return folder, facts, scores


def load(folder, torch_dtype="float32", **kwargs):
    files = {"base_model": folder / "base", "instruction_file": folder / "instruction.txt"}
    return get_reward("hpsv3", weights=folder, torch_dtype=torch_dtype, **files, **kwargs)


def images_of(facts):
    return [recipes.as_pixels(recipes.picture(*size, seed))[None] for seed, size in enumerate(facts["pictures"])]


def test_scores_are_those_of_the_original(published):
    folder, facts, expected = published
    reward = load(folder)
    for image, prompt, size, (mu, sigma) in zip(
        images_of(facts), facts["prompts"], facts["pictures"], expected, strict=True
    ):
        tolerance = 2e-6 if size == [448, 448] else 0.005  # the original resizes 8-bit images
        torch.testing.assert_close(reward(image, [prompt])[0], mu, atol=tolerance, rtol=0)
        both = reward.rewards(image, [prompt])
        torch.testing.assert_close(both, torch.stack([mu, sigma])[None, None], atol=tolerance, rtol=0)
    assert expected[:, 0].std() > 0.01


def test_gradients_and_batches(published):
    folder, facts, _ = published
    check_scorer(load(folder), pictures(64, 80), facts["prompts"], atol=1e-5)


def test_positions_count_tokens(published, monkeypatch):
    """Not the M-RoPE of Qwen2-VL, which gives other scores."""
    folder, facts, expected = published
    reward = load(folder)
    language, seen = reward.model.language_model.forward, []
    monkeypatch.setattr(
        reward.model.language_model, "forward", lambda **inputs: seen.append(inputs) or language(**inputs)
    )
    reward(images_of(facts)[0], facts["prompts"][:1])
    positions = seen[0]["position_ids"]
    assert torch.equal(positions, torch.arange(positions.shape[2]).expand(3, 1, -1))


def test_half_precision_is_the_default(published):
    folder, facts, expected = published
    reward = load(folder, torch_dtype=None)
    assert reward.model.dtype is torch.bfloat16 and reward.head[0].weight.dtype is torch.float32
    found = reward(images_of(facts)[0], facts["prompts"][:1])
    assert 0 < (found[0] - expected[0, 0]).abs() < 0.05


@pytest.mark.parametrize("token", ["<|Reward|>", "<|image_pad|>"])
def test_special_tokens_in_a_prompt(published, token):
    message = rf"The prompt 'a {re.escape(token)} cat' has `{re.escape(token)}`, which the reward `hpsv3` adds itself"
    with pytest.raises(ValueError, match=message):
        load(published[0])(pictures(64, 64, 2), ["a cat", f"a {token} cat"])
    with pytest.raises(ValueError, match=message):
        reward_class("hpsv3").check_prompts(["a cat", f"a {token} cat"])


def test_an_instruction_without_its_token(published, tmp_path):
    (tmp_path / "own.txt").write_text("Rate {text_prompt}.")
    with pytest.raises(ValueError, match=r"must have `<\|Reward\|>` once: 'Rate {text_prompt}.'"):
        get_reward(
            "hpsv3", weights=published[0], base_model=published[0] / "base", instruction_file=tmp_path / "own.txt"
        )


def test_without_an_instruction(published, monkeypatch, tmp_path):
    monkeypatch.setattr("tapo_trl.files.HF_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"`tapo-trl rewards --prepare hpsv3`, or pass `instruction_file=`"):
        get_reward("hpsv3", weights=published[0], base_model=published[0] / "base")
