# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""`SLRMTrainer` on the reward models beside SLRM, and what they are trained for: rating the candidates of TAPO."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tapo_trl import SLRMConfig, SLRMModel, SLRMTrainer, TAPOConfig, TAPOTrainer, load_reward_model
from tapo_trl.cli.main import main
from tapo_trl.metrics import evaluate_preference_accuracy
from tapo_trl.policies import SD3Policy, WanPolicy, load_policy
from tapo_trl.rewards import REWARD_MODELS
from tapo_trl.rewards.scoring import LatentReward
from tapo_trl.trainer.reward_setup import load_reward, move_reward
from tests.data.preference_pairs import color_pairs, latent_pairs
from tests.testing_utils import tiny_sd3_pipeline, tiny_wan_pipeline


KINDS = ["lrm", "dina"]


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_sd3_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_args(tmp_path):
    def make(kind: str, name: str = "out", **kwargs) -> SLRMConfig:
        defaults = {
            "reward_model_type": kind,
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


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def train(args, dataset=None, model=None, **kwargs) -> SLRMTrainer:
    dataset = latent_pairs(16) if dataset is None else dataset
    trainer = SLRMTrainer(tiny_sd3_pipeline() if model is None else model, args, train_dataset=dataset, **kwargs)
    trainer.train()
    return trainer


def swapped(pairs: Dataset) -> Dataset:
    return pairs.rename_columns({"chosen": "rejected", "rejected": "chosen"})


def moved(trainer, before) -> set[str]:
    return {name for name, tensor in trainer.model.named_parameters() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("kind", KINDS)
class TestTraining:
    @pytest.mark.slow
    def test_learns_a_preference_against_its_first_opinion(self, kind, make_args):
        policy = SD3Policy(tiny_sd3_pipeline())
        args = make_args(kind, max_steps=60, learning_rate=5e-3, per_device_train_batch_size=8, logging_steps=60)
        pairs, held_out = color_pairs(32), color_pairs(16, seed=1)
        trainer = SLRMTrainer(policy, args, train_dataset=pairs)

        def accuracy() -> float:
            result = evaluate_preference_accuracy(
                trainer.model, policy, held_out, [0.2, 0.6], cache_dir=args.cache_dir
            )
            return np.mean(list(result["none"].values()))

        if accuracy() > 0.5:
            pairs, held_out = swapped(pairs), swapped(held_out)
            trainer = SLRMTrainer(policy, args, train_dataset=pairs)
        assert accuracy() <= 0.5
        trainer.train()
        assert accuracy() > 0.9

    @pytest.mark.parametrize("loss_type", ["bradley_terry", "thurstone"])
    def test_loss_is_that_of_the_scores(self, kind, loss_type, make_args):
        args = make_args(kind, loss_type=loss_type, center_rewards_coefficient=0.1)
        trainer = SLRMTrainer(tiny_sd3_pipeline(), args, train_dataset=latent_pairs(4))
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        sigma, noise = trainer._draw_noise(inputs["row"].tolist())
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, inputs)
        scores, t = [], sigma.view(-1, 1, 1, 1)
        for side, x1 in zip(("chosen", "rejected"), noise.chunk(2), strict=True):
            embeds = inputs["prompt_embeds"]
            noisy = (1 - t) * inputs[f"{side}_latents"] + t * x1
            scores.append(
                trainer.model.score(noisy, sigma, embeds.prompt_embeds, embeds.pooled_prompt_embeds).double()
            )
        delta = scores[0] - scores[1]
        if loss_type == "thurstone":
            p = torch.distributions.Normal(0, 1).cdf(delta / (2 * (2 * sigma.double() ** 2 + 0.05)).sqrt())
            expected = 1 - p.sqrt()
        else:
            expected = torch.log(1 + torch.exp(-delta))
        expected = expected + 0.1 * (scores[0] + scores[1]).square()
        assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-4, abs=1e-5)

    @pytest.mark.slow
    def test_what_is_trained(self, kind, make_args):
        unreached = {  # what is frozen, and what does not change a difference
            "lrm": ("transformer.transformer_blocks.1.ff_context", "transformer.transformer_blocks.1.attn.to_add_out"),
            "dina": ("head.readout.bias", "head.ff.2.bias"),
        }[kind] + (
            "transformer.transformer_blocks.1.attn.add_q_proj",
            "transformer.transformer_blocks.1.attn.norm_added_q",
        )
        for options in ({}, {"freeze_backbone": True}, {"bf16": True, "use_cpu": True}):
            args = make_args(kind, max_steps=3, **options)
            trainer = SLRMTrainer(tiny_sd3_pipeline(), args, train_dataset=latent_pairs(8))
            before = weights(trainer)
            trainer.train()
            names = {name for name, _ in trainer.model.named_parameters()}
            if "freeze_backbone" in options:
                names = {name for name in names if name.startswith("head.")}
                assert moved(trainer, before) <= names
            missing = {name for name in names - moved(trainer, before) if not name.startswith(unreached)}
            assert not missing
        trainer = SLRMTrainer(
            tiny_sd3_pipeline(), make_args(kind), train_dataset=latent_pairs(8), peft_config=LoraConfig(r=2)
        )
        before = weights(trainer)
        trainer.train()
        assert all("lora_" in name or name.startswith("head.") for name in moved(trainer, before))
        assert any("lora_B" in name for name in moved(trainer, before))

    def test_logs_and_evaluation(self, kind, make_args):
        args = make_args(kind, eval_strategy="steps", eval_steps=2)
        trainer = train(args, eval_dataset=latent_pairs(6, seed=1))
        first, second = (log for log in trainer.state.log_history if "loss" in log)
        for name in ("loss", "accuracy", "margin", "mean_reward"):
            assert np.isfinite(first[name]) and np.isfinite(second[name])
        assert not any("score_distance" in name or "preservation" in name for name in first)
        evaluated = next(log for log in trainer.state.log_history if "eval_loss" in log)
        expected = evaluate_preference_accuracy(
            trainer.model,
            trainer.policy,
            latent_pairs(6, seed=1),
            [0.2, 0.8],
            seed=args.seed,
            cache_dir=args.cache_dir,
        )
        assert list(expected) == ["none"]
        for sigma, accuracy in expected["none"].items():
            assert evaluated[f"eval_accuracy_none/sigma_{sigma}"] == pytest.approx(accuracy)
        with pytest.raises(ValueError, match="compares no velocities: leave it unset"):
            evaluate_preference_accuracy(trainer.model, trainer.policy, latent_pairs(2), rules=["reference"])


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "dina on wan"])
def test_all_that_is_trainable_gets_a_gradient(kind, lora, make_args):
    """Else DDP stops, unless it is told to look for what does not."""
    on_wan = kind == "dina on wan"
    pairs = latent_pairs(4, (4, 2, 4, 4) if on_wan else (4, 8, 8))
    args = make_args(kind.split()[0], num_frames=5 if on_wan else None)
    pipeline = tiny_wan_pipeline() if on_wan else tiny_sd3_pipeline()
    trainer = SLRMTrainer(pipeline, args, train_dataset=pairs, peft_config=LoraConfig(r=2) if lora else None)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    trainer.compute_loss(trainer.model, inputs).backward()
    trainable = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trainable) > 20
    assert not [name for name, parameter in trainable.items() if parameter.grad is None]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
