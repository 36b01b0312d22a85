# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig
from transformers import TrainerCallback
from trl import RewardTrainer

from tapo_trl import EMACallback, SLRMConfig, SLRMModel, SLRMTrainer
from tapo_trl.data import PromptCache
from tapo_trl.metrics import evaluate_preference_accuracy
from tapo_trl.policies import SD3Policy, WanPolicy, load_policy
from tapo_trl.trainer.slrm_loading import is_reward_model
from tests.data.preference_pairs import color_pairs, latent_pairs
from tests.data.video_files import color_videos
from tests.testing_utils import tiny_sd3_pipeline, tiny_wan_pipeline


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_sd3_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_args(tmp_path):
    def make(name: str = "out", **kwargs) -> SLRMConfig:
        defaults = {
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            "resolution": 32,
            "max_sequence_length": 16,
            "num_task_tokens": 2,
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


def weights(trainer: SLRMTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def train(args, dataset=None, model=None, **kwargs) -> SLRMTrainer:
    dataset = latent_pairs(16) if dataset is None else dataset
    trainer = SLRMTrainer(tiny_sd3_pipeline() if model is None else model, args, train_dataset=dataset, **kwargs)
    trainer.train()
    return trainer


def unreached_parameters(args: SLRMConfig) -> tuple[str, ...]:
    """Parameters of the tiny model on which the loss does not depend."""
    unreached = []
    if args.task_projection_rank is None:
        unreached.append("transformer_blocks.2.attn.add_q_proj")  # SD3 drops what the text reads in the last block
    if args.score_link == "exp" and args.center_rewards_coefficient is None:
        unreached.append("score_head.linear.bias")  # the loss is about differences
    if args.velocity_target == "none" and args.score_preservation_coef == 0:
        last = ("attn.to_q", "attn.norm_q", "attn.to_out", "ff.")
        unreached += ["norm_out", "proj_out", *(f"transformer_blocks.2.{name}" for name in last)]
    return tuple(unreached)


class TestSLRMTrainer:
    def test_it_is_a_reward_trainer(self):
        assert issubclass(SLRMTrainer, RewardTrainer)

    @pytest.mark.parametrize(
        "kwargs",
        [
            {},
            {"velocity_target": "reference"},
            {"velocity_target": "none", "score_preservation_coef": 0.0},
            {"num_task_tokens": 0, "velocity_target": "ground_truth"},
            {"enhancement": "additive", "velocity_target": "reference"},
            {"timestep_sampling": "clean"},
            {"detach_score": True, "score_link": "softplus", "center_rewards_coefficient": 0.01},
            {"timestep_sampling": "logit_normal", "shared_noise": False, "label_smoothing": 0.1},
            {"task_projection_rank": 2, "activation_checkpointing": False},
            {"bf16": True, "use_cpu": True},
        ],
        ids=str,
    )
    def test_full_training_changes_every_parameter(self, kwargs, make_args):
        assert "CI" not in os.environ
        trainer = SLRMTrainer(tiny_sd3_pipeline(), make_args(**kwargs), train_dataset=latent_pairs(8))
        before = weights(trainer)
        trainer.train()
        unreached = unreached_parameters(trainer.args)
        for name, parameter in trainer.model.transformer.named_parameters():
            assert parameter.dtype == torch.float32
            if not name.startswith(unreached):
                assert not torch.equal(parameter, before[f"transformer.{name}"]), name
        logs = trainer.state.log_history
        for name in ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
            assert np.isfinite(logs[0][name]), name
        assert logs[0]["min_reward"] <= logs[0]["mean_reward"] <= logs[0]["max_reward"]
        assert (logs[0]["score_distance/chosen"] > 0) == (kwargs.get("velocity_target") != "none")

    def test_lora_trains_the_adapter_and_the_score_stream_alone(self, make_args):
        policy = SD3Policy(tiny_sd3_pipeline())
        trainer = SLRMTrainer(policy, make_args(), train_dataset=latent_pairs(8), peft_config=LoraConfig(r=2))
        before = weights(trainer)
        trainer.train()
        after = weights(trainer)
        score = {f"transformer.{name}" for name in trainer.model.transformer.score_parameters()}
        parameters = dict(trainer.model.named_parameters())
        adapter = {name for name in parameters if "lora_" in name}
        assert any("attn2.to_q" in name for name in adapter)
        for name in after:
            # B starts at 0, so that A gets no gradient in the first step and moves in the second.
            trained = name in score or name in adapter
            assert name not in parameters or parameters[name].requires_grad == trained
            if not name.startswith(tuple(f"transformer.{prefix}" for prefix in unreached_parameters(trainer.args))):
                assert torch.equal(after[name], before[name]) != trained, name

    def test_learns_a_separable_preference(self, make_args):
        policy = SD3Policy(tiny_sd3_pipeline())
        args = make_args(max_steps=40, learning_rate=5e-3, per_device_train_batch_size=8, logging_steps=40)
        trainer = train(args, color_pairs(32), policy)
        result = evaluate_preference_accuracy(
            trainer.model, policy, color_pairs(16, seed=1), sigmas=[0.2, 0.6], rules=["reference", "none"],
            cache_dir=args.cache_dir,
        )  # fmt: skip
        for rule, by_sigma in result.items():
            for sigma, accuracy in by_sigma.items():
                assert accuracy > 0.9, (rule, sigma)

    def test_loss_is_eq_9_plus_flow_matching(self, make_args):
        args = make_args(eta=1.3, rho=0.7, score_preservation_coef=0.4, velocity_target="ground_truth")
        trainer = SLRMTrainer(tiny_sd3_pipeline(), args, train_dataset=latent_pairs(4))
        batch = next(iter(trainer.get_train_dataloader()))
        inputs = trainer._prepare_inputs(batch)
        sigma, noise = trainer._draw_noise(inputs["row"].tolist())
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, inputs)

        log_scores, preservation = [], None
        embeds = inputs["prompt_embeds"]
        for side, x1 in zip(("chosen", "rejected"), noise.chunk(2), strict=True):
            x0, t = inputs[f"{side}_latents"].double(), sigma.view(-1, 1, 1, 1).double()
            x_t, v = ((1 - t) * x0 + t * x1).float(), (x1 - x0)
            out = trainer.model(x_t, sigma, embeds.prompt_embeds, embeds.pooled_prompt_embeds)
            d = (out.velocity.double() - v).square().mean(dim=(1, 2, 3))
            log_scores.append(out.logits.double() - 0.7 * d)
            preservation = d if preservation is None else preservation
        s_w, s_l = (score.exp() for score in log_scores)
        expected = -torch.log(s_w**1.3 / (s_w**1.3 + s_l**1.3)) + 0.4 * preservation
        assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)

    def test_detached_score_leaves_the_velocity_to_the_preservation_loss(self, make_args):
        gradients = {}
        for detach in (False, True):
            args = make_args(detach_score=detach, score_preservation_coef=0.0)
            trainer = SLRMTrainer(tiny_sd3_pipeline(), args, train_dataset=latent_pairs(4))
            inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
            trainer.model.train()
            trainer.compute_loss(trainer.model, inputs).backward()
            gradients[detach] = trainer.model.transformer.proj_out.weight.grad.abs().max().item()
        assert gradients[False] > 0 and gradients[True] == 0

    def test_policy_is_left_as_it_was(self, make_args):
        policy = SD3Policy(tiny_sd3_pipeline())
        before = {name: tensor.clone() for name, tensor in policy.transformer.state_dict().items()}
        train(make_args(), model=policy)
        assert all(torch.equal(tensor, before[name]) for name, tensor in policy.transformer.state_dict().items())
        assert len(policy.encode_prompts(["still there"], 16)) == 1


