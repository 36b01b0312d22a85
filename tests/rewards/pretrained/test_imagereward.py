# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The fixture was made with the original, see `fixtures/make_imagereward.py`."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tapo_trl import get_reward
from tapo_trl.rewards.pretrained.preprocessing import CLIP_MEAN, CLIP_STD

from .checks import check_scorer, pictures
from .fixtures import recipes


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with weights as ImageReward ships them and a tokenizer, and what the original made of them."""
    facts, state, scores = recipes.read("imagereward")
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(facts["config"]))
    (folder / "tokenizer").mkdir()
    recipes.save_bert_tokenizer(folder / "tokenizer")
    return folder, facts, scores


def load(folder, **kwargs):
    return get_reward("imagereward", weights=folder, tokenizer=folder / "tokenizer", **kwargs)


def test_scores_are_those_of_the_original(published):
    folder, facts, expected = published
    reward = load(folder)
    for seed, (prompt, size) in enumerate(zip(facts["prompts"], facts["pictures"], strict=True)):
        image = recipes.as_pixels(recipes.picture(*size, seed))[None]
        tolerance = 2e-6 if size == [32, 32] else 0.005  # the original resizes 8-bit images
        torch.testing.assert_close(reward(image, [prompt])[0], expected[seed], atol=tolerance, rtol=0)
    assert expected.std() > 0.1


def test_tokens_are_those_of_the_original(published):
    folder, facts, _ = published
    reward = load(folder)
    assert len(facts["tokens"]) == 10
    for text, expected in facts["tokens"].items():
        assert reward.tokenize([text]).input_ids[0].tolist() == expected, text


def test_gradients_and_batches(published):
    folder, facts, _ = published
    check_scorer(load(folder), pictures(40, 50), facts["prompts"][:3])


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (45, 60), (101, 70), (33, 35)])
def test_pixels_are_those_of_pil(published, size):
    reward, array = load(published[0]), recipes.picture(*size, 3)
    shorter = min(size)
    width, height = (int(32 * side / shorter) for side in reversed(size))
    resized = np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC))
    top, left = (round((side - 32) / 2) for side in (height, width))
    expected = torch.from_numpy(resized[top : top + 32, left : left + 32].copy()).movedim(-1, 0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    found = reward.pixel_values(recipes.as_pixels(array)[None])[0] * std + mean
    assert (255 * found - expected).abs().max() <= 2


def test_half_precision(published):
    folder, facts, _ = published
    reward, images = load(folder, torch_dtype="bfloat16"), pictures(32, 32)
    assert reward.vision.dtype is torch.bfloat16 and reward.text.dtype is torch.bfloat16
    assert reward.head[0].weight.dtype is torch.float32
    found, expected = reward(images, facts["prompts"][:3]), load(folder)(images, facts["prompts"][:3])
    assert 0 < (found - expected).abs().max() < 0.05


def test_other_weights(published, tmp_path):
    folder, facts, _ = published
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    (tmp_path / "med_config.json").write_text(json.dumps(facts["config"]))
    missing = "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight"
    torch.save({name: tensor for name, tensor in state.items() if name != missing}, tmp_path / "ImageReward.pt")
    with pytest.raises(
        ValueError, match=r"no checkpoint of this scorer: [^;]*encoder.layer.0.crossattention.self.key"
    ):
        get_reward("imagereward", weights=tmp_path, tokenizer=folder / "tokenizer")
