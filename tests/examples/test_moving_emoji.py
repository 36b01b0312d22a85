# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Checks of the moving-emoji clips, pipeline, judges and pairs."""

import importlib.util
import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tapo_trl.human.elements import Elements
from tapo_trl.human.writers import TemplateWriter


FOLDER = Path(__file__).resolve().parents[2] / "examples" / "moving_emoji"
if str(FOLDER) not in sys.path:
    sys.path.append(str(FOLDER))

from clip_judges import centres, direction_hits, load_judges, recall_at, roughness  # noqa: E402
from clips import (  # noqa: E402
    DIRECTIONS,
    KINDS,
    SUBJECTS,
    all_prompts,
    draw_clip,
    load_subjects,
    parse_prompt,
    random_batch,
    split_prompts,
    to_tensor,
)
from sampling import MAX_LENGTH, load_pipeline, sample  # noqa: E402


def folder_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


@pytest.fixture(scope="module")
def judges():
    return load_judges()


class TestClips:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("direction", DIRECTIONS)
    def test_shape_and_direction(self, direction, kind):
        frames = draw_clip(load_subjects()["panda face"], direction, kind, random.Random(0))
        assert frames.shape == (9, 48, 48, 3) and frames.dtype == np.uint8
        clips = to_tensor([frames])
        assert clips.shape == (1, 3, 9, 48, 48) and clips.max() == 1
        assert direction_hits(clips, [f"panda face moving {direction}"]).all()
        other = next(other for other in DIRECTIONS if other != direction)
        assert not direction_hits(clips, [f"panda face moving {other}"]).any()

    def test_only_a_jerky_clip_is_rough(self):
        subjects = load_subjects()
        for subject in SUBJECTS:
            clean, jerky, distorted = (
                roughness(to_tensor([draw_clip(subjects[subject], "up", kind, random.Random(1))])) for kind in KINDS
            )
            assert clean < 0.01 and distorted < 2 and jerky > 5

    def test_a_jerky_clip_has_the_frames_of_a_clean_one(self):
        picture = load_subjects()["bus"]
        places = [
            centres(to_tensor([draw_clip(picture, "right", kind, random.Random(seed))]))[0, :, 1]
            for seed, kind in ((0, "clean"), (0, "jerky"))
        ]
        steps = [place - place[0] for place in places]
        torch.testing.assert_close(steps[1].sort().values, steps[0])
        assert not torch.equal(steps[1], steps[0])

    def test_a_batch_is_reproducible(self):
        first, second = random_batch(4, random.Random(3)), random_batch(4, random.Random(3))
        assert torch.equal(first[0], second[0]) and first[1] == second[1]


class TestSplits:
    def test_the_splits_are_disjoint_and_complete(self):
        splits = split_prompts()
        assert {name: len(prompts) for name, prompts in splits.items()} == {"train": 48, "validation": 24, "test": 24}
        assert sorted(sum(splits.values(), [])) == sorted(all_prompts())

    def test_each_split_has_every_subject_and_direction_equally_often(self):
        for prompts in split_prompts().values():
            for part in zip(*map(parse_prompt, prompts), strict=True):
                assert len(set(Counter(part).values())) == 1

    def test_the_files_hold_the_splits(self):
        for name, prompts in split_prompts().items():
            assert (FOLDER / "prompts" / f"{name}.txt").read_text(encoding="utf-8").splitlines() == prompts