class TestCheckpoints:
    @pytest.mark.slow
    def test_resume_is_exact(self, kind, lora, make_args, pipeline_folder):
        kwargs = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 5}

        def make(name):
            peft_config = LoraConfig(r=2) if lora else None
            args = make_args(kind, name, **kwargs)
            return SLRMTrainer(pipeline_folder, args, train_dataset=latent_pairs(16), peft_config=peft_config)

        straight, resumed = make("straight"), make("resumed")
        straight.train()
        checkpoint = f"{straight.args.output_dir}/checkpoint-2"
        resumed.train(resume_from_checkpoint=checkpoint)
        assert difference(weights(resumed), weights(straight)) == 0
        assert difference(load_reward_model(checkpoint).state_dict(), weights(straight)) > 0

    @pytest.mark.slow
    def test_saved_model_is_the_trained_one_and_goes_on(self, kind, lora, make_args, pipeline_folder):
        trainer = train(make_args(kind), model=pipeline_folder, peft_config=LoraConfig(r=2) if lora else None)
        trainer.save_model()
        folder = trainer.args.output_dir
        loaded = load_reward_model(folder)
        assert type(loaded) is REWARD_MODELS[kind]
        assert difference(weights(trainer), loaded.state_dict()) == 0
        assert (loaded.config.max_sequence_length, loaded.config.resolution) == (16, 32)
        card = open(f"{folder}/README.md").read()
        class_name, label = type(loaded).__name__, loaded.label
        for text in (
            f"latent reward model ({label})",
            f"{class_name}.from_pretrained",
            "reward_model_type",
            "loss_type",
        ):
            assert text in card, text
        assert "score_preservation_coef" not in card and "score tokens" not in card and "xian2026" not in card
        assert "reward-model" in card and f"- {kind}\n" in card

        longer = train(make_args(kind, "longer"), model=folder)
        assert 0 < difference(weights(longer), weights(trainer))
        with pytest.raises(ValueError, match=f"`model` is a {label}, .*: set `reward_model_type='{kind}'`"):
            SLRMTrainer(folder, make_args("slrm", "other"), train_dataset=latent_pairs(2))


