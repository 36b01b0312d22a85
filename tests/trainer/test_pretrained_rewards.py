# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Pretrained scorers by their names, in trainers and commands."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from tapo_trl import RewardHackingGuardCallback, TAPOTrainer
from tapo_trl.cli.main import main
from tapo_trl.policies import SD3Policy
from tapo_trl.rewards.loading import init_kwargs_of
from tapo_trl.rewards.pretrained import PretrainedReward, check_reward_name, is_reward_name
from tapo_trl.rewards.pretrained.clip import CLIPReward, PickScoreReward
from tapo_trl.rewards.scoring import PixelReward, standardize_groups
from tapo_trl.scripts.utils import TAPOScriptArguments, load_guard_reward, load_reward_models
from tapo_trl.trainer.reward_setup import check_reward_functions, check_rewards, load_reward
from tests.testing_utils import save_tiny_clip, tiny_sd3_pipeline
from tests.trainer.test_flow_grpo_trainer import make_trainer as make_grpo_trainer
from tests.trainer.test_tapo_trainer import make_args, make_trainer, redness


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def tiny_weights(monkeypatch, clip_folder):
    for scorer in (CLIPReward, PickScoreReward):
        monkeypatch.setattr(scorer, "weights", clip_folder)


class VideoScorer(PretrainedReward):
    name, reads = "videos", "video"

    def raw_scores(self, images, prompts):
        return images.flatten(1).mean(1)


