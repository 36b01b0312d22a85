# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest

import tapo_trl
from tapo_trl.cli.main import main
from tapo_trl.policies import WanPolicy
from tapo_trl.rewards import SLRMModel
from tests.testing_utils import tiny_wan_pipeline


RECIPES = Path(tapo_trl.__file__).parents[1] / "recipes"


class TestCommand:
    def run(self, capsys, *argv):
        assert main([*argv]) == 0
        return capsys.readouterr().out

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("recipe", "expected"),
        [
            ("sd35/tapo", ["16 x 64 x 64", "1,024 of a sample + 333", "2,243,171,520 policy", "47,775,744 LoRA"]),
            (
                "sd35/slrm",
                ["16 x 64 x 64", "2,243,171,520 base model", "for one pair, of which an optimizer step has 4"],
            ),
            (
                "sd35/dpo",
                ["16 x 64 x 64", "47,775,744 LoRA", "2 reference, training", "an optimizer step has 16"],
            ),
            ("sd35/tapo_24gb", ["4.60 policy", "0.93 reward model", "the backbone is the policy's", "7.17 sum"]),
            ("sd35/slrm_24gb", ["4.18 reward model", "8.42 sum"]),
            ("wan21/tapo_24gb", ["17 frames of 480 x 832", "the backbone is the policy's", "10.27 sum"]),
            (
                "wan21/tapo",
                ["81 frames of 480 x 832", "16 x 21 x 60 x 104", "32,760 of a sample + 512", "1,418,996,800"],
            ),
            (
                "wan21/slrm",
                ["49 frames of 480 x 832", "16 x 13 x 60 x 104", "20,280 of a sample + 512", "1,418,996,800"],
            ),
        ],
    )
    def test_recipes(self, capsys, tmp_path, monkeypatch, recipe, expected):
        monkeypatch.chdir(tmp_path)
        command = recipe.split("/")[1].removesuffix("_24gb")
        text = self.run(capsys, command, "--config", str(RECIPES / f"{recipe}.yaml"), "--dry_run")
        assert all(part in text for part in expected), text
        assert "is an estimate" in text
        assert list(tmp_path.iterdir()) == [], "nothing is written"

    @pytest.mark.slow
    @pytest.mark.parametrize("command", ["online_dpo", "grpo", "refl", "nft"])
    def test_online_methods(self, capsys, tmp_path, command):
        model = ["--model_name_or_path", "stabilityai/stable-diffusion-3.5-medium", "--use_peft", "--dry_run"]
        text = self.run(capsys, command, "--output_dir", str(tmp_path), "--reward_model", "judges:aesthetics", *model)
        assert f"`{command}` with stabilityai" in text and "16 x 64 x 64" in text and "47,775,744 LoRA" in text
        expected = {
            "online_dpo": [
                "320 policy, rollout",
                "8 reference, training",
                "of a rollout",
                "8 prompts x (2 samples, 4 noise)",
            ],
            "grpo": [
                "160 policy, rollout",
                "144 reference, training",
                "8 prompts x (72 latents, 72 next_latents, 72 means, 8 final_latents)",
            ],
            "nft": [
                "80 policy, rollout",
                "72 policy, training (forward and backward)",
                "72 reference, training",
                "0.18 old policy",
                "8 prompts x (8 samples, 72 noise)",
            ],
            "refl": [
                "38 policy, rollout",
                "2 policy, training (forward and backward)",
                "8 prompts x (1 latents, 1 noise)",
            ],
        }
        assert all(part in text for part in expected[command]), text

    def test_full_fine_tuning_on_samples_needs_no_reference(self, capsys, tmp_path):
        text = self.run(
            capsys,
            *("sft", "--model_name_or_path", "stabilityai/stable-diffusion-3.5-medium", "--dry_run"),
            *("--dataset_name", "images.parquet", "--output_dir", str(tmp_path)),
        )
        assert "1 policy, training (forward and backward)" in text and "reference" not in text

    @pytest.mark.slow
    def test_weights_in_float8(self, capsys):
        flags = ["--dry_run", "true", "--layerwise_casting", "true", "--share_backbone", "false"]
        text = self.run(capsys, "tapo", "--config", str(RECIPES / "sd35" / "tapo_24gb.yaml"), *flags)
        assert "3.23 policy" in text and "linear layers x 1 byte" in text

    def test_inversions(self, capsys):
        flags = ["--dry_run", "true", "--variant", "inversion_dpo", "--cache_inversions", "true"]
        text = self.run(capsys, "dpo", "--config", str(RECIPES / "sd35" / "dpo.yaml"), *flags)
        assert "56 reference, inversion" in text  # both sides, 28 steps
        assert "0.01 inversions of one pair" in text and "on disk: 56 latents" in text

    @pytest.mark.slow
    @pytest.mark.parametrize("flags", [["--dry_run", "true"], ["--dry_run=true"]])
    def test_other_spellings(self, capsys, flags):
        text = self.run(capsys, "tapo", "--config", str(RECIPES / "wan21" / "tapo.yaml"), *flags)
        assert "1,418,996,800" in text and "is an estimate" in text

    def test_reads_the_recipe_and_the_folder(self, capsys, tmp_path):
        tiny_wan_pipeline().save_pretrained(tmp_path / "base")
        SLRMModel.from_policy(WanPolicy(tiny_wan_pipeline()), num_task_tokens=3).save_pretrained(tmp_path / "slrm")
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"model_name_or_path: {tmp_path}/base\nreward_model: [{tmp_path}/slrm]\noutput_dir: {tmp_path}/out\n"
            "resolution: 32\nnum_frames: 9\ndry_run: true\n"
        )
        text = self.run(capsys, "tapo", "--config", str(recipe))
        assert "4 x 3 x 4 x 4" in text
        assert "12 of a sample + 512 of its prompt" in text
        assert "one with the default options" not in text

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--num_frames", "80"], "`num_frames` one more than a multiple of 4"),
            (["--height", "470"], "nearest that fit are 464, 832 and 81"),
        ],
    )
    def test_sizes_that_do_not_fit(self, flags, message):
        recipe = str(RECIPES / "wan21" / "tapo.yaml")
        with pytest.raises(ValueError, match=message):
            main(["tapo", "--config", recipe, "--dry_run", "true", *flags])
