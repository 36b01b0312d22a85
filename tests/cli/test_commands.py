# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The four commands in a row, on a tiny pipeline: what one writes, the next one reads."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from tapo_trl import SLRMModel
from tapo_trl.cli.main import main
from tapo_trl.data.videos import write_video
from tests.testing_utils import tiny_sd3_pipeline, tiny_wan_pipeline


PROMPTS = [f"prompt {letter}" for letter in "abcdefgh"]
COMMON = """
output_dir: {output}
use_cpu: true
bf16: false
resolution: 32
max_sequence_length: 8
cache_dir: {cache}
max_steps: 2
per_device_train_batch_size: 2
learning_rate: 1e-2
logging_steps: 1
save_strategy: "no"
report_to: none
disable_tqdm: true
"""


def held_out_reward(images, prompts):
    """Reward function of the guard."""
    return images.mean(dim=(1, 2, 3))


def mean_of_videos(videos, prompts):
    return videos.mean(dim=(1, 2, 3, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline, a reward model that `tapo-trl slrm` trained and a policy that `tapo-trl tapo` trained with it."""
    folder = tmp_path_factory.mktemp("commands")
    tiny_sd3_pipeline().save_pretrained(folder / "base")
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(16)]
    features = Features({"prompt": Value("string"), "chosen": ImageFeature(), "rejected": ImageFeature()})
    pairs = {"prompt": PROMPTS, "chosen": images[:8], "rejected": images[8:]}
    Dataset.from_dict(pairs, features=features).to_parquet(folder / "pairs.parquet")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))

    recipe = folder / "slrm.yaml"
    common = COMMON.format(output=folder / "slrm", cache=folder / "cache")
    recipe.write_text(common + "dataset_train_split: 'train[:6]'\ndataset_test_split: 'train[6:]'\n")
    base = ["--model_name_or_path", str(folder / "base")]
    main(["slrm", "--config", str(recipe), *base, "--dataset_name", str(folder / "pairs.parquet")])

    recipe = folder / "tapo.yaml"
    recipe.write_text(
        COMMON.format(output=folder / "tapo", cache=folder / "cache")
        + "num_inference_steps: 4\nnum_sde_steps: 2\nnum_candidates: 2\nsample_every_steps: 1\nema_decay: 0.9\n"
        + "guard_every_steps: 1\nguard_num_prompts: 2\nuse_peft: true\nlora_r: 2\nlora_alpha: 6\n"
        + "dataset_split: 'train[:6]'\ndataset_test_split: 'train[6:]'\n"
    )
    flags = ["--dataset_name", str(folder / "prompts.txt"), "--reward_model", str(folder / "slrm")]
    main(["tapo", "--config", str(recipe), *base, *flags, "--guard_reward", f"{__name__}:held_out_reward"])

    for command, options in (
        ("online_dpo", "num_noise_levels: 2\n"),
        ("grpo", "num_sde_steps: 2\ngradient_share_every_steps: 1\n"),
        ("refl", "num_grad_steps: 2\n"),
        ("nft", "num_noise_levels: 2\n"),
    ):
        recipe = folder / f"{command}.yaml"
        recipe.write_text(
            COMMON.format(output=folder / command, cache=folder / "cache")
            + "num_inference_steps: 4\nuse_peft: true\nlora_r: 2\n"
            + ("" if command == "refl" else "num_generations: 2\n")
            + "dataset_split: 'train[:6]'\ndataset_test_split: 'train[6:]'\neval_strategy: steps\neval_steps: 2\n"
            + options
        )
        reward = str(folder / "slrm") if command == "refl" else f"{__name__}:held_out_reward"
        flags = ["--dataset_name", str(folder / "prompts.txt"), "--reward_model", reward]
        main([command, "--config", str(recipe), *base, *flags])

    recipe = folder / "dpo.yaml"
    recipe.write_text(
        COMMON.format(output=folder / "dpo", cache=folder / "cache")
        + "variant: dense_reward\nnum_inference_steps: 4\nuse_peft: true\nlora_r: 2\nsample_every_steps: 2\nema_decay: 0.9\n"
        + "dataset_train_split: 'train[:6]'\ndataset_test_split: 'train[6:]'\neval_strategy: steps\neval_steps: 2\n"
    )
    sft = folder / "sft.yaml"
    sft.write_text(
        COMMON.format(output=folder / "sft", cache=folder / "cache")
        + "media_column: chosen\nnum_inference_steps: 4\nuse_peft: true\nlora_r: 2\nsample_every_steps: 2\nema_decay: 0.9\n"
        + "dataset_train_split: 'train[:6]'\ndataset_test_split: 'train[6:]'\neval_strategy: steps\neval_steps: 2\n"
    )
    main(["sft", "--config", str(sft), *base, "--dataset_name", str(folder / "pairs.parquet")])
    main(["dpo", "--config", str(recipe), *base, "--dataset_name", str(folder / "pairs.parquet"), "--beta", "300"])
    return folder


class TestSLRM:
    def test_writes_a_model_that_loads_and_was_trained(self, folder):
        model = SLRMModel.from_pretrained(folder / "slrm")
        base = StableDiffusion3Pipeline.from_pretrained(folder / "base", text_encoder_3=None, tokenizer_3=None)
        weights = dict(model.named_parameters())
        changed = [
            name
            for name, value in base.transformer.named_parameters()
            for other in weights
            if other.endswith(name) and not torch.equal(weights[other], value)
        ]
        assert changed

    @pytest.mark.parametrize("dry_run", [False, True])
    def test_goes_on_with_a_reward_model(self, folder, tmp_path, dry_run, capsys):
        recipe = tmp_path / "more.yaml"
        recipe.write_text(COMMON.format(output=tmp_path / "more", cache=folder / "cache"))
        flags = ["--model_name_or_path", str(folder / "slrm"), "--dataset_name", str(folder / "pairs.parquet")]
        main(["slrm", "--config", str(recipe), *flags, "--max_steps", "1", "--dry_run", str(dry_run)])
        assert ("`slrm` with" in capsys.readouterr().out) == dry_run
        if not dry_run:
            before, after = (SLRMModel.from_pretrained(path) for path in (folder / "slrm", tmp_path / "more"))
            assert after.config.base_model_name_or_path == str(folder / "base")
            distances = [(a - b).abs().max() for a, b in zip(after.parameters(), before.parameters(), strict=True)]
            assert 0 < max(distances) <= 1.1e-2  # one step of 1e-2

    def test_writes_a_card_without_local_paths(self, folder):
        card = (folder / "slrm" / "README.md").read_text()
        assert "SLRMModel.from_pretrained" in card
        assert str(folder) not in card


class TestTAPO:
    def test_writes_lora_weights_that_diffusers_loads(self, folder):
        pipeline = StableDiffusion3Pipeline.from_pretrained(folder / "base", text_encoder_3=None, tokenizer_3=None)
        pipeline.load_lora_weights(folder / "tapo")
        matrices = {name: p for name, p in pipeline.transformer.named_parameters() if ".lora_B" in name}
        assert matrices
        assert any((matrix != 0).any() for matrix in matrices.values())
        scaling = pipeline.transformer.transformer_blocks[0].attn.to_q.scaling
        assert list(scaling.values()) == [3.0]

    def test_callbacks_of_the_flags_ran(self, folder):
        assert sorted(path.name for path in (folder / "tapo" / "samples").glob("*.png")) == [
            "step_000000.png",
            "step_000001.png",
            "step_000002.png",
        ]
        assert (folder / "tapo" / "samples" / "prompts.txt").read_text().split("\n")[:2] == PROMPTS[6:]
        assert (folder / "tapo" / "ema" / "pytorch_lora_weights.safetensors").is_file()

    def test_writes_a_card_without_local_paths(self, folder):
        card = (folder / "tapo" / "README.md").read_text()
        assert "load_lora_weights" in card
        assert str(folder) not in card


class TestOnlineMethods:
    @pytest.mark.parametrize("command", ["online_dpo", "grpo", "refl", "nft"])
    def test_writes_lora_weights_that_diffusers_loads(self, folder, command):
        pipeline = StableDiffusion3Pipeline.from_pretrained(folder / "base", text_encoder_3=None, tokenizer_3=None)
        pipeline.load_lora_weights(folder / command)
        assert any((p != 0).any() for name, p in pipeline.transformer.named_parameters() if ".lora_B" in name)
        card = (folder / command / "README.md").read_text()
        option = "num_grad_steps" if command == "refl" else "num_generations"
        assert "on the prompts of" in card and f"| `{option}` | 2 |" in card and str(folder) not in card
        logs = json.loads((folder / command / "trainer_state.json").read_text())["log_history"]
        assert any("eval_reward" in log for log in logs)
        assert any("gradient_share/step_01" in log or "gradient_share/step_00" in log for log in logs) == (
            command == "grpo"
        )


class TestSFT:
    def test_writes_lora_weights_samples_and_an_average(self, folder):
        pipeline = StableDiffusion3Pipeline.from_pretrained(folder / "base", text_encoder_3=None, tokenizer_3=None)
        pipeline.load_lora_weights(folder / "sft")
        assert any((p != 0).any() for name, p in pipeline.transformer.named_parameters() if ".lora_B" in name)
        assert (folder / "sft" / "ema" / "pytorch_lora_weights.safetensors").is_file()
        assert (folder / "sft" / "samples" / "prompts.txt").read_text().split() == "prompt g prompt h".split()
        logs = json.loads((folder / "sft" / "trainer_state.json").read_text())["log_history"]
        assert any("eval_loss/sigma_0.5" in log for log in logs)
        assert str(folder) not in (folder / "sft" / "README.md").read_text()


class TestDPO:
    def test_writes_lora_weights_that_diffusers_loads(self, folder):
        pipeline = StableDiffusion3Pipeline.from_pretrained(folder / "base", text_encoder_3=None, tokenizer_3=None)
        pipeline.load_lora_weights(folder / "dpo")
        assert any((p != 0).any() for name, p in pipeline.transformer.named_parameters() if ".lora_B" in name)
        assert (folder / "dpo" / "ema" / "pytorch_lora_weights.safetensors").is_file()

    def test_flags_override_the_recipe_and_samples_are_of_held_out_prompts(self, folder):
        card = (folder / "dpo" / "README.md").read_text()
        assert "| `beta` | 300" in card and "| `variant` | dense_reward |" in card and "pairs.parquet" in card
        assert str(folder) not in card
        assert (folder / "dpo" / "samples" / "prompts.txt").read_text().split() == "prompt g prompt h".split()
        logs = json.loads((folder / "dpo" / "trainer_state.json").read_text())["log_history"]
        assert any("eval_rewards/accuracies" in log for log in logs)


class TestSample:
    def sample(self, folder, output, *flags):
        argv = ["sample", "--model_name_or_path", str(folder / "base"), "--output_dir", str(output)]
        main([*argv, "--num_inference_steps", "2", "--resolution", "32", "--prompts", *PROMPTS[:3], *flags])
        return [np.asarray(Image.open(output / f"{index:03d}.png")) for index in range(3)]

    def test_images_depend_on_seed_and_weights_only(self, folder, tmp_path):
        first = self.sample(folder, tmp_path / "a")
        batched = self.sample(folder, tmp_path / "b", "--batch_size", "1")
        reseeded = self.sample(folder, tmp_path / "c", "--seed", "1")
        trained = self.sample(folder, tmp_path / "d", "--lora", str(folder / "tapo"))
        assert all(image.shape == (32, 32, 3) for image in first)
        assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(first, batched, strict=True))
        assert any((a != b).any() for a, b in zip(first, reseeded, strict=True))
        assert any((a != b).any() for a, b in zip(first, trained, strict=True))
        assert Image.open(tmp_path / "a" / "grid.png").size == (256, 256)

    def test_methods_on_the_same_prompts_and_seeds(self, folder, tmp_path):
        """Each method draws what it draws alone; a folder with a pipeline is one, any other a LoRA."""
        argv = ["sample", "--model_name_or_path", str(folder / "base"), "--output_dir", str(tmp_path / "all")]
        argv += ["--num_inference_steps", "2", "--resolution", "32", "--prompts", *PROMPTS[:3], "--seed", "3"]
        main([*argv, "--methods", f"tapo={folder / 'tapo'}", f"whole={folder / 'base'}"])
        alone = {"base": [], "tapo": ["--lora", str(folder / "tapo")], "whole": []}
        for name, flags in alone.items():
            expected = self.sample(folder, tmp_path / name, "--seed", "3", *flags)
            for index, image in enumerate(expected):
                assert (np.asarray(Image.open(tmp_path / "all" / name / f"{index:03d}.png")) == image).all()
        width, height = Image.open(tmp_path / "all" / "grid.png").size
        assert width > 3 * 128 and height > 3 * 128


class TestEvaluate:
    def test_accuracy_and_rewards(self, folder, tmp_path, capsys):
        main(
            [
                *["evaluate", "--slrm", str(folder / "slrm"), "--model_name_or_path", str(folder / "base")],
                *[
                    "--dataset_name",
                    str(folder / "pairs.parquet"),
                    "--dataset_test_split",
                    "train",
                    "--max_pairs",
                    "4",
                ],
                *["--sigmas", "0.25", "0.75", "--output_file", str(tmp_path / "out" / "result.json")],
                *["--reward_model", f"{__name__}:held_out_reward", "--prompts", str(folder / "prompts.txt")],
                *["--num_inference_steps", "2", "--resolution", "32"],
            ]
        )
        result = json.loads((tmp_path / "out" / "result.json").read_text())
        assert json.loads(capsys.readouterr().out) == result
        assert set(result["slrm_accuracy"]) == {"ground_truth", "reference"}
        for by_sigma in result["slrm_accuracy"].values():
            assert set(by_sigma) == {"0.25", "0.75"}
            assert all(4 * accuracy in range(5) for accuracy in by_sigma.values())
        assert 0 < result["rewards"][f"{__name__}:held_out_reward"] < 1


class TestVideo:
    """The same commands on a pipeline of videos."""

    @pytest.fixture(scope="class")
    def videos(self, tmp_path_factory):
        pytest.importorskip("av")
        folder = tmp_path_factory.mktemp("videos")
        tiny_wan_pipeline().save_pretrained(folder / "base")
        (folder / "prompts.txt").write_text("\n".join(PROMPTS))
        (folder / "pairs").mkdir()
        pairs = {"prompt": PROMPTS[:4], "chosen": [], "rejected": []}
        for index in range(4):
            for side in ("chosen", "rejected"):
                file = folder / "pairs" / f"{side}_{index}.mp4"
                write_video(file, torch.rand(3, 5, 32, 32), fps=8)
                pairs[side].append(str(file))
        Dataset.from_dict(pairs).to_parquet(folder / "pairs.parquet")
        common = COMMON.replace("max_steps: 2", "max_steps: 1") + "num_frames: 5\nfps: 8\n"
        base = ["--model_name_or_path", str(folder / "base")]

        recipe = folder / "slrm.yaml"
        recipe.write_text(common.format(output=folder / "slrm", cache=folder / "cache"))
        main(["slrm", "--config", str(recipe), *base, "--dataset_name", str(folder / "pairs.parquet")])
        recipe = folder / "tapo.yaml"
        recipe.write_text(
            common.format(output=folder / "tapo", cache=folder / "cache")
            + "num_inference_steps: 3\nnum_sde_steps: 1\nnum_candidates: 2\nuse_peft: true\nlora_r: 2\n"
            + "sample_every_steps: 1\nsample_prompts: [a cat]\nvae_tiling: true\nvae_slicing: true\n"
        )
        flags = ["--dataset_name", str(folder / "prompts.txt"), "--reward_model", str(folder / "slrm")]
        main(["tapo", "--config", str(recipe), *base, *flags, "--reward_layerwise_casting", "true"])
        return folder

    def test_training_writes_videos_and_lora_weights(self, videos):
        names = sorted(path.name for path in (videos / "tapo" / "samples").iterdir())
        assert names == ["prompts.txt", *(f"step_00000{step}.{kind}" for step in (0, 1) for kind in ("mp4", "png"))]
        pipeline = tiny_wan_pipeline()
        pipeline.load_lora_weights(videos / "tapo")
        assert any(".lora_B" in name for name, _ in pipeline.transformer.named_parameters())

    def test_sample(self, videos, tmp_path):
        argv = ["sample", "--model_name_or_path", str(videos / "base"), "--output_dir", str(tmp_path)]
        argv += ["--lora", str(videos / "tapo"), "--num_inference_steps", "2", "--resolution", "32"]
        main([*argv, "--num_frames", "5", "--prompts", *PROMPTS[:2], "--fps", "8"])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["000.mp4", "001.mp4", "grid.mp4", "grid.png"]
        assert Image.open(tmp_path / "grid.png").size == (5 * 128, 2 * 128)

    def test_evaluate(self, videos, tmp_path, capsys):
        argv = ["evaluate", "--slrm", str(videos / "slrm"), "--model_name_or_path", str(videos / "base")]
        argv += ["--dataset_name", str(videos / "pairs.parquet"), "--dataset_test_split", "train", "--sigmas", "0.5"]
        argv += ["--reward_model", f"{__name__}:mean_of_videos", "--prompts", "a cat", "--num_inference_steps", "2"]
        main([*argv, "--resolution", "32", "--num_frames", "5", "--fps", "8"])
        result = json.loads(capsys.readouterr().out)
        assert set(result["slrm_accuracy"]) == {"ground_truth", "reference"}
        assert 0 < result["rewards"][f"{__name__}:mean_of_videos"] < 1
