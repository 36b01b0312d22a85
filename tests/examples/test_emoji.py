# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Checks of the committed emoji data set, pipeline and judges."""

import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch


EMOJI = Path(__file__).resolve().parents[2] / "examples" / "emoji"
STYLES = ["noto", "twemoji", "fluent"]
if str(EMOJI) not in sys.path:
    sys.path.insert(0, str(EMOJI))

from common import load_images  # noqa: E402
from judges import load_judges, recall_at  # noqa: E402


@pytest.fixture(scope="module")
def dataset():
    from datasets import load_dataset

    return load_dataset("parquet", data_files=str(EMOJI / "data" / "emoji.parquet"), split="train")


@pytest.fixture(scope="module")
def pictures():
    return load_images(EMOJI / "data" / "emoji.parquet")


@pytest.fixture(scope="module")
def judges():
    return load_judges(EMOJI / "judges")


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(EMOJI / "pipeline", text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, prompts, **kwargs):
    arguments = {"num_inference_steps": 20, "guidance_scale": 2.0, "max_sequence_length": 1, "output_type": "pt"}
    return pipeline(prompts, generator=torch.Generator().manual_seed(0), **{**arguments, **kwargs}).images


class TestClip:
    def test_knows_the_training_captions_and_no_others(self):
        from train_clip import load_split, recall
        from transformers import CLIPModel, CLIPTokenizer

        clip = CLIPModel.from_pretrained(EMOJI / "clip", dtype=torch.float32).eval()
        tokenizer = CLIPTokenizer.from_pretrained(EMOJI / "clip")
        assert sum(parameter.numel() for parameter in clip.parameters()) < 1.5e6
        for split in ("train", "validation", "test"):
            images, captions = load_split(EMOJI / "data" / "emoji.parquet", split)
            assert images.shape == (len(captions), 3, 3, 64, 64)
            tokens = tokenizer(captions, padding="max_length", max_length=12, return_tensors="pt").input_ids
            hits = recall(clip, images, tokens)
            assert hits > 0.95 if split == "train" else hits < 0.1


class TestDataset:
    def test_columns_and_values(self, dataset):
        assert dataset.column_names == ["prompt", "category", "style", "image", "split"]
        assert set(dataset["style"]) == set(STYLES) and set(dataset["split"]) == {"train", "validation", "test"}
        image = dataset[0]["image"]
        assert image.size == (64, 64) and image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)

    def test_every_caption_has_each_style_once(self, dataset):
        pairs = list(zip(dataset["prompt"], dataset["style"], strict=True))
        assert len(set(pairs)) == len(pairs) == 3 * len(set(dataset["prompt"]))

    def test_captions_are_short_and_lower_case(self, dataset):
        assert all(prompt == prompt.lower() and 1 <= len(prompt.split()) <= 6 for prompt in dataset["prompt"])

    def test_the_splits_share_no_caption_and_hold_every_category(self, dataset):
        columns = zip(dataset["prompt"], dataset["category"], dataset["split"], strict=True)
        captions, categories = defaultdict(set), defaultdict(set)
        for prompt, category, split in columns:
            captions[split].add(prompt)
            categories[split].add(category)
        assert sum(map(len, captions.values())) == len(set(dataset["prompt"]))
        assert {split: len(names) for split, names in captions.items()} == {"train": 98, "validation": 48, "test": 48}
        assert all(names == set(dataset["category"]) for names in categories.values())

    def test_sizes(self):
        def size(folder):
            return sum(path.stat().st_size for path in (EMOJI / folder).rglob("*") if path.is_file())

        assert size("data") <= 8e6 and size("pipeline") <= 16.5e6 and size("judges") <= 3e6
        assert (EMOJI / "assets" / "base_samples.png").stat().st_size <= 300_000

    def test_licences_name_every_style(self):
        text = (EMOJI / "data" / "LICENSES.md").read_text()
        assert all(f"`{style}`" in text for style in STYLES)

    def test_rows_are_built_from_the_captions_file(self):
        import io

        from build_dataset import build_rows
        from PIL import Image

        def png(mode):
            buffer = io.BytesIO()
            Image.new(mode, (72, 72), (255, 0, 0, 128)[: len(mode)]).save(buffer, format="PNG")
            return buffer.getvalue()

        table = [
            {"short_name": "apple", "name": "RED APPLE", "image": "1.png", "unified": "1", "category": "Food"},
            {"short_name": "dog2", "name": "DOG", "image": "2-fe0f.png", "unified": "2-FE0F", "category": "Animals"},
            {"short_name": "flag", "name": "FLAG", "image": "3.png", "unified": "3", "category": "Flags"},
        ]
        images = {style: {"1": png("RGBA"), "2": png("RGB"), "3": png("RGB")} for style in STYLES}
        rows = build_rows(table, images, {"apple": ("apple", "food"), "dog2": ("dog", "animal")}, 0.25, 0)
        assert [(row["prompt"], row["style"]) for row in rows] == [(p, s) for p in ("apple", "dog") for s in STYLES]
        blended = Image.open(io.BytesIO(rows[0]["image"]["bytes"]))
        assert blended.size == (64, 64) and blended.getpixel((5, 5)) == (255, 127, 127)
        assert {row["prompt"] for row in build_rows(table, images, None, 0.25, 0)} == {"red apple", "dog"}
        with pytest.raises(ValueError, match="no_such"):
            build_rows(table, images, {"no_such": ("x", "food")}, 0.25, 0)


