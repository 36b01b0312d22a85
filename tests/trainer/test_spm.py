# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""The step-aware preference model in training, evaluation and rollouts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tapo_trl import SLRMConfig, SLRMTrainer, SPMModel, TAPOConfig, TAPOTrainer, load_reward_model
from tapo_trl.cli.main import main
from tapo_trl.metrics import diagnose_scores, evaluate_preference_accuracy, score_pairs
from tapo_trl.policies import SD3Policy, WanPolicy
from tapo_trl.rewards import EstimateReward
from tapo_trl.runs.hub import collect_upload
from tapo_trl.trainer.reward_setup import load_reward
from tests.data.preference_pairs import color_pairs, latent_pairs
from tests.testing_utils import save_tiny_clip, tiny_sd3_pipeline, tiny_wan_pipeline


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_sd3_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_args(tmp_path, clip_folder):
    def make(name: str = "out", **kwargs) -> SLRMConfig:
        defaults = {
            "reward_model_type": "spm",
            "spm_clip_model": clip_folder,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            "resolution": 32,
            "max_sequence_length": 16,
            "cache_dir": str(tmp_path / "cache"),
            "learning_rate": 1e-3,
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "eval_sigmas": [0.2, 0.8],
        }
        return SLRMConfig(str(tmp_path / name), **(defaults | kwargs))

    return make


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def moved(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in module.named_parameters() if not torch.equal(tensor, before[name])}


class TestTraining:
    @pytest.mark.slow
    def test_learns_a_preference_against_its_first_opinion(self, make_args):
        policy = SD3Policy(tiny_sd3_pipeline())
        args = make_args(max_steps=60, learning_rate=5e-3, per_device_train_batch_size=8, logging_steps=60)
        pairs, held_out = color_pairs(32), color_pairs(16, seed=1)

        def accuracy() -> float:
            result = evaluate_preference_accuracy(
                trainer.model, policy, held_out, [0.2, 0.6], cache_dir=args.cache_dir
            )
            return np.mean(list(result["none"].values()))

        def swapped(pairs: Dataset) -> Dataset:
            return pairs.rename_columns({"chosen": "rejected", "rejected": "chosen"})

        trainer = SLRMTrainer(policy, args, train_dataset=pairs)
        if accuracy() > 0.5:
            pairs, held_out = swapped(pairs), swapped(held_out)
            trainer = SLRMTrainer(policy, args, train_dataset=pairs)
        assert accuracy() <= 0.5
        trainer.train()
        assert accuracy() > 0.9

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_loss_is_bradley_terry_of_the_scores_at_one_level_and_noise(self, checkpointing, make_args):
        args = make_args(activation_checkpointing=checkpointing)
        trainer = SLRMTrainer(tiny_sd3_pipeline(), args, train_dataset=latent_pairs(4))
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        sigma, noise = trainer._draw_noise(inputs["row"].tolist())
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        policy, embeds, t = trainer.policy, inputs["prompt_embeds"], sigma.view(-1, 1, 1, 1)
        scores = []
        with torch.no_grad():
            for side in ("chosen", "rejected"):
                noisy = (1 - t) * inputs[f"{side}_latents"] + t * noise[:4]
                clean = noisy - t * policy.velocity(policy.transformer, noisy, sigma, embeds)
                scores.append(trainer.model.score(policy.decode(clean), sigma, inputs["prompt"]).double())
        assert torch.equal(noise[:4], noise[4:]) and sigma.unique().numel() == 4
        expected = torch.log(1 + torch.exp(scores[1] - scores[0])).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("options", "peft_config", "expected"),
        [
            ({}, None, ("clip.", "modulation.")),
            ({"freeze_backbone": True}, None, ("modulation.",)),
            ({"bf16": True, "use_cpu": True}, None, ("clip.", "modulation.")),
            ({}, LoraConfig(r=2), ("lora_", "modulation.")),
        ],
    )
    def test_what_is_trained(self, options, peft_config, expected, make_args):
        policy = SD3Policy(tiny_sd3_pipeline())
        args = make_args(max_steps=3, **options)
        trainer = SLRMTrainer(policy, args, train_dataset=latent_pairs(8), peft_config=peft_config)
        frozen = [policy.transformer, policy.vae]
        before, untouched = weights(trainer.model), [weights(module) for module in frozen]
        trainer.train()
        changed = moved(trainer.model, before)
        assert all(any(part in name for part in expected) for name in changed)
        names = {name for name, _ in trainer.model.named_parameters() if any(part in name for part in expected)}
        missing = {
            name
            for name in names - changed
            # The softmax of attention does not change with the bias of the keys.
            if "k_proj.bias" not in name
        }
        assert not missing
        assert all(difference(weights(m), old) == 0 for m, old in zip(frozen, untouched, strict=True))

    @pytest.mark.parametrize("lora", [False, True])
    def test_all_that_is_trainable_gets_a_gradient(self, lora, make_args):
        peft_config = LoraConfig(r=2) if lora else None
        trainer = SLRMTrainer(tiny_sd3_pipeline(), make_args(), train_dataset=latent_pairs(4), peft_config=peft_config)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.model.train()
        trainer.compute_loss(trainer.model, inputs).backward()
        trainable = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert len(trainable) > 8
        assert not [name for name, parameter in trainable.items() if parameter.grad is None]

    @pytest.mark.slow
    def test_pixels_that_are_encoded_on_the_way(self, make_args):
        losses = []
        for cached in (True, False):
            args = make_args(f"cached-{cached}", cache_latents=cached)
            trainer = SLRMTrainer(tiny_sd3_pipeline(), args, train_dataset=color_pairs(4))
            trainer.train()
            losses.append(trainer.state.log_history[-1]["train_loss"])
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)

    def test_logs_evaluation_and_diagnosis(self, make_args):
        args = make_args(eval_strategy="steps", eval_steps=2)
        held_out = latent_pairs(6, seed=1)
        trainer = SLRMTrainer(tiny_sd3_pipeline(), args, train_dataset=latent_pairs(16), eval_dataset=held_out)
        trainer.train()
        first = next(log for log in trainer.state.log_history if "loss" in log)
        assert all(np.isfinite(first[name]) for name in ("loss", "accuracy", "margin", "mean_reward"))
        evaluated = next(log for log in trainer.state.log_history if "eval_loss" in log)
        options = {"seed": args.seed, "cache_dir": args.cache_dir}
        expected = evaluate_preference_accuracy(trainer.model, trainer.policy, held_out, [0.2, 0.8], **options)
        assert list(expected) == ["none"]
        for sigma, accuracy in expected["none"].items():
            assert evaluated[f"eval_accuracy_none/sigma_{sigma}"] == pytest.approx(accuracy)
        scores = score_pairs(trainer.model, trainer.policy, held_out, [0.2, 0.8], **options)
        assert (scores.chosen["none"][0] - scores.chosen["none"][1]).abs().max() > 1e-3
        assert diagnose_scores(scores)["none"]["accuracy"]["num_pairs"] == 12


