# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
import torch.nn.functional as F

from tapo_trl import get_reward
from tapo_trl.rewards.pretrained.hpsv2 import clean_text, clip_from_open_clip
from tapo_trl.rewards.pretrained.preprocessing import CLIP_MEAN, CLIP_STD

from .reference import OpenCLIP, byte_tokenizer


PROMPTS = ["a cat", "“a” dog", "a cat"]
HEADS = (4, 2)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with weights as HPSv2 ships them, a tokenizer, and the model itself."""
    torch.manual_seed(0)
    root, tokenizer = tmp_path_factory.mktemp("hpsv2"), byte_tokenizer()
    model = OpenCLIP(len(tokenizer)).eval()
    torch.save({"state_dict": model.state_dict()}, root / "HPS_v2.1_compressed.pt")
    tokenizer.save_pretrained(root / "tokenizer")
    return root, model


def load(root, **kwargs):
    return get_reward("hpsv2.1", weights=root, tokenizer=root / "tokenizer", heads=HEADS, **kwargs)


def make_images(size=(48, 30), number=3):
    return torch.rand(number, 3, *size, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def expected_scores(model, images, prompts):
    """HPSv2's own steps: longest side to 24, black bars, normalise; cosine."""
    height, width = (round(side * 24 / max(images.shape[-2:])) for side in images.shape[-2:])
    pixels = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
    vertical, horizontal = 24 - height, 24 - width
    bars = (horizontal // 2, horizontal - horizontal // 2, vertical // 2, vertical - vertical // 2)
    pixels = F.pad(pixels, bars)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    tokens = torch.zeros(len(prompts), 16, dtype=torch.long)  # open_clip pads with 0
    for row, prompt in zip(tokens, prompts, strict=True):
        ids = torch.tensor(byte_tokenizer()(prompt).input_ids)[:16]
        row[: len(ids)] = ids
    return 100 * (model.encode_image((pixels - mean) / std) * model.encode_text(tokens)).sum(1)


@pytest.mark.parametrize("size", [(24, 24), (48, 48), (48, 30), (25, 40), (16, 9)])
def test_is_that_of_open_clip(published, size):
    root, model = published
    images = make_images(size)
    expected = expected_scores(model, images, ["a cat", '"a" dog', "a cat"])
    assert expected.std() > 1
    torch.testing.assert_close(load(root)(images, PROMPTS), expected, atol=1e-4, rtol=1e-5)


def test_features_of_converted_weights(published):
    _, model = published
    clip = clip_from_open_clip(model.state_dict(), "x", *HEADS).eval()
    pixels, tokens = torch.randn(2, 3, 24, 24), torch.randint(1, 500, (2, 16))
    tokens[:, 9] = 513
    with torch.no_grad():
        image = F.normalize(clip.get_image_features(pixel_values=pixels, return_dict=True).pooler_output, dim=-1)
        text = F.normalize(clip.get_text_features(input_ids=tokens, return_dict=True).pooler_output, dim=-1)
        torch.testing.assert_close(image, model.encode_image(pixels), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(text, model.encode_text(tokens), atol=1e-6, rtol=1e-5)
    assert clip.logit_scale == model.logit_scale


def test_other_weights(published):
    _, model = published
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "visual.ln_pre.bias"}
    with pytest.raises(
        ValueError, match="`x` is no checkpoint of this scorer: vision_model.pre_layrnorm.bias is missing"
    ):
        clip_from_open_clip(state, "x", *HEADS)
    with pytest.raises(
        ValueError, match="`x` is no CLIP in open_clip's layout: the key 'visual.conv1.weight' is missing"
    ):
        clip_from_open_clip({"logit_scale": torch.ones(())}, "x", *HEADS)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("“quoted” text", '"quoted" text'),
        ("it’s", "it's"),
        ("salt &amp; pepper", "salt & pepper"),
        ("&amp;lt;tag&amp;gt;", "<tag>"),
        ("full，width！", "full,width!"),
        ("ﬁre and ﬂame", "fire and flame"),
        ("caf\u0065\u0301", "café"),
        ("schÃ¶n", "schön"),
        ("  two \n spaces ", "two spaces"),
        ("wait…", "wait…"),
        ("&#39;a&#39;", "'a'"),
        ("plain", "plain"),
    ],
)
def test_prompts_are_cleaned_as_by_open_clip(published, text, clean):
    root, _ = published
    assert clean_text(text) == clean
    reward = load(root)
    expected = byte_tokenizer()([clean], padding="max_length", max_length=16, truncation=True).input_ids
    assert reward.tokenize([text]).tolist() == expected


def test_gradients_and_batches(published):
    root, _ = published
    reward, images = load(root, batch_size=2), make_images().requires_grad_()
    scores = reward.score(images, PROMPTS)
    scores.sum().backward()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()
    torch.testing.assert_close(scores.detach(), reward(images.detach(), PROMPTS), atol=1e-4, rtol=1e-5)
