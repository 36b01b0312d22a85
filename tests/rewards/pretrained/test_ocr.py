# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import builtins

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from tapo_trl import get_reward
from tapo_trl.rewards.pretrained.ocr import edit_distance, quoted_text, text_score


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("same", "same", 0)],
)
def test_edit_distance(first, second, distance):
    assert edit_distance(first, second) == edit_distance(second, first) == distance


@pytest.mark.parametrize(
    ("read", "score"),
    [
        ("hello", 1.0),
        ("HEL LO", 1.0),
        ("say hello twice", 1.0),
        ("hallo", 0.8),
        ("helo", 0.8),
        ("", 0.0),
        ("something else entirely", 0.0),
    ],
)
def test_text_score(read, score):
    assert text_score(read, "He llo") == pytest.approx(score)


class TestPrompts:
    def test_quoted_text(self):
        assert quoted_text('a sign "Open 24" beside "Closed"') == "Open 24"

    @pytest.mark.parametrize("prompt", ["a sign", 'a "sign', 'a "" sign', 'a "  " sign', "a “sign”"])
    def test_no_text(self, prompt):
        with pytest.raises(ValueError, match="between straight quotes, but the prompt .* has none: write it as in"):
            quoted_text(prompt)

    def test_checked_before_pictures_are_read(self, ocr):
        ocr.check_prompts(['"a"'])
        for call in (lambda: ocr.check_prompts(['"a"', "b"]), lambda: ocr(torch.rand(1, 3, 32, 32), ["b"])):
            with pytest.raises(ValueError, match="prompt 'b' has none"):
                call()


def draw(text, size=(320, 96)):
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).text((20, 16), text, fill=(20, 20, 120), font=ImageFont.load_default(48))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


@pytest.fixture(scope="module")
def ocr():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    return get_reward("ocr", detector_side=128)


class TestReading:
    """With the real models, which come with RapidOCR's wheel."""

    def test_words(self, ocr):
        pictures = torch.stack([draw(text) for text in ("Hello", "Hallo", "")])
        scores = ocr(pictures, ['a card "Hello"'] * 3)
        torch.testing.assert_close(scores, torch.tensor([1.0, 0.8, 0.0]))

    def test_one_line(self, ocr):
        line = get_reward("ocr", detect=False)
        assert line(draw("Hello")[None], ['"Hello"']).item() == 1.0
        assert line(draw("Hxllo")[None], ['"Hello"']).item() < 1.0

    def test_one_line_is_read_at_its_own_width(self, ocr):
        """RapidOCR pads lines to 320 / 48 of their height, which takes twice the time and changes no score."""
        reward = get_reward("ocr", detect=False)
        words = ["milk", "stone", "sea", "garden", "no"]
        images = torch.stack([draw(word) for word in words])
        prompts = [f'"{word}"' for word in [*words[1:], "milk"]]
        scores = reward(images, prompts)
        assert reward.engine.text_rec.rec_image_shape == [3, 48, 48]
        reward.engine.text_rec.rec_image_shape = [3, 48, 320]
        assert torch.equal(scores, reward(images, prompts))

    def test_several_lines(self, ocr):
        picture = torch.cat([draw("good"), draw("night")], dim=1)
        assert ocr(picture[None], ['"good night"']).item() == 1.0

    def test_videos(self, ocr):
        video = torch.stack([draw("Hello"), draw("")], dim=1)
        assert ocr(video[None], ['"Hello"']).item() == 0.5

    def test_pixels_that_are_not_finite(self, ocr):
        picture = draw("Hello")
        picture[0, 0, 0] = torch.inf
        assert ocr(picture[None], ['"Hello"']).isnan().all()

    def test_weights(self, ocr):
        with pytest.raises(ValueError, match="`ocr` has no weights on the Hub"):
            get_reward("ocr", weights="me/ocr")


def test_without_rapidocr(monkeypatch):
    plain = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "rapidocr":
            raise ImportError("No module named 'rapidocr'")
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install rapidocr onnxruntime"):
        get_reward("ocr")
