# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""`tapo-trl score`, and rewards in `tapo-trl evaluate`."""

import csv
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from tapo_trl import SLRMModel
from tapo_trl.cli.main import main
from tapo_trl.evaluation.scores import SampleFiles, find_samples
from tapo_trl.policies import SD3Policy, load_policy
from tapo_trl.rewards.pretrained.clip import CLIPReward
from tests.testing_utils import save_tiny_clip, tiny_sd3_pipeline


PROMPTS = ["a cat", "a dog", "an owl"]


def brightness(images, prompts):
    return images.flatten(1).mean(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline, a LoRA on it, a reward model, a CLIP, prompts, and a folder of pictures."""
    folder = tmp_path_factory.mktemp("scores")
    policy = SD3Policy(tiny_sd3_pipeline())
    policy.pipeline.save_pretrained(folder / "base")
    save_tiny_clip(folder / "clip")
    policy = load_policy(str(folder / "base"))
    SLRMModel.from_policy(policy, max_sequence_length=8, resolution=32).save_pretrained(folder / "slrm")
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=policy.lora_target_modules, init_lora_weights=False)
    policy.save_lora_weights(folder / "lora", get_peft_model(policy.transformer, lora))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "pictures").mkdir()
    for row, size in enumerate([(32, 32), (32, 32), (40, 32)]):
        Image.effect_noise(size, 50 + 50 * row).convert("RGB").save(folder / "pictures" / f"{row}.png")
    return folder


@pytest.fixture(autouse=True)
def tiny_weights(monkeypatch, folder):
    monkeypatch.setattr(CLIPReward, "weights", str(folder / "clip"))


class TestScore:
    def run(self, folder, *flags, prompts=None):
        main(["score", str(folder / "pictures"), "--prompts", prompts or str(folder / "prompts.txt"), *flags])

    def test_table_and_files(self, folder, tmp_path, capsys):
        rewards = ["--reward_model", "clip", f"{__name__}:brightness"]
        self.run(folder, *rewards, "--output_file", str(tmp_path / "out" / "scores.json"))
        header, clip, mine = capsys.readouterr().out.splitlines()
        assert header.split() == ["reward", "mean", "n"]
        assert clip.startswith("clip ") and clip.endswith("3") and mine.startswith(f"{__name__}:brightness")
        result = json.loads((tmp_path / "out" / "scores.json").read_text())
        samples = SampleFiles(find_samples(folder / "pictures"))
        means = torch.stack([sample.mean() for sample in samples])
        found = result["rewards"][f"{__name__}:brightness"]
        assert found["n"] == 3 and found["mean"] == pytest.approx(means.mean().item())
        assert found["standard_error"] == pytest.approx(means.std().item() / 3**0.5, rel=1e-4)
        expected = CLIPReward.from_pretrained()(samples[2][None], [PROMPTS[2]]).item()
        assert result["files"][2]["file"] == "2.png" and result["files"][2]["prompt"] == PROMPTS[2]
        assert result["files"][2]["clip"] == pytest.approx(expected, abs=1e-4)

        self.run(folder, *rewards, "--output_file", str(tmp_path / "scores.csv"))
        rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
        assert [row["file"] for row in rows] == ["0.png", "1.png", "2.png"]
        assert float(rows[2]["clip"]) == result["files"][2]["clip"]

    def test_prompts_by_name(self, folder, tmp_path, capsys):
        (tmp_path / "prompts.json").write_text(
            json.dumps({f"{row}.png": prompt for row, prompt in enumerate(PROMPTS)})
        )
        self.run(folder, "--reward_model", "clip", prompts=str(tmp_path / "prompts.json"))
        self.run(folder, "--reward_model", "clip")
        first, second = capsys.readouterr().out.split("reward")[1:]
        assert first == second
        (tmp_path / "prompts.json").write_text(json.dumps({"0.png": "a cat"}))
        with pytest.raises(ValueError, match=r"no prompt for \['1.png', '2.png'\]"):
            self.run(folder, "--reward_model", "clip", prompts=str(tmp_path / "prompts.json"))

    @pytest.mark.parametrize("content", ['["a cat"]', '{"0.png": 5, "1.png": "a", "2.png": "b"}', '{"0.png"'])
    def test_a_broken_file_of_prompts(self, folder, tmp_path, content):
        (tmp_path / "prompts.json").write_text(content)
        with pytest.raises(ValueError, match="`prompts`: .*prompts.json (is no JSON|must be an object)"):
            self.run(folder, "--reward_model", "clip", prompts=str(tmp_path / "prompts.json"))
        with pytest.raises(FileNotFoundError, match="`prompts`: there is no file"):
            self.run(folder, "--reward_model", "clip", prompts=str(tmp_path / "others.json"))

    def test_a_broken_picture_is_found_before_weights_are_read(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(CLIPReward, "weights", str(tmp_path / "nothing"))
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures" / "a.png").write_text("no picture")
        with pytest.raises(ValueError, match="a.png: the image cannot be read"):
            self.run(tmp_path, "--reward_model", "clip", prompts="a cat")

    def test_a_latent_reward_model(self, folder, capsys):
        self.run(folder, "--reward_model", str(folder / "slrm"))
        assert str(folder / "slrm") in capsys.readouterr().out

    def test_bad_input(self, folder, capsys):
        with pytest.raises(ValueError, match="there are 1 prompts for the 3 files"):
            self.run(folder, "--reward_model", "clip", prompts="a cat")
        with pytest.raises(ValueError, match="`klip` is neither a folder here nor a reward. Did you mean `clip`"):
            self.run(folder, "--reward_model", "klip")
        with pytest.raises(ValueError, match="prompt 'a cat' has none"):
            self.run(folder, "--reward_model", "ocr")
        with pytest.raises(SystemExit):
            self.run(folder)
        assert "`reward_model` is missing: `tapo-trl score FOLDER" in capsys.readouterr().err


class TestEvaluate:
    def run(self, folder, *flags):
        rewards = ["--reward_model", "clip", str(folder / "slrm"), f"{__name__}:brightness"]
        sampling = ["--num_inference_steps", "2", "--resolution", "32", "--max_sequence_length", "8"]
        prompts = ["--prompts", str(folder / "prompts.txt")]
        main(["evaluate", "--model_name_or_path", str(folder / "base"), *rewards, *prompts, *sampling, *flags])

    def test_base_and_aligned(self, folder, tmp_path, capsys):
        samples = tmp_path / "samples"
        self.run(folder, "--lora", str(folder / "lora"), "--samples_dir", str(samples))
        output = capsys.readouterr()
        result = json.loads(output.out)
        assert "base" in output.err and "win rate" in output.err and "ratio" in output.err
        saved = json.loads((samples / "scores.json").read_text())
        for spec in ("clip", str(folder / "slrm"), f"{__name__}:brightness"):
            found = result["reward_statistics"][spec]
            base, aligned = (torch.tensor(saved["scores"][name][spec]) for name in ("base", "aligned"))
            assert not torch.equal(base, aligned)
            assert found["base"]["mean"] == pytest.approx(base.mean().item(), abs=1e-5)
            assert found["aligned"]["mean"] == result["rewards"][spec]
            assert found["difference"]["mean"] == pytest.approx((aligned - base).mean().item(), abs=1e-5)
            assert found["win_rate"] == pytest.approx(
                ((aligned > base).float() + (aligned >= base).float()).mean().item() / 2
            )
        assert saved["prompts"] == PROMPTS
        pictures = torch.stack(list(SampleFiles(find_samples(samples / "aligned"))))
        assert brightness(pictures, PROMPTS).tolist() == pytest.approx(
            saved["scores"]["aligned"][f"{__name__}:brightness"], abs=1 / 255
        )
        assert len(find_samples(samples / "base")) == 3 and (samples / "overview.png").exists()

    def test_the_base_is_the_model_without_lora(self, folder, capsys):
        self.run(folder, "--lora", str(folder / "lora"))
        compared = json.loads(capsys.readouterr().out)["reward_statistics"]
        self.run(folder)
        alone = json.loads(capsys.readouterr().out)
        for spec, values in compared.items():
            assert values["base"] == alone["reward_statistics"][spec]
            assert alone["rewards"][spec] == values["base"]["mean"]

    def test_without_the_base(self, folder, capsys):
        self.run(folder, "--lora", str(folder / "lora"), "--compare_base", "false")
        assert "base" not in json.loads(capsys.readouterr().out)["reward_statistics"]["clip"]