class TestNames:
    def test_name_or_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert is_reward_name("ocr") and not is_reward_name("./ocr") and not is_reward_name("me/ocr")
        (tmp_path / "ocr").mkdir()
        assert not is_reward_name("./ocr")
        with pytest.raises(ValueError, match="`ocr` is the name of a reward and of a folder here: write `./ocr`"):
            is_reward_name("ocr")

    def test_unknown(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(
            ValueError, match="`pikscore` is neither a folder here nor a reward. Did you mean `pickscore`"
        ):
            load_reward_models(["clip", "pikscore"])
        (tmp_path / "pikscore").mkdir()
        check_reward_name("pikscore")
        assert load_reward_models(["clip", "me/slrm"]) == ["clip", "me/slrm"]

    def test_guard(self, tiny_weights):
        reward = load_guard_reward("clip")
        assert isinstance(reward, CLIPReward) and reward.offload
        with pytest.raises(ValueError, match="`guard_reward` must be a function, .* or one of aesthetic, clip"):
            load_guard_reward("me/slrm")

    def test_arguments_of_the_guard(self, clip_folder):
        args = TAPOScriptArguments(
            guard_reward="clip", guard_reward_init_kwargs=json.dumps({"weights": str(clip_folder), "scale": 2.0})
        )
        reward = load_guard_reward(args.guard_reward, args.guard_reward_init_kwargs)
        assert isinstance(reward, CLIPReward) and reward.offload and reward.factor == 2.0
        for guard in (None, "a.module:function"):
            with pytest.raises(ValueError, match="`guard_reward_init_kwargs` is for a `guard_reward` that is"):
                TAPOScriptArguments(guard_reward=guard, guard_reward_init_kwargs={"scale": 2.0})

    def test_the_guard_checks_prompts_and_policy_before_the_training(self):
        class Quoted(VideoScorer):
            @classmethod
            def check_prompts(cls, prompts):
                raise ValueError(f"no quotes in {prompts}")

        with pytest.raises(ValueError, match="no quotes"):
            RewardHackingGuardCallback(Quoted(), ["cat"], 1)
        guard = RewardHackingGuardCallback(VideoScorer(), ["cat"], 1)
        with pytest.raises(ValueError, match="`videos` reads videos, but a `SD3Policy` makes images"):
            guard.attach(SimpleNamespace(policy=SD3Policy(tiny_sd3_pipeline())))


class TestSetup:
    @pytest.fixture(scope="class")
    @classmethod
    def policy(cls):
        return SD3Policy(tiny_sd3_pipeline())

    def test_loads_with_its_arguments(self, tmp_path, policy, clip_folder):
        kwargs = {
            "torch_dtype": "bfloat16",
            "clip": {"weights": clip_folder, "batch_size": 3},
            "me/slrm": {"revision": "a"},
        }
        args = make_args(tmp_path, reward_model_init_kwargs=kwargs)
        assert init_kwargs_of("me/slrm", kwargs) == {"torch_dtype": "bfloat16", "revision": "a"}
        check_rewards(["clip", "me/slrm"], args)
        reward = load_reward("clip", policy, args)
        assert isinstance(reward, PixelReward) and reward.__name__ == "clip" and reward.function.batch_size == 3
        assert reward.function.clip.visual_projection.weight.dtype is torch.bfloat16
        with pytest.raises(ValueError, match="has arguments for `clip`, but `reward_model` is"):
            check_rewards(["pickscore", "me/slrm"], args)

    @pytest.mark.parametrize("rewards", [["clip"], ["clip", redness]])
    def test_options_of_latent_reward_models(self, tmp_path, rewards):
        for options in ({"reward_layerwise_casting": True}, {"velocity_target": "parent"}, {"score_estimates": True}):
            with pytest.raises(ValueError, match="every `reward_model` is a function: leave it unset"):
                check_rewards(rewards, make_args(tmp_path, **options))
            check_rewards([*rewards, "me/slrm"], make_args(tmp_path, **options))

    def test_prompts_are_checked_before_anything_is_loaded(self, tmp_path):
        check_reward_functions(["ocr"], [Dataset.from_dict({"prompt": ['"a"']}), None])
        with pytest.raises(ValueError, match="prompt 'cat' has none: write it as in"):
            TAPOTrainer("no/such-pipeline", "ocr", make_args(tmp_path), Dataset.from_dict({"prompt": ["cat"]}))

    def test_unknown_names_and_columns_are_refused_before_anything_is_loaded(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        args, prompts = make_args(tmp_path), Dataset.from_dict({"prompt": ["cat"], "images": [1]})
        with pytest.raises(
            ValueError, match="`pikscore` is neither a folder here nor a reward. Did you mean `pickscore`"
        ):
            TAPOTrainer("no/such-pipeline", "pikscore", args, prompts)
        with pytest.raises(ValueError, match=r"arguments of the reward function `clip`: \['images'\]"):
            TAPOTrainer("no/such-pipeline", "clip", args, prompts)

    def test_videos_are_not_images(self, tmp_path, policy):
        with pytest.raises(ValueError, match="`videos` reads videos, but a `SD3Policy` makes images"):
            load_reward(VideoScorer(), policy, make_args(tmp_path))


def test_standardize_groups():
    scores = torch.tensor([1.0, 10.0, 3.0, 20.0, 5.0, 7.0])
    found = standardize_groups(scores, ["a", "b", "a", "b", "a", "c"])
    spread = (8 / 3) ** 0.5
    torch.testing.assert_close(found, torch.tensor([-2 / spread, -1.0, 0.0, 1.0, 2 / spread, 0.0]))


class TestTrainer:
    def rewards(self, tmp_path, clip_folder, **kwargs):
        weights = {name: {"weights": clip_folder} for name in ("clip", "pickscore")}
        options = {"reward_model_init_kwargs": weights, "reward_weights": [1.0, 0.5], "max_steps": 1} | kwargs
        trainer = make_trainer(tmp_path, ["clip", "pickscore"], **options)
        rollout = trainer.rollout([trainer.train_dataset[index] for index in range(2)])
        return trainer, rollout

    def test_weighted_sum(self, tmp_path, clip_folder):
        trainer, rollout = self.rewards(tmp_path, clip_folder)
        parts = rollout.reward_parts
        assert list(parts) == ["clip", "pickscore"] and parts["pickscore"].std() > 0
        torch.testing.assert_close(rollout.rewards, parts["clip"] + 0.5 * parts["pickscore"])
        trainer.train()
        logs = trainer.state.log_history[0]
        assert {"rewards/clip/mean", "rewards/pickscore/mean"} <= logs.keys()

    def test_standardised_over_the_candidates_of_a_prompt(self, tmp_path, clip_folder):
        options = {"standardize_rewards": True, "num_candidates": 3}
        _, rollout = self.rewards(tmp_path, clip_folder, **options)
        standardized = 0
        for weight, part in zip(
            (1.0, 0.5), rollout.reward_parts.values(), strict=True
        ):  # (steps, branches, prompts, P)
            mean = part.mean((1, 3), keepdim=True)
            std = part.std((1, 3), keepdim=True, correction=0)
            standardized = standardized + weight * (part - mean) / std.where(std > 0, 1.0)
        torch.testing.assert_close(rollout.rewards, standardized, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("make", [make_trainer, make_grpo_trainer])
    def test_the_logged_reward_is_not_standardised(self, tmp_path, make):
        """Its mean would be 0, whatever the policy does."""
        logs = []
        for standardize in (False, True):
            trainer = make(tmp_path / str(standardize), redness, standardize_rewards=standardize, max_steps=1)
            trainer.train()
            logs.append(trainer.state.log_history[0])
        assert abs(logs[0]["reward"]) > 1e-3 and logs[0]["reward_std"] > 1e-3
        for name in ("reward", "reward_std"):
            assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-3), name


@pytest.mark.parametrize("command", ["tapo", "grpo", "online_dpo"])
def test_commands(tmp_path, tiny_weights, clip_folder, command):
    tiny_sd3_pipeline().save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("\n".join(f"prompt {letter}" for letter in "abcd"))
    flags = {
        "model_name_or_path": tmp_path / "base",
        "dataset_name": tmp_path / "prompts.txt",
        "dataset_split": "train[:2]",
        "dataset_test_split": "train[2:]",
        "reward_model_init_kwargs": json.dumps({"pickscore": {"scale": 0.1}}),
        "guard_reward": "clip",
        "guard_every_steps": 1,
        "output_dir": tmp_path / "out",
        "cache_dir": tmp_path / "cache",
        "resolution": 32,
        "max_sequence_length": 8,
        "num_inference_steps": 4,
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "logging_steps": 1,
        "standardize_rewards": True,
        "use_cpu": True,
        "bf16": False,
        "use_peft": True,
        "lora_r": 2,
        "report_to": "none",
        "disable_tqdm": True,
    }
    flags |= {"num_sde_steps": 2} if command != "online_dpo" else {"num_noise_levels": 2}
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    main([command, *argv, "--reward_model", "clip", "pickscore", "--reward_weights", "1", "2"])
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    logs = {name: value for entry in history for name, value in entry.items()}
    assert {"guard/held_out_reward", "rewards/clip/mean", "rewards/pickscore/mean"} <= logs.keys()
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()


def test_dry_run_counts_their_memory(tmp_path, capsys):
    tiny_sd3_pipeline().save_pretrained(tmp_path)
    kwargs = json.dumps({"pickscore": {"torch_dtype": "bf16"}})
    flags = ["--model_name_or_path", str(tmp_path), "--max_sequence_length", "8", "--resolution", "32", "--dry_run"]
    flags += ["--num_inference_steps", "2", "--num_sde_steps", "1", "--num_generations", "2"]
    flags += ["--reward_model", "clip", "pickscore", "ocr", "--reward_model_init_kwargs", kwargs]
    main(["grpo", *flags, "--guard_reward", "aesthetic"])
    output = capsys.readouterr().out
    assert f"{427_616_513 * 4 / 2**30:8.2f} reward `clip`" in output and "parameters x 4 bytes" in output
    assert f"{986_109_441 * 2 / 2**30:8.2f} reward `pickscore`" in output
    assert "0.00 reward `ocr`" in output and "it computes on the CPU" in output
    assert "reward `aesthetic`" in output and "only while the guard checks" in output
    assert "427,616,513 reward `clip`" in output


def test_dry_run_of_refl_counts_the_guard(tmp_path, capsys):
    tiny_sd3_pipeline().save_pretrained(tmp_path)
    flags = ["--model_name_or_path", str(tmp_path), "--max_sequence_length", "8", "--resolution", "32", "--dry_run"]
    guard = ["--guard_reward", "pickscore", "--guard_reward_init_kwargs", '{"torch_dtype": "bf16"}']
    main(["refl", *flags, "--num_inference_steps", "2", "--reward_model", "clip", *guard])
    assert f"{986_109_441 * 2 / 2**30:8.2f} reward `pickscore`" in capsys.readouterr().out


def test_list(capsys):
    main(["rewards"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["name", "reads", "range", "memory"]
    row = next(line for line in lines if line.startswith("pickscore"))
    assert "images" in row and "16 to 26" in row and "3.7 GiB" in row and "yuvalkirstain/PickScore_v1" in row
    assert "on the CPU" in next(line for line in lines if line.startswith("ocr"))
    main(["rewards", "--torch_dtype", "bf16"])
    assert "1.8 GiB" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("pickscore"))