@pytest.mark.parametrize("lora", [False, True])
class TestCheckpoints:
    @pytest.mark.slow
    def test_resume_is_exact(self, lora, make_args, pipeline_folder):
        def make(name):
            args = make_args(name, max_steps=4, save_strategy="steps", save_steps=2, per_device_train_batch_size=5)
            peft_config = LoraConfig(r=2) if lora else None
            return SLRMTrainer(pipeline_folder, args, train_dataset=latent_pairs(16), peft_config=peft_config)

        straight, resumed = make("straight"), make("resumed")
        straight.train()
        checkpoint = f"{straight.args.output_dir}/checkpoint-2"
        resumed.train(resume_from_checkpoint=checkpoint)
        assert difference(weights(resumed.model), weights(straight.model)) == 0
        assert difference(load_reward_model(checkpoint).state_dict(), weights(straight.model)) > 0

    @pytest.mark.slow
    def test_saved_model_is_the_trained_one_and_goes_on(self, lora, make_args, pipeline_folder, clip_folder, tmp_path):
        peft_config = LoraConfig(r=2) if lora else None
        trainer = SLRMTrainer(pipeline_folder, make_args(), train_dataset=latent_pairs(8), peft_config=peft_config)
        trainer.train()
        trainer.save_model()
        folder = trainer.args.output_dir
        loaded = load_reward_model(folder)
        assert type(loaded) is SPMModel
        assert difference(weights(trainer.model), loaded.state_dict()) == 0
        assert (loaded.config.max_sequence_length, loaded.config.resolution) == (16, 32)
        card = open(f"{folder}/README.md").read()
        for text in ("step-aware preference model (SPM)", "SPMModel.from_pretrained", "liang2024step", "- spm\n"):
            assert text in card, text
        assert clip_folder not in card and "embeds.pooled_prompt_embeds" not in card and "xian2026" not in card

        collect_upload(tmp_path / "upload", Path(folder), Path(folder), is_final=True)
        published = json.loads((tmp_path / "upload" / "config.json").read_text())
        assert published["clip_model_name_or_path"] == published["base_model_name_or_path"] == ""
        again = load_reward_model(tmp_path / "upload", base_model=clip_folder if lora else None)
        assert difference(again.state_dict(), loaded.state_dict()) == 0
        assert torch.equal(again.tokenize(["a fox"]), loaded.tokenize(["a fox"]))

        longer = SLRMTrainer(folder, make_args("longer"), train_dataset=latent_pairs(8))
        assert difference(weights(longer.model), weights(trainer.model)) == 0
        longer.train()
        assert difference(weights(longer.model), weights(trainer.model)) > 0
        with pytest.raises(ValueError, match="`model` is a SPM, .*: set `reward_model_type='spm'`"):
            SLRMTrainer(folder, make_args("other", reward_model_type="slrm", spm_clip_model="yuvalkirstain/PickScore_v1"),
                        train_dataset=latent_pairs(2))  # fmt: skip