@pytest.mark.parametrize("kind", KINDS)
class TestRollouts:
    def test_candidates_are_rated_at_their_own_noise_level(self, kind, tmp_path, monkeypatch):
        model = REWARD_MODELS[kind].from_policy(SD3Policy(tiny_sd3_pipeline()), max_sequence_length=3, resolution=32)
        model.save_pretrained(tmp_path / "reward")
        args = TAPOConfig(
            str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), resolution=32, max_sequence_length=3,
            num_inference_steps=6, num_sde_steps=3, num_candidates=2, guidance_scale=2.0, max_steps=1, logging_steps=1,
            per_device_train_batch_size=2, score_batch_size=3, bf16=False, use_cpu=True, report_to="none",
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        seen, score = [], REWARD_MODELS[kind].score

        def record(self, latents, sigma, *args, **kwargs):
            seen.append((len(latents), float(sigma), kwargs["velocity_target"]))
            return score(self, latents, sigma, *args, **kwargs)

        monkeypatch.setattr(REWARD_MODELS[kind], "score", record)
        trainer = TAPOTrainer(
            tiny_sd3_pipeline(), str(tmp_path / "reward"), args,
            train_dataset=Dataset.from_dict({"prompt": ["cat", "dog", "fox", "owl"]}), peft_config=LoraConfig(r=2),
        )  # fmt: skip
        trainer.train()
        sigmas = trainer.scheduler.sigmas
        expected = [sigmas[index + 1].item() for index in trainer.step_indices for _ in range(3)]  # 8 = 3 + 3 + 2
        assert [sigma for _, sigma, _ in seen] == pytest.approx(expected)
        assert [number for number, _, _ in seen] == [3, 3, 2] * 3
        assert all(target is None for _, _, target in seen)
        assert np.isfinite(trainer.state.log_history[0]["reward_gap"])

    def test_velocity_target_is_refused(self, kind, tmp_path):
        policy = SD3Policy(tiny_sd3_pipeline())
        model = REWARD_MODELS[kind].from_policy(policy, max_sequence_length=6)
        args = TAPOConfig(str(tmp_path), use_cpu=True, bf16=False, max_sequence_length=6, velocity_target="parent")
        with pytest.raises(ValueError, match="`velocity_target='parent'` is for SLRMs"):
            load_reward(model, policy, args)

    def test_backbone_in_float8(self, kind, tmp_path):
        policy = SD3Policy(tiny_sd3_pipeline())
        model = REWARD_MODELS[kind].from_policy(policy, max_sequence_length=6)
        options = {"max_sequence_length": 6, "reward_layerwise_casting": True}
        args = TAPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
        embeds = policy.encode_prompts(["cat", "dog"], 6)
        inputs = (torch.randn(2, 4, 8, 8), 0.5, embeds.prompt_embeds, embeds.pooled_prompt_embeds)
        reward = load_reward(model, policy, args)
        assert isinstance(reward, LatentReward)
        with torch.no_grad():
            before = model.score(*inputs)
            move_reward(reward, args)
            after = model.score(*inputs)
        assert not torch.equal(after, before) and (after - before).abs().max() < 0.1 * before.abs().max() + 0.05
        assert {p.dtype for p in model.head.parameters()} == {torch.float32}


class TestWan:
    def test_dina(self, make_args, tmp_path):
        tiny_wan_pipeline().save_pretrained(tmp_path / "wan")
        pairs = latent_pairs(8, (4, 2, 4, 4))
        trainer = train(make_args("dina", num_frames=5), pairs, str(tmp_path / "wan"), eval_dataset=pairs)
        trainer.save_model()
        loaded = load_reward_model(trainer.args.output_dir)
        assert difference(weights(trainer), loaded.state_dict()) == 0
        assert "eval_accuracy_none/sigma_0.2" in trainer.evaluate()
        loaded.check_compatible(load_policy(str(tmp_path / "wan")))

    def test_lrm_is_refused_before_any_work(self, make_args):
        policy = WanPolicy(tiny_wan_pipeline())
        policy.vae.encode = policy.encode_prompts = None
        with pytest.raises(ValueError, match="`WanTransformer3DModel` does not have"):
            SLRMTrainer(policy, make_args("lrm", num_frames=5), train_dataset=latent_pairs(2, (4, 2, 4, 4)))