class TestPipeline:
    def test_size(self):
        assert folder_size(FOLDER / "pipeline") < 12e6

    def test_parts(self, pipeline):
        index = json.loads((FOLDER / "pipeline" / "model_index.json").read_text())
        assert index["_class_name"] == "WanPipeline" and index["scheduler"][1] == "UniPCMultistepScheduler"
        assert pipeline.transformer.dtype == pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.float32
        assert pipeline.vae.config.scale_factor_temporal == 4 and pipeline.vae.config.z_dim == 16

    def test_no_prompt_is_too_long_and_every_word_is_a_token(self, pipeline):
        for prompt in all_prompts():
            tokens = pipeline.tokenizer(prompt).input_ids
            assert (
                len(tokens) == len(prompt.split()) + 1 <= MAX_LENGTH and pipeline.tokenizer.unk_token_id not in tokens
            )

    def test_latents_are_normalised(self, pipeline):
        clips = random_batch(16, random.Random(0))[0]
        with torch.no_grad():
            latents = pipeline.vae.encode(clips).latent_dist.mode()
        mean, std = (torch.tensor(pipeline.vae.config[name]) for name in ("latents_mean", "latents_std"))
        latents = (latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
        assert latents.shape == (16, 16, 3, 6, 6)
        assert latents.mean().abs() < 0.15 and 0.8 < latents.std() < 1.2

    def test_samples_show_subject_and_direction(self, pipeline, judges):
        prompts = split_prompts()["train"][::2]
        clips = sample(pipeline, prompts, steps=10)
        assert clips.shape == (24, 3, 9, 48, 48) and clips.isfinite().all()
        assert recall_at(judges[1].ranks(clips, prompts), 1) > 0.7
        assert direction_hits(clips, prompts).float().mean() > 0.8


class TestJudges:
    def test_sizes(self):
        assert all(file.stat().st_size < 1.5e6 for file in (FOLDER / "judges").glob("*.safetensors"))

    def test_real_clips(self, judges):
        clips, prompts, kinds = random_batch(96, random.Random(5))
        assert (judges[0].probabilities(clips).argmax(1) == kinds).float().mean() > 0.97
        assert recall_at(judges[1].ranks(clips, prompts), 1) > 0.95
        wrong = [f"{SUBJECTS[SUBJECTS.index(parse_prompt(p)[0]) - 1]} moving up" for p in prompts]
        assert judges[1].probabilities(clips, wrong).mean() < 0.1

    def test_an_unknown_subject_is_refused(self, judges):
        with pytest.raises(ValueError, match="does not know"):
            judges[1].ranks(random_batch(1, random.Random(0))[0], ["dragon moving left"])


class TestMakePairs:
    def test_the_videos_are_lossless(self, tmp_path):
        av = pytest.importorskip("av")
        spec = importlib.util.spec_from_file_location("make_moving_pairs", FOLDER / "make_pairs.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        prompts = split_prompts()["test"][:2]
        counts = {"jerky": 1, "distorted": 1, "subject": 1, "direction": 1, "colour": 1}
        rows = module.make_pairs(prompts, counts, tmp_path, 0, random.Random(0))
        assert Counter(row["kind"] for row in rows) == dict.fromkeys(counts, 2)
        assert {row["prompt"] for row in rows} == set(prompts)
        for row in rows:
            for column in ("chosen", "rejected"):
                with av.open(row[column]) as container:
                    frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
                assert frames.shape == (9, 48, 48, 3)
                wrong = column == "rejected" and row["kind"] == "direction"
                assert direction_hits(to_tensor([frames]), [row["prompt"]]).item() != wrong

        frames = draw_clip(load_subjects()["fire"], "up", "clean", random.Random(0))
        module.write_video(frames, tmp_path / "fire.mp4", crf=0)
        with av.open(str(tmp_path / "fire.mp4")) as container:
            read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        np.testing.assert_array_equal(read, frames)


class TestElements:
    def test_they_are_prompts_of_the_world_and_the_study_has_subjects_of_its_own(self):
        prompts, subjects = {}, {}
        for name in ("train", "test"):
            elements = Elements.load(FOLDER / "elements" / f"{name}.yaml")
            combinations = list(elements.sample(100, seed=0))
            prompts[name] = set(TemplateWriter(elements).write(combinations, seed=0))
            subjects[name] = set(elements.values["subject"])
            assert len(prompts[name]) == len(combinations) == elements.num_combinations
        assert prompts["train"] | prompts["test"] == set(all_prompts())
        assert not subjects["train"] & subjects["test"] and (len(prompts["train"]), len(prompts["test"])) == (72, 24)
