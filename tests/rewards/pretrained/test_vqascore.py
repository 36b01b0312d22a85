# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The fixture was made with the original, see `fixtures/make_vqascore.py`."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tapo_trl import get_reward
from tapo_trl.rewards.pretrained.preprocessing import CLIP_MEAN, CLIP_STD
from tapo_trl.rewards.pretrained.vqascore import BACKGROUND, check_question

from .checks import check_scorer, pictures
from .fixtures import recipes


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with a CLIP-FlanT5 in two files, the configuration of a CLIP and a tokenizer, and what the original made of them."""
    facts, state, scores = recipes.read("vqascore")
    folder = tmp_path_factory.mktemp("vqascore")
    names = sorted(state)
    for part, chosen in enumerate((names[::2], names[1::2])):
        torch.save({name: state[name] for name in chosen}, folder / f"pytorch_model-0000{part}-of-00002.bin")
    others = {
        "architectures": ["CLIPT5ForConditionalGeneration"],
        "mm_hidden_size": 24,
        "mm_vision_tower": "somewhere",
    }
    (folder / "config.json").write_text(json.dumps({**facts["config"], **others, "torch_dtype": "bfloat16"}))
    (folder / "clip").mkdir()
    (folder / "clip" / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **facts["vision"]}))
    save_tokenizer(folder / "tokenizer", facts["tokenizer"])
    return folder, facts, scores


def save_tokenizer(folder, backend):
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def load(folder, weights=None, torch_dtype="float32", **kwargs):
    files = {"vision_model": folder / "clip", "tokenizer": folder / "tokenizer"}
    return get_reward("vqascore", weights=weights or folder, torch_dtype=torch_dtype, **files, **kwargs)


def images_of(facts):
    return [recipes.as_pixels(recipes.picture(*size, seed))[None] for seed, size in enumerate(facts["pictures"])]


def test_scores_are_those_of_the_original(published):
    folder, facts, expected = published
    reward = load(folder)
    for image, prompt, size, score in zip(
        images_of(facts), facts["prompts"], facts["pictures"], expected, strict=True
    ):
        tolerance = 1e-5 if size == [28, 28] else 0.01  # relative; the original resizes 8-bit images
        torch.testing.assert_close(reward(image, [prompt])[0], score, atol=0, rtol=tolerance)
    assert expected.std() > 0.05 * expected.mean()


def test_gradients_and_batches(published):
    folder, facts, _ = published
    check_scorer(load(folder), pictures(40, 28), facts["prompts"][:3], atol=1e-7)


def test_the_output_layer_is_not_the_embeddings(published):
    folder, facts, _ = published
    reward = load(folder)
    _, state, _ = recipes.read("vqascore")
    language = reward.language
    assert language.lm_head.weight is not language.shared.weight
    assert torch.equal(language.lm_head.weight, state["lm_head.weight"])
    assert torch.equal(language.encoder.embed_tokens.weight, state["shared.weight"])
    assert torch.equal(language.decoder.embed_tokens.weight, state["shared.weight"])
    assert language.encoder.embed_tokens is language.decoder.embed_tokens is language.shared
    assert not language.config.scale_decoder_outputs


def test_tokens_that_the_tokenizer_lacks_take_no_part(published):
    """The checkpoint has rows beyond them, which the original cuts off."""
    folder, facts, _ = published
    reward, image = load(folder), images_of(facts)[0]
    before = reward(image, ["a cat"])
    reward.language.lm_head.weight.data[len(reward.tokenizer) :] = 9.0
    torch.testing.assert_close(reward(image, ["a cat"]), before)


def test_definition(published):
    """The root of the probability of "Yes" and of the end after it, over the tokens of the tokenizer."""
    folder, facts, _ = published
    reward, image = load(folder), images_of(facts)[1]
    ids, number = reward.answer_ids, len(reward.tokenizer)
    seen = []
    reward.language.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs.logits))
    score = reward(image, ["a cat"])
    probabilities = seen[0][0, :, :number].softmax(-1)
    assert len(ids) == len(probabilities) and ids[-1] == 1
    expected = probabilities[range(len(ids)), ids].log().mean().exp()
    torch.testing.assert_close(score[0], expected)


@pytest.mark.parametrize("size", [(28, 28), (40, 60), (61, 30), (100, 101)])
def test_pixels_are_those_of_pil(published, size, monkeypatch):
    reward, array = load(published[0]), recipes.picture(*size, 4)
    side = max(size)
    square = Image.new("RGB", (side, side), tuple(round(255 * value) for value in BACKGROUND))
    square.paste(Image.fromarray(array), ((side - size[1]) // 2, (side - size[0]) // 2))
    resized = torch.from_numpy(np.array(square.resize((28, 28), Image.Resampling.BICUBIC)))
    seen = []
    reward.vision.register_forward_pre_hook(lambda module, _, inputs: seen.append(inputs), with_kwargs=True)
    reward.image_tokens(recipes.as_pixels(array)[None])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    found = 255 * (seen[0]["pixel_values"][0] * std + mean)
    assert (found - resized.movedim(-1, 0)).abs().max() <= 2
    assert tuple(round(255 * value) for value in BACKGROUND) == (122, 116, 104)


def test_half_precision_is_the_default(published):
    folder, facts, expected = published
    reward = load(folder, torch_dtype=None)
    assert reward.language.dtype is reward.vision.dtype is torch.bfloat16
    found = reward(images_of(facts)[0], facts["prompts"][:1])[0]
    assert 0 < (found / expected[0] - 1).abs() < 0.05


def test_one_file_of_safetensors(published, tmp_path):
    folder, facts, expected = published
    _, state, _ = recipes.read("vqascore")
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(facts["config"]))
    found = load(folder, tmp_path)(images_of(facts)[0], facts["prompts"][:1])
    torch.testing.assert_close(found[0], expected[0], atol=0, rtol=1e-5)


def test_another_question(published):
    folder, facts, _ = published
    image = images_of(facts)[0]
    other = load(folder, question="{}?", answer="no")
    assert other.texts(["a cat"])[1] == ["\na cat? ASSISTANT: "]
    assert (other(image, ["a cat"]) - load(folder)(image, ["a cat"])).abs() > 1e-6


def test_a_checkpoint_without_its_own_output_layer(published, tmp_path):
    folder, facts, _ = published
    _, state, _ = recipes.read("vqascore")
    del state["lm_head.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(facts["config"]))
    with pytest.raises(ValueError, match="has no `lm_head.weight`"):
        load(folder, tmp_path)


def test_no_checkpoint(published, tmp_path):
    folder, facts, _ = published
    (tmp_path / "config.json").write_text(json.dumps(facts["config"]))
    with pytest.raises(OSError, match=r"has no `\*.safetensors`"):
        load(folder, tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pass its `tokenizer=`"):
        get_reward("vqascore", weights=tmp_path)


@pytest.mark.parametrize("question", ["Is this a cat?", "{prompt}?", "{}{"])
def test_a_question_needs_a_place_for_the_prompt(question):
    with pytest.raises(ValueError, match="`question` of the reward `vqascore` must have `{}`"):
        check_question(question)