class TestPipeline:
    def test_form(self, pipeline):
        config = pipeline.transformer.config
        assert config.qk_norm == "rms_norm" and len(config.dual_attention_layers) >= 2
        assert (config.patch_size, config.in_channels, config.sample_size) == (2, 16, 8)
        assert pipeline.text_encoder_3 is None and pipeline.scheduler.config.shift == 3.0
        assert config.joint_attention_dim == 64 + 96 and pipeline.tokenizer.model_max_length == 12

    def test_tokenizers_keep_whole_words(self, pipeline, dataset):
        for prompt in ("red apple", "racing car", "t-rex"):
            ids = pipeline.tokenizer(prompt).input_ids
            assert ids[0] == pipeline.tokenizer.bos_token_id and ids[-1] == pipeline.tokenizer.eos_token_id
        assert len(pipeline.tokenizer("red apple").input_ids) == 4
        assert max(len(ids) for ids in pipeline.tokenizer(sorted(set(dataset["prompt"]))).input_ids) <= 12
        assert pipeline.tokenizer("racing car").input_ids == pipeline.tokenizer_2("racing car").input_ids

    @torch.no_grad()
    def test_latents_are_standardised_and_decode(self, pipeline, pictures):
        images = pictures[0][:96]
        config = pipeline.vae.config
        raw = pipeline.vae.encode(images * 2 - 1).latent_dist.mode()
        latents = (raw - config.shift_factor) * config.scaling_factor
        assert latents.shape[1:] == (16, 8, 8)
        assert abs(latents.mean()) < 0.1 and abs(latents.std() - 1) < 0.1
        decoded = pipeline.vae.decode(raw).sample / 2 + 0.5
        assert (decoded.clamp(0, 1) - images).square().mean() < 10 ** (-2.2)  # PSNR above 22 dB

    def test_samples_are_deterministic_and_show_their_prompts(self, pipeline, judges, dataset):
        prompts = sorted(set(dataset["prompt"]))[::6]
        images = sample(pipeline, prompts)
        assert images.shape == (len(prompts), 3, 64, 64) and images.min() >= 0 and images.max() <= 1
        few = sample(pipeline, prompts[:2], num_inference_steps=2)
        assert torch.equal(few, sample(pipeline, prompts[:2], num_inference_steps=2))
        ranks = judges[1].ranks(images, prompts)
        assert recall_at(ranks, 10) >= 0.9  # chance: 0.05
        wrong = judges[1].ranks(images, prompts[1:] + prompts[:1])
        assert recall_at(wrong, 10) <= 0.3
        assert judges[1].probabilities(images, prompts).mean() >= 0.5


class TestJudges:
    def test_real_pictures(self, judges, pictures):
        images, prompts, styles = pictures
        style, subject = judges
        assert style.styles == STYLES and subject.prompts == sorted(set(prompts))
        probabilities = style.style_probabilities(images)
        assert probabilities.shape == (len(images), 3)
        torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(len(images)))
        assert (probabilities.argmax(dim=1) == styles).float().mean() >= 0.95
        assert recall_at(subject.ranks(images, prompts), 1) >= 0.9
        assert recall_at(subject.ranks(images, [prompts[-1]] * len(prompts)), 10) <= 0.2

    @torch.no_grad()
    def test_reconstructions(self, judges, pipeline, pictures):
        images, prompts, styles = (part[::4] for part in pictures)
        decoded = pipeline.vae.decode(pipeline.vae.encode(images * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
        style, subject = judges
        assert (style.style_probabilities(decoded.clamp(0, 1)).argmax(dim=1) == styles).float().mean() >= 0.9
        assert recall_at(subject.ranks(decoded.clamp(0, 1), prompts), 10) >= 0.9

    def test_unknown_prompt(self, judges):
        with pytest.raises(ValueError, match="no such thing"):
            judges[1].ranks(torch.ones(1, 3, 64, 64), ["no such thing"])

    def test_blur_lowers_the_probability_of_the_own_prompt(self, judges, pictures):
        images, prompts = pictures[0][:60], pictures[1][:60]
        coarse = torch.nn.functional.avg_pool2d(images, 16).repeat_interleave(16, -1).repeat_interleave(16, -2)
        sharp, blurred = (judges[1].probabilities(x, prompts).mean() for x in (images, coarse))
        assert sharp >= 0.8 and blurred <= 0.5

    def test_ranks_and_recall(self, judges):
        ranks = judges[1].ranks(torch.rand(4, 3, 64, 64), judges[1].prompts[:4])
        assert ranks.dtype == torch.long and ranks.min() >= 1 and ranks.max() <= len(judges[1].prompts)
        assert recall_at(torch.tensor([1, 5, 11, 100]), 10) == 0.5

    def test_save_and_load(self, judges, tmp_path):
        from judges import StyleJudge

        images = torch.rand(2, 3, 64, 64)
        judges[0].save(tmp_path / "style")
        expected = judges[0].style_probabilities(images)
        assert torch.equal(StyleJudge.load(tmp_path / "style").style_probabilities(images), expected)