class TestNoise:
    def make(self, make_args, rows=8, **kwargs):
        return SLRMTrainer(tiny_sd3_pipeline(), make_args(**kwargs), train_dataset=latent_pairs(rows))

    def test_depends_on_seed_step_and_row_alone(self, make_args):
        trainer = self.make(make_args)
        sigma, noise = trainer._draw_noise([3, 1])
        other_sigma, other_noise = trainer._draw_noise([1, 7, 3])
        assert torch.equal(sigma[0], other_sigma[2]) and torch.equal(noise[0], other_noise[2])
        assert not torch.equal(noise[0], noise[1])
        trainer.state.global_step = 1
        assert not torch.equal(trainer._draw_noise([3])[1][0], noise[0])
        assert not torch.equal(self.make(make_args, seed=7)._draw_noise([3])[1][0], noise[0])

    def test_is_shared_within_a_pair_unless_told_otherwise(self, make_args):
        chosen, rejected = self.make(make_args)._draw_noise([0, 1])[1].chunk(2)
        assert torch.equal(chosen, rejected)
        chosen, rejected = self.make(make_args, shared_noise=False)._draw_noise([0, 1])[1].chunk(2)
        assert not torch.equal(chosen, rejected)

    @pytest.mark.parametrize(("law", "outside"), [("uniform", 0.38), ("logit_normal", 0.17)])
    def test_distribution_of_the_levels(self, law, outside, make_args):
        # Share of levels below sigmoid(-1.4...) or above: 0.19 on each side of a uniform law, under 0.09 of the other.
        sigma = self.make(make_args, timestep_sampling=law)._draw_noise(list(range(2000)))[0]
        assert ((sigma > 0) & (sigma < 1)).all()
        assert sigma.mean() == pytest.approx(0.5, abs=0.02)
        share = ((sigma < 0.19) | (sigma > 0.81)).float().mean().item()
        assert share == pytest.approx(outside if law == "uniform" else 0.147, abs=0.03)

    @pytest.mark.slow
    def test_accumulation_equals_the_bigger_batch(self, make_args):
        big = train(make_args("big", per_device_train_batch_size=8, optim="sgd", learning_rate=0.1))
        small = train(
            make_args(
                "small", per_device_train_batch_size=2, gradient_accumulation_steps=4, optim="sgd", learning_rate=0.1
            )
        )
        start = weights(SLRMTrainer(tiny_sd3_pipeline(), make_args("start"), train_dataset=latent_pairs(16)))
        moved = difference(weights(big), start)
        assert moved > 1e-3
        assert difference(weights(big), weights(small)) < 1e-3 * moved