def tapo_args(tmp_path, **kwargs) -> TAPOConfig:
    defaults = {
        "cache_dir": str(tmp_path / "cache"),
        "resolution": 32,
        "max_sequence_length": 3,
        "num_inference_steps": 6,
        "num_sde_steps": 3,
        "num_candidates": 2,
        "max_steps": 1,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TAPOConfig(str(tmp_path / "out"), **(defaults | kwargs))


class TestRollouts:
    def test_every_latent_goes_through_the_policy_once(self, tmp_path, clip_folder, monkeypatch):
        """With T steps and P candidates: the velocity at the candidates is that of the next step, too."""
        SPMModel.from_policy(SD3Policy(tiny_sd3_pipeline()), clip_folder).save_pretrained(tmp_path / "spm")
        forwards, velocity = [], SD3Policy.velocity

        def record(self, model, latents, sigma, *args, **kwargs):
            if not torch.is_grad_enabled():
                forwards.append((round(float(sigma), 6), latents.clone()))
            return velocity(self, model, latents, sigma, *args, **kwargs)

        trainer = TAPOTrainer(
            tiny_sd3_pipeline(), str(tmp_path / "spm"), tapo_args(tmp_path, guidance_scale=2.0),
            train_dataset=Dataset.from_dict({"prompt": ["cat", "dog"]}), peft_config=LoraConfig(r=2),
        )  # fmt: skip
        monkeypatch.setattr(SD3Policy, "velocity", record)
        pairs = trainer.rollout([{"prompt": "cat", "tapo_row": 0}], seed_step=0)

        steps, sigmas = trainer.step_indices, [round(sigma, 6) for sigma in trainer.scheduler.sigmas.tolist()]
        # One forward per level: of the trajectory before the first stochastic step, then either at the 2 x P candidates
        # after a stochastic step or, after a deterministic one, at the 2 branches.
        candidates = {sigmas[index + 1] for index in steps}
        expected = [
            (sigma, 4 if sigma in candidates else 1 if index <= steps[0] else 2)
            for index, sigma in enumerate(sigmas)
            if index < 6 or sigma in candidates
        ]
        assert [(sigma, len(latents)) for sigma, latents in forwards] == expected
        assert len(forwards) <= 7 and np.isfinite(pairs.rewards).all()
        rows = torch.cat([latents.flatten(1) for _, latents in forwards])
        assert len(rows.unique(dim=0)) == len(rows)

    def test_training_with_it_and_another_reward(self, tmp_path, clip_folder):
        def brightness(images, prompts):
            return images.mean((1, 2, 3))

        model = SPMModel.from_policy(SD3Policy(tiny_sd3_pipeline()), clip_folder)
        trainer = TAPOTrainer(
            tiny_sd3_pipeline(), [model, brightness], tapo_args(tmp_path, score_batch_size=3),
            train_dataset=Dataset.from_dict({"prompt": ["cat", "dog", "fox", "owl"]}), peft_config=LoraConfig(r=2),
        )  # fmt: skip
        before = weights(model)
        trainer.train()
        assert difference(weights(model), before) == 0
        logs = trainer.state.log_history[0]
        assert np.isfinite(logs["reward_gap"]) and {"rewards/spm/mean", "rewards/brightness/mean"} <= logs.keys()

    def test_a_policy_that_it_does_not_fit(self, tmp_path, clip_folder):
        model = SPMModel.from_policy(SD3Policy(tiny_sd3_pipeline()), clip_folder)
        with pytest.raises(ValueError, match="VAE"):
            load_reward(model, SD3Policy(tiny_sd3_pipeline(seed=1)), tapo_args(tmp_path))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"velocity_target": "parent"}, "`velocity_target='parent'` is for SLRMs, but the reward model is a SPM"),
            (
                {"reward_layerwise_casting": True},
                "`reward_layerwise_casting=True` is for reward models on a diffusion",
            ),
            ({"score_estimates": True}, "`score_estimates=True` has no effect on an SPM"),
        ],
    )
    def test_options_that_mean_nothing_to_it(self, options, message, tmp_path, clip_folder):
        policy = SD3Policy(tiny_sd3_pipeline())
        model = SPMModel.from_policy(policy, clip_folder)
        assert isinstance(load_reward(model, policy, tapo_args(tmp_path)), EstimateReward)
        with pytest.raises(ValueError, match=message):
            load_reward(model, policy, tapo_args(tmp_path, **options))


