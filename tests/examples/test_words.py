# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tapo_trl import get_reward, load_policy
from tapo_trl.policies.sampling import generate_samples


FOLDER = Path(__file__).parents[2] / "examples" / "words"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("words", "report"):
        sys.modules.pop(name, None)
    import report
    import words

    yield words, report
    for name in ("words", "report"):
        sys.modules.pop(name, None)


def test_splits_share_no_word(modules):
    words, _ = modules
    splits = [set(words.read_words(split)) for split in ("train", "validation", "test")]
    assert sum(map(len, splits)) == len(set().union(*splits)) > 250
    assert all(3 <= len(word) <= 5 and word.isalpha() and word.islower() for split in splits for word in split)


def test_a_misspelled_word_has_its_length_and_another_spelling(modules):
    words, _ = modules
    rng = random.Random(0)
    for word in words.read_words("train"):
        wrong = words.misspell(word, rng)
        assert wrong != word and len(wrong) == len(word)


def draw(policy, words, prompts, seed):
    return generate_samples(
        policy,
        policy.transformer,
        prompts,
        lambda batch: policy.encode_prompts(batch, 1),
        "",
        latent_shape=policy.latent_shape(words.HEIGHT, words.WIDTH),
        num_inference_steps=12,
        guidance_scale=1.0,
        seed=seed,
        batch_size=32,
    )


def test_the_pipeline_spells_some_words_and_not_others(modules):
    pytest.importorskip("rapidocr")
    words, _ = modules
    prompts = [words.prompt_of(word) for word in words.read_words("test")]
    images = draw(load_policy(str(FOLDER / "pipeline")), words, prompts, 0)
    rewards = get_reward("ocr", detect=False)(images, prompts)
    right, others = (rewards == 1).float().mean(), get_reward("ocr", detect=False)(images, prompts[::-1])
    assert 0.1 < right < 0.9 and rewards.mean() > others.mean() + 0.2


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="Tesseract is not installed")
def test_the_judge_reads_what_is_written(modules):
    words, report = modules
    known = words.read_words("test")[:8]
    fonts = Path("/usr/share/fonts/truetype")
    if not all((fonts / font).exists() for font in words.FONTS):
        pytest.skip("the fonts are not installed")
    images = words.to_tensor([words.render(word, words.FONTS[0], words.INKS[0]) for word in known])
    found = report.measure(images, known)
    assert found["right (RapidOCR)"] == 1 and found["right (Tesseract)"] > 0.7
    blurred = words.to_tensor([words.render(word, words.FONTS[0], words.INKS[0], blur=2.0) for word in known])
    assert report.sharpness(blurred) < 0.5 * found["sharpness"]
    assert report.measure(torch.ones_like(images), known)["right (Tesseract)"] == 0
    prompts = [words.prompt_of(word) for word in known]
    assert report.tesseract_reward(images, prompts).mean() > 0.8
    assert report.tesseract_reward(torch.ones_like(images), prompts).mean() < 0.2