class TestData:
    @pytest.mark.parametrize("cache_latents", [True, False])
    def test_images(self, cache_latents, make_args):
        trainer = train(make_args(cache_latents=cache_latents), color_pairs(8))
        assert trainer.state.global_step == 2

    @pytest.mark.slow
    def test_cached_and_fresh_latents_train_alike(self, make_args):
        # SGD, since the first step of Adam is the sign of the gradient, which a rounding error can turn.
        kwargs = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1}
        cached = weights(train(make_args("cached", cache_latents=True, **kwargs), color_pairs(8)))
        fresh = weights(train(make_args("fresh", cache_latents=False, vae_slicing=True, **kwargs), color_pairs(8)))
        start = weights(SLRMTrainer(tiny_sd3_pipeline(), make_args("start"), train_dataset=color_pairs(8)))
        moved = difference(cached, start)
        assert moved > 1e-3
        assert difference(cached, fresh) < 1e-4 * moved

    @pytest.mark.slow
    def test_margin_column_enters_the_loss(self, make_args):
        losses = []
        for margin in (0.0, 3.0):
            pairs = latent_pairs(4).add_column("margin", [margin] * 4)
            losses.append(train(make_args(max_steps=1), pairs).state.log_history[0]["loss"])
        assert losses[1] - losses[0] > 1

    @pytest.mark.slow
    def test_ties_pull_the_scores_together_and_leave_the_accuracy(self, make_args):
        ties = latent_pairs(8).add_column("label", [0.5] * 8)
        args = make_args(max_steps=20, learning_rate=5e-3, logging_steps=20, score_preservation_coef=0.0)
        logs = train(args, ties).state.log_history[0]
        assert "accuracy" not in logs
        assert abs(logs["margin"]) < 0.5
        preferred = train(args, latent_pairs(8)).state.log_history[0]
        assert preferred["margin"] > 0.5 and preferred["accuracy"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("make_pipeline", [tiny_sd3_pipeline, tiny_wan_pipeline])
def test_prompts_in_half_precision_change_nothing_under_autocast(make_pipeline, make_args):
    is_video = make_pipeline is tiny_wan_pipeline
    pairs = latent_pairs(8, (4, 2, 4, 4) if is_video else (4, 8, 8))
    trained, kept = [], set()
    for name in ("half", "full"):
        args = make_args(name, bf16=True, use_cpu=True, num_frames=5 if is_video else None)
        trainer = SLRMTrainer(make_pipeline(), args, train_dataset=pairs)
        if name == "full":
            trainer.prompt_cache = PromptCache(trainer.policy, args.cache_dir, args.max_sequence_length)
            trainer.prompt_cache.encode(pairs["prompt"])
        kept.add(trainer.prompt_cache.load(["thing 1"]).prompt_embeds.dtype)
        trainer.train()
        trained.append(weights(trainer))
    assert kept == {torch.bfloat16, torch.float32}
    assert difference(*trained) == 0


class TestVideos:
    @pytest.fixture
    def make_args(self, make_args):
        return lambda name="out", **kwargs: make_args(name, **({"height": 32, "width": 48, "num_frames": 5} | kwargs))

    @pytest.fixture(scope="class")
    def wan_folder(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("wan")
        tiny_wan_pipeline().save_pretrained(folder)
        return str(folder)

    @pytest.mark.slow
    @pytest.mark.parametrize("lora", [False, True])
    def test_files_to_a_reward_model(self, lora, make_args, wan_folder, tmp_path):
        args = make_args(eval_strategy="steps", eval_steps=2)
        pairs = color_videos(tmp_path, 6)
        trainer = train(args, pairs, wan_folder, eval_dataset=pairs, peft_config=LoraConfig(r=2) if lora else None)
        logs = trainer.state.log_history
        assert all(np.isfinite(log["loss"]) for log in logs if "loss" in log)
        assert logs[0]["score_preservation_loss"] > 0
        trainer.save_model()
        slrm = SLRMModel.from_pretrained(args.output_dir)
        assert (slrm.config.height, slrm.config.width, slrm.config.num_frames) == (32, 48, 5)
        assert slrm.config.max_sequence_length == 16
        result = evaluate_preference_accuracy(
            slrm, load_policy(wan_folder), pairs, [0.2, 0.8], seed=args.seed, cache_dir=args.cache_dir
        )
        evaluated = next(log for log in logs if "eval_loss" in log)
        for rule, by_sigma in result.items():
            for sigma, accuracy in by_sigma.items():
                assert evaluated[f"eval_accuracy_{rule}/sigma_{sigma}"] == pytest.approx(accuracy)

    @pytest.mark.slow
    def test_learns_a_separable_preference(self, make_args, tmp_path):
        policy = WanPolicy(tiny_wan_pipeline())
        args = make_args(max_steps=40, learning_rate=5e-3, per_device_train_batch_size=8, logging_steps=40)
        trainer = train(args, color_videos(tmp_path, 16), policy)
        result = evaluate_preference_accuracy(
            trainer.model, policy, color_videos(tmp_path, 12, seed=1), [0.2], ["reference"], cache_dir=args.cache_dir
        )
        assert result["reference"][0.2] > 0.9

    @pytest.mark.slow
    def test_cached_and_fresh_latents_train_alike(self, make_args, tmp_path):
        pairs, kwargs = color_videos(tmp_path, 4), {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1}
        cached = weights(train(make_args("cached", **kwargs), pairs, tiny_wan_pipeline()))
        fresh = weights(train(make_args("fresh", cache_latents=False, **kwargs), pairs, tiny_wan_pipeline()))
        start = weights(SLRMTrainer(tiny_wan_pipeline(), make_args("start"), train_dataset=pairs))
        moved = difference(cached, start)
        assert moved > 1e-3
        assert difference(cached, fresh) < 1e-4 * moved

    @pytest.mark.slow
    def test_resume_is_exact(self, make_args, wan_folder, tmp_path):
        pairs = color_videos(tmp_path, 10)
        kwargs = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 3}
        straight = train(make_args("straight", **kwargs), pairs, wan_folder)
        resumed = SLRMTrainer(wan_folder, make_args("resumed", **kwargs), train_dataset=pairs)
        resumed.train(resume_from_checkpoint=f"{straight.args.output_dir}/checkpoint-2")
        assert resumed.state.global_step == 4
        assert difference(weights(resumed), weights(straight)) == 0

    @pytest.mark.parametrize("cache_latents", [True, False])
    def test_bad_files(self, cache_latents, make_args, tmp_path):
        pairs = color_videos(tmp_path, 5)
        os.remove(pairs[3]["rejected"])
        args = make_args(cache_latents=cache_latents)
        with pytest.raises(ValueError, match="1 of the files of `train_dataset` cannot be used:\n- .*, row 3"):
            SLRMTrainer(tiny_wan_pipeline(), args, train_dataset=pairs)
        args = make_args(cache_latents=cache_latents, skip_bad_files=True)
        assert train(args, pairs, tiny_wan_pipeline()).state.global_step == 2

    def test_frames_that_do_not_fit(self, make_args, tmp_path):
        for number, message in ((None, "`num_frames` is missing"), (6, "one more than a multiple of 4")):
            with pytest.raises(ValueError, match=message):
                SLRMTrainer(tiny_wan_pipeline(), make_args(num_frames=number), train_dataset=latent_pairs(2))
        with pytest.raises(ValueError, match="`num_frames=5` was given, but .* makes images"):
            SLRMTrainer(tiny_sd3_pipeline(), make_args(), train_dataset=latent_pairs(2))


@pytest.mark.parametrize(
    ("quality", "text", "winner"), [(2.0, 1.0, "rejected"), (1.0, 2.0, "chosen"), (1.0, 1.0, None)]
)
def test_dimension_weights(quality, text, winner, make_args):
    pairs = latent_pairs(16).add_column("label_quality", [0.0] * 16).add_column("label_text", [1.0] * 16)
    args = make_args(dimension_weights={"quality": quality, "text": text})
    trainer = SLRMTrainer(tiny_sd3_pipeline(), args, train_dataset=pairs, eval_dataset=pairs)
    batch = next(iter(trainer.get_eval_dataloader()))
    chosen = torch.tensor([pairs[row][winner or "chosen"] for row in batch["row"].tolist()])
    assert torch.equal(batch["chosen_latents"].cpu(), chosen)
    assert set(batch["label"].tolist()) == {0.5 if winner is None else 1.0}
    trainer.train()
    assert ("accuracy" in trainer.state.log_history[0]) == (winner is not None)


class TestEvaluation:
    def test_both_rules_by_noise_level_and_always_the_same_noise(self, make_args):
        trainer = train(make_args(), eval_dataset=latent_pairs(6, seed=1))
        first, second = trainer.evaluate(), trainer.evaluate()
        names = [f"eval_accuracy_{rule}/sigma_{s}" for rule in ("ground_truth", "reference") for s in (0.2, 0.8)]
        for name in ["eval_loss", "eval_accuracy", "eval_margin", *names]:
            assert first[name] == second[name], name
        expected = evaluate_preference_accuracy(
            trainer.model, trainer.policy, latent_pairs(6, seed=1), [0.2, 0.8], seed=trainer.args.seed,
            cache_dir=trainer.args.cache_dir,
        )  # fmt: skip
        for rule, by_sigma in expected.items():
            for sigma, accuracy in by_sigma.items():
                assert first[f"eval_accuracy_{rule}/sigma_{sigma}"] == pytest.approx(accuracy)

    def test_during_training_with_several_datasets_and_own_metrics(self, make_args):
        seen = []

        def compute_metrics(prediction):
            seen.append(prediction.predictions.shape)
            return {"gap": float(np.mean(prediction.predictions[:, 0] - prediction.predictions[:, 1]))}

        splits = {"near": latent_pairs(5, seed=1), "far": latent_pairs(3, seed=2)}
        args = make_args(eval_strategy="steps", eval_steps=1)
        trainer = train(args, eval_dataset=splits, compute_metrics=compute_metrics)
        logs = [log for log in trainer.state.log_history if "eval_near_loss" in log or "eval_far_loss" in log]
        assert len(logs) == 4
        assert set(seen) == {(5, 2), (3, 2)}
        assert all("eval_near_gap" in log or "eval_far_gap" in log for log in logs)

    def test_new_dataset(self, make_args):
        trainer = train(make_args())
        assert "eval_accuracy_reference/sigma_0.8" in trainer.evaluate(latent_pairs(3, seed=4))


class TestCheckpoints:
    @pytest.mark.slow
    @pytest.mark.parametrize("lora", [False, True])
    def test_resume_is_exact(self, lora, make_args, pipeline_folder):
        def config():
            return LoraConfig(r=2) if lora else None

        kwargs = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 5}
        straight = train(make_args("straight", **kwargs), model=pipeline_folder, peft_config=config())
        checkpoint = f"{straight.args.output_dir}/checkpoint-2"
        resumed = SLRMTrainer(
            pipeline_folder, make_args("resumed", **kwargs), train_dataset=latent_pairs(16), peft_config=config()
        )
        resumed.train(resume_from_checkpoint=checkpoint)
        assert resumed.state.global_step == 4
        assert difference(weights(resumed), weights(straight)) == 0

        loaded = SLRMModel.from_pretrained(checkpoint)
        assert loaded.config["lora"] is lora
        assert difference(loaded.state_dict(), weights(straight)) > 0

    @pytest.mark.slow
    @pytest.mark.parametrize("lora", [False, True])
    def test_saved_model_is_the_trained_one(self, lora, make_args, pipeline_folder):
        trainer = train(
            make_args(), model=pipeline_folder, peft_config=LoraConfig(r=2, lora_alpha=7) if lora else None
        )
        trainer.save_model()
        loaded = SLRMModel.from_pretrained(trainer.args.output_dir)
        assert difference(weights(trainer), loaded.state_dict()) == 0
        files = {file for file in os.listdir(trainer.args.output_dir) if not file.startswith("checkpoint")}
        assert {"README.md", "config.json"} < files
        assert not [file for file in files if file.endswith((".bin", ".pt", ".pth", ".pkl"))]
        config = json.load(open(f"{trainer.args.output_dir}/config.json"))
        assert (config["velocity_target"], config["max_sequence_length"], config["resolution"]) == (
            "reference",
            16,
            32,
        )

        # and it goes on training, from its folder
        before = weights(trainer)
        longer = train(make_args("longer"), model=trainer.args.output_dir)
        assert 0 < difference(weights(longer), before) < 0.1

    def test_best_model_is_loaded_at_the_end(self, make_args):
        args = make_args(
            max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, learning_rate=0.5,
            load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False,
        )  # fmt: skip
        trainer = train(args, eval_dataset=latent_pairs(4, seed=1))
        best = SLRMModel.from_pretrained(trainer.state.best_model_checkpoint)
        assert difference(weights(trainer), best.state_dict()) == 0
        losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
        assert trainer.state.best_metric == min(losses)

    def test_model_card(self, make_args):
        trainer = train(make_args())
        trainer.create_model_card(model_name="my-slrm", dataset_name="me/pairs", tags="test")
        card = open(f"{trainer.args.output_dir}/README.md").read()
        for text in ("my-slrm", "slrm", "velocity_target", "@inproceedings{xian2026consistent"):
            assert text in card, text

    def test_lora_is_tracked(self, make_args):
        trainer = train(make_args(max_steps=1, report_to="tensorboard"), peft_config=LoraConfig(r=2))
        assert list(Path(trainer.args.output_dir).glob("runs/*/events*"))