class TestBadInput:
    def test_freeze_and_lora(self, make_args):
        with pytest.raises(ValueError, match="`freeze_backbone=True` and `peft_config` exclude each other"):
            SLRMTrainer(
                "no/such-model", make_args("dina", freeze_backbone=True), latent_pairs(2), peft_config=LoraConfig(r=2)
            )

    def test_layers_of_a_shorter_model(self, make_args):
        for kind, options in (("lrm", {"lrm_layer": 18}), ("dina", {"dina_layers": [4, 8, 12]})):
            with pytest.raises(ValueError, match="must be blocks of the transformer, 1 to "):
                SLRMTrainer(tiny_sd3_pipeline(), make_args(kind, **options), train_dataset=latent_pairs(2))

    def test_base_that_is_unknown(self, make_args):
        model = REWARD_MODELS["dina"].from_policy(SD3Policy(tiny_sd3_pipeline()))
        with pytest.raises(ValueError, match="pass the pipeline or the policy as `model`, with `dina_layers`"):
            SLRMTrainer(model, make_args("dina"), train_dataset=latent_pairs(2))


def test_slrm_with_frozen_backbone_and_thurstone_loss(make_args):
    args = make_args("slrm", freeze_backbone=True, loss_type="thurstone", score_preservation_coef=0.0)
    trainer = SLRMTrainer(tiny_sd3_pipeline(), args, train_dataset=latent_pairs(8))
    before = weights(trainer)
    trainer.train()
    score = {f"transformer.{name}" for name in trainer.model.transformer.score_parameters()}
    assert isinstance(trainer.model, SLRMModel) and len(moved(trainer, before)) > 10
    assert moved(trainer, before) <= score


@pytest.mark.parametrize("kind", KINDS)
def test_commands(kind, pipeline_folder, tmp_path, capsys):
    color_pairs(12).to_parquet(tmp_path / "pairs.parquet")
    recipe = tmp_path / "slrm.yaml"
    recipe.write_text(
        f"reward_model_type: {kind}\noutput_dir: {tmp_path}/reward\ncache_dir: {tmp_path}/cache\nresolution: 32\n"
        "max_sequence_length: 6\nper_device_train_batch_size: 2\nmax_steps: 1\nbf16: false\nuse_cpu: true\n"
        "disable_tqdm: true\nreport_to: none\nsave_strategy: 'no'\n"
    )
    base = ["--model_name_or_path", pipeline_folder, "--dataset_name", str(tmp_path / "pairs.parquet")]
    main(["slrm", "--config", str(recipe), *base, "--dry_run", "true"])
    dry_run = capsys.readouterr().out
    assert f" {4 if kind == 'lrm' else 2} reward model (forward and backward)" in dry_run  # latents of both sides
    main(["slrm", "--config", str(recipe), *base])
    assert type(load_reward_model(tmp_path / "reward")) is REWARD_MODELS[kind]

    capsys.readouterr()
    flags = [
        "--dataset_test_split",
        "train[:4]",
        "--sigmas",
        "0.3",
        "0.7",
        "--output_file",
        str(tmp_path / "out.json"),
    ]
    main(["evaluate", "--slrm", str(tmp_path / "reward"), *base, *flags])
    accuracy = json.loads((tmp_path / "out.json").read_text())["slrm_accuracy"]
    assert list(accuracy) == ["none"] and list(accuracy["none"]) == ["0.3", "0.7"]
    assert all(0 <= value <= 1 for value in accuracy["none"].values())

    recipe = tmp_path / "tapo.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path}/tapo\nresolution: 32\nmax_sequence_length: 6\nbf16: false\nuse_cpu: true\n"
    )
    flags = ["--reward_model", str(tmp_path / "reward"), "--dry_run", "true"]
    main(["tapo", "--config", str(recipe), "--model_name_or_path", pipeline_folder, *flags])
    assert f" {128 if kind == 'lrm' else 64} reward model " in capsys.readouterr().out  # n = 8 steps, 2 sides, P = 4