class TestCommands:
    @pytest.mark.slow
    def test_train_evaluate_diagnose_and_use(self, tmp_path, pipeline_folder, clip_folder, capsys):
        color_pairs(8).to_parquet(tmp_path / "pairs.parquet")
        data = ["--dataset_name", str(tmp_path / "pairs.parquet")]
        main(
            ["slrm", "--model_name_or_path", pipeline_folder, *data, "--output_dir", str(tmp_path / "spm"),
             "--reward_model_type", "spm", "--spm_clip_model", clip_folder, "--use_peft", "--lora_r", "2",
             "--resolution", "32", "--max_sequence_length", "16", "--cache_dir", str(tmp_path / "cache"),
             "--max_steps", "2", "--per_device_train_batch_size", "4", "--bf16", "false", "--use_cpu", "true",
             "--report_to", "none", "--disable_tqdm", "true"]
        )  # fmt: skip
        capsys.readouterr()
        scored = ["--slrm", str(tmp_path / "spm"), *data, "--dataset_test_split", "train", "--sigmas", "0.2", "0.8"]
        main(["evaluate", *scored, "--output_file", str(tmp_path / "result.json")])
        accuracy = json.loads((tmp_path / "result.json").read_text())["slrm_accuracy"]["none"]
        assert set(accuracy) == {"0.2", "0.8"} and all(0 <= value <= 1 for value in accuracy.values())
        main(["diagnose", *scored, "--output_dir", str(tmp_path / "diagnosis")])
        assert "none" in json.loads((tmp_path / "diagnosis" / "diagnosis.json").read_text())["rewards"]

    def test_dry_runs(self, tmp_path, pipeline_folder, clip_folder, capsys):
        common = [
            "--model_name_or_path",
            pipeline_folder,
            "--resolution",
            "32",
            "--bf16",
            "false",
            "--use_cpu",
            "true",
        ]
        for options in ([], ["--use_peft"]):
            main(["slrm", *common, "--dataset_name", "none.parquet", "--output_dir", str(tmp_path / "out"), "--dry_run",
                  "--reward_model_type", "spm", "--spm_clip_model", clip_folder, *options])  # fmt: skip
            report = capsys.readouterr().out
            assert "The activations of the CLIP and of the VAE are not estimated" in report
            assert "2 base model" in report and " VAE " in report
        model = SPMModel.from_policy(SD3Policy(tiny_sd3_pipeline()), clip_folder)
        model.save_pretrained(tmp_path / "spm")
        number = f"{sum(parameter.numel() for parameter in model.parameters()):,} reward model"
        tapo = [
            "tapo",
            *common,
            "--reward_model",
            str(tmp_path / "spm"),
            "--output_dir",
            str(tmp_path / "out"),
            "--dry_run",
        ]
        main(tapo)
        report = capsys.readouterr().out
        assert number in report and "policy, at the candidates" in report
        with pytest.raises(ValueError, match="`reward_layerwise_casting=True` is for reward models on a diffusion"):
            main([*tapo, "--reward_layerwise_casting", "true"])


def test_wan_is_refused_before_any_work(make_args):
    policy = WanPolicy(tiny_wan_pipeline())
    policy.vae.encode = policy.encode_prompts = None
    with pytest.raises(ValueError, match="An SPM rates images, but a `WanPolicy` makes videos"):
        SLRMTrainer(policy, make_args(num_frames=5), train_dataset=latent_pairs(2, (4, 2, 4, 4)))