class TestModelArgument:
    @pytest.mark.parametrize("kind", ["folder", "pipeline", "policy", "slrm", "slrm folder"])
    def test_kinds(self, kind, make_args, pipeline_folder, tmp_path):
        policy = load_policy(pipeline_folder)
        slrm = SLRMModel.from_policy(policy, num_task_tokens=5)
        slrm.save_pretrained(tmp_path / "slrm")
        model = {
            "folder": pipeline_folder,
            "pipeline": policy.pipeline,
            "policy": policy,
            "slrm": slrm,
            "slrm folder": str(tmp_path / "slrm"),
        }[kind]
        trainer = train(make_args(max_steps=1, rho=0.25), model=model)
        assert trainer.model.config["num_task_tokens"] == (5 if "slrm" in kind else 2)
        assert trainer.model.config["rho"] == 0.25

    def test_a_training_goes_on_as_it_was(self, make_args, pipeline_folder, tmp_path):
        how = {"rho": 0.25, "score_link": "softplus", "velocity_target": "ground_truth", "resolution": 32}
        train(make_args("first", max_steps=1, **how), model=pipeline_folder).save_model()
        folder = str(tmp_path / "first")
        open_fields = dict.fromkeys([*how, "max_sequence_length"])
        trainer = SLRMTrainer(folder, make_args("second", **open_fields), train_dataset=latent_pairs(4))
        for name, value in (how | {"height": 32, "max_sequence_length": 16}).items():
            assert getattr(trainer.args, name) == trainer.model.config[name] == value
        assert trainer.args.eval_rules == ["ground_truth", "reference"]
        with pytest.raises(ValueError, match="`rho=1.0` is not what"):
            SLRMTrainer(folder, make_args("third", rho=1.0), train_dataset=latent_pairs(4))

    def test_what_a_repository_holds(self, monkeypatch, tmp_path, pipeline_folder):
        """Only what is not in it says so: no answer, a gated repository or an empty folder is no reward model."""
        errors, seen = [None], []

        def download(name, filename, **kwargs):
            seen.append(kwargs)
            if filename != "config.json" or errors[-1] is not None:
                raise errors[-1] or LocalEntryNotFoundError(filename)

        monkeypatch.setattr("tapo_trl.files.hf_hub_download", download)
        hub = {"token": "secret", "cache_dir": "elsewhere", "local_files_only": True, "revision": "main"}
        assert is_reward_model("me/slrm", **hub)
        assert all(hub.items() <= kwargs.items() for kwargs in seen)
        assert not is_reward_model(pipeline_folder)
        for error, expected in (
            (ConnectionError("no answer"), "no answer"),
            (LocalEntryNotFoundError("neither"), "neither a pipeline .* nor a reward model .* in me/slrm"),
            (HFValidationError("not a name"), "There is no folder me/slrm"),
        ):
            errors.append(error)
            with pytest.raises((OSError, ValueError), match=expected):
                is_reward_model("me/slrm", **hub)
        with pytest.raises(ValueError, match="neither a pipeline"):
            is_reward_model(str(tmp_path))

    def test_half_precision_pipeline_is_trained_in_float32(self, make_args, pipeline_folder):
        args = make_args(max_steps=1, model_init_kwargs={"torch_dtype": "float16"})
        trainer = train(args, model=pipeline_folder)
        assert trainer.policy.transformer.dtype == torch.float16
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}

    def test_lora_keeps_the_base_in_bf16(self, make_args, pipeline_folder):
        trainer = train(make_args(bf16=True, use_cpu=True), model=pipeline_folder, peft_config=LoraConfig(r=2))
        assert {p.dtype for p in trainer.model.parameters() if not p.requires_grad} == {torch.bfloat16}
        assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


