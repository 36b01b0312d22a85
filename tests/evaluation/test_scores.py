# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from PIL import Image

from tapo_trl import SLRMModel, SPMModel
from tapo_trl.data.videos import write_video
from tapo_trl.evaluation.scores import (
    LatentScorer,
    SampleFiles,
    compare,
    find_samples,
    load_scorers,
    score_samples,
    summarize,
)
from tapo_trl.policies import SD3Policy
from tests.testing_utils import save_tiny_clip, tiny_sd3_pipeline


def brightness(images, prompts):
    return images.flatten(1).mean(1)


class TestStatistics:
    def test_summarize(self):
        found = summarize(torch.tensor([1.0, 2.0, 3.0, 6.0]))
        assert found == {"mean": 3.0, "standard_error": pytest.approx((14 / 3 / 4) ** 0.5), "n": 4}
        assert summarize(torch.tensor([2.0])) == {"mean": 2.0, "standard_error": None, "n": 1}

    def test_compare(self):
        found = compare(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 2.0, 2.0, 9.0]))
        assert found["base"]["mean"] == 2.5 and found["aligned"]["mean"] == 3.75
        assert found["difference"] == summarize(torch.tensor([1.0, 0.0, -1.0, 5.0]))
        assert found["win_rate"] == 2.5 / 4 and found["ratio"] == 1.5
        assert compare(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 1.0]))["ratio"] is None


class TestScoreSamples:
    def test_sizes_may_differ(self):
        samples = [torch.rand(3, 4 + row % 2, 5) for row in range(40)]
        found = score_samples({"brightness": brightness}, samples, [""] * 40)
        torch.testing.assert_close(found["brightness"], torch.stack([sample.mean() for sample in samples]))

    def test_weights_come_one_after_the_other(self, tmp_path):
        folder, samples, prompts = save_tiny_clip(tmp_path), torch.rand(20, 3, 30, 30), ["cat", "dog"] * 10
        scorers = load_scorers({"clip": "clip", "mine": brightness}, {"clip": {"weights": folder}})
        sizes, forward = [], scorers["clip"].raw_scores
        scorers["clip"].raw_scores = lambda images, prompts: sizes.append(len(images)) or forward(images, prompts)
        found = score_samples(scorers, samples, prompts)
        assert list(found) == ["clip", "mine"] and sizes == [16, 4]
        torch.testing.assert_close(found["clip"], forward(samples, prompts), atol=1e-4, rtol=1e-5)

    def test_not_finite(self):
        with pytest.raises(
            ValueError, match="reward `log` gave scores that are not finite, the first for the prompt 'b'"
        ):
            samples = torch.tensor([0.5, -0.5]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
            score_samples({"log": lambda images, prompts: images.mean((1, 2, 3)).log()}, samples, ["a", "b"])

    def test_arguments_of_another_reward(self):
        with pytest.raises(ValueError, match="has arguments for `clip`, but `reward_model` is"):
            load_scorers({"ocr": "ocr"}, {"clip": {"scale": 2}})


class TestLatentScorer:
    @pytest.fixture(scope="class")
    @classmethod
    def policy(cls):
        return SD3Policy(tiny_sd3_pipeline())

    def test_is_the_score_at_noise_level_0(self, policy, tmp_path):
        SLRMModel.from_policy(policy, max_sequence_length=8, resolution=32).save_pretrained(tmp_path)
        scorer = load_scorers({"slrm": str(tmp_path)}, load_base=lambda name: policy)["slrm"]
        samples, prompts = torch.rand(3, 3, 32, 32), ["cat", "dog", "cat"]
        with torch.no_grad():
            embeds = policy.encode_prompts(prompts, 8)
            expected = scorer.model.score(policy.encode(samples), 0.0, **embeds.tensors)
        assert isinstance(scorer, LatentScorer) and expected.std() > 0
        torch.testing.assert_close(score_samples({"slrm": scorer}, samples, prompts)["slrm"], expected)

    def test_spm_reads_pixels(self, policy, tmp_path):
        model = SPMModel.from_policy(policy, save_tiny_clip(tmp_path), max_sequence_length=8, resolution=32)
        samples = torch.rand(2, 3, 32, 32)
        found = score_samples({"spm": LatentScorer(model, policy)}, samples, ["cat", "dog"])["spm"]
        torch.testing.assert_close(found, model.score(samples, 0.0, ["cat", "dog"]).detach())


def test_a_latent_reward_model_names_samples_that_it_cannot_read():
    policy = SD3Policy(tiny_sd3_pipeline())
    scorer = LatentScorer(SLRMModel.from_policy(policy, max_sequence_length=8, resolution=32), policy)
    with pytest.raises(ValueError, match="rates images, but got samples of shape"):
        scorer(torch.rand(1, 3, 5, 32, 32), ["cat"])
    with pytest.raises(ValueError, match="30"):
        scorer(torch.rand(1, 3, 30, 30), ["cat"])


class TestFiles:
    def test_order_and_pixels(self, tmp_path):
        for value, name in enumerate(["1.png", "2.png", "10.png", "grid.png", "notes.txt"]):
            if name.endswith("png"):
                Image.new("RGB", (4 + value, 3), (value, 10 * value, 100)).save(tmp_path / name)
            else:
                (tmp_path / name).write_text("")
        files = find_samples(tmp_path)
        assert [file.name for file in files] == ["1.png", "2.png", "10.png"]
        samples = SampleFiles(files)
        assert [sample.shape for sample in samples] == [(3, 3, 4), (3, 3, 5), (3, 3, 6)]
        torch.testing.assert_close(samples[2][:, 0, 0], torch.tensor([2.0, 20.0, 100.0]) / 255)

    def test_names_beyond_ascii(self, tmp_path):
        for name in (
            "\u00b2" + "1.png",
            "\u65e5\u672c 2.png",
            "\u65e5\u672c 10.png",
            "\u0661.png",
        ):  # a power, an Arabic digit
            Image.new("RGB", (4, 4)).save(tmp_path / name)
        names = [file.name for file in find_samples(tmp_path)]
        assert names.index("\u65e5\u672c 2.png") < names.index("\u65e5\u672c 10.png") and len(names) == 4

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "CMYK", "1"])
    def test_pictures_of_every_kind_are_rgb(self, tmp_path, mode):
        Image.new(mode, (4, 3)).save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
        (sample,) = SampleFiles(find_samples(tmp_path))
        assert sample.shape == (3, 3, 4) and sample.dtype is torch.float32

    def test_videos(self, tmp_path):
        pytest.importorskip("av")
        video = torch.linspace(0.2, 0.8, 5).view(1, 5, 1, 1).expand(3, 5, 32, 48)
        write_video(tmp_path / "0.mp4", video, 8)
        found = SampleFiles(find_samples(tmp_path))[0]
        assert found.shape == video.shape
        torch.testing.assert_close(found, video, atol=0.03, rtol=0)

    def test_unusable_folders(self, tmp_path):
        with pytest.raises(ValueError, match="There is no folder"):
            find_samples(tmp_path / "none")
        with pytest.raises(ValueError, match="neither images nor videos"):
            find_samples(tmp_path)
        for name in ("a.png", "b.mp4"):
            (tmp_path / name).write_text("")
        with pytest.raises(ValueError, match="both images and videos"):
            find_samples(tmp_path)