class TestBadInput:
    def test_a_callback_for_policies(self, make_args):
        with pytest.raises(ValueError, match="`EMACallback` is for trainers of a policy"):
            train(make_args(), callbacks=[EMACallback()])

    def refuse(self, args, message, error=ValueError, dataset=None, **kwargs):
        model = kwargs.pop("model", None)
        with pytest.raises(error, match=message):
            SLRMTrainer(
                tiny_sd3_pipeline() if model is None else model,
                args,
                train_dataset=latent_pairs(4) if dataset is None else dataset,
                **kwargs,
            )

    def test_no_dataset(self, make_args):
        with pytest.raises(ValueError, match="`train_dataset` is missing"):
            SLRMTrainer("unused", make_args())

    def test_data_is_checked_before_the_model_is_touched(self, make_args):
        message = r"`train_dataset` lacks the columns \['chosen', 'rejected'\]"
        self.refuse(make_args(), message, dataset=Dataset.from_dict({"prompt": ["a"]}), model="no/such-model")
        self.refuse(make_args(), "`train_dataset` is empty", dataset=latent_pairs(2).select([]), model="no/such-model")
        splits = {"a": latent_pairs(2).remove_columns("prompt")}
        self.refuse(make_args(), r"`eval_dataset\['a'\]` lacks", eval_dataset=splits, model="no/such-model")
        self.refuse(make_args(), "must be a `datasets.Dataset`", TypeError, dataset=[1], model="no/such-model")
        args = make_args(dimension_weights={"quality": 1.0})
        self.refuse(
            args, r"names \['quality'\], but `train_dataset` has labels of no dimension", model="no/such-model"
        )

    def test_output_folder(self, make_args, tmp_path):
        (tmp_path / "file").write_text("in the way")
        self.refuse(make_args("file/out"), "`output_dir=.*` cannot be created", model="no/such-model")

    def test_resolution(self, make_args):
        self.refuse(make_args(resolution=36), "multiple of 8 pixels")
        self.refuse(make_args(width=36), "multiple of 8 pixels")

    def test_image(self, make_args, tmp_path):
        (tmp_path / "text.png").write_text("no image")
        pairs = Dataset.from_dict({"prompt": ["a"], "chosen": [str(tmp_path / "text.png")], "rejected": ["b.png"]})
        self.refuse(make_args(), "row 0, column `chosen`: the image cannot be read", dataset=pairs)

    def test_slrm_whose_base_is_unknown(self, make_args):
        slrm = SLRMModel.from_policy(SD3Policy(tiny_sd3_pipeline()))
        self.refuse(make_args(), "pass the pipeline or the policy", model=slrm)

    def test_slrm_with_a_lora_and_another_one(self, make_args, pipeline_folder):
        slrm = SLRMModel.from_policy(load_policy(pipeline_folder))
        slrm.add_lora(LoraConfig(r=2, target_modules=["to_q"]))
        self.refuse(make_args(), "has a LoRA already", model=slrm, peft_config=LoraConfig(r=2))


def test_callbacks_are_called(make_args):
    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, model=None, **kwargs):
            assert isinstance(model, SLRMModel)
            self.steps += 1

    callback = Count()
    train(make_args(), callbacks=[callback])
    assert callback.steps == 2
