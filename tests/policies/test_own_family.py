# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""A family of one's own, in one file, samples and trains with nothing edited in the package."""

import math

import diffusers
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

import tapo_trl
from tapo_trl.cli.main import main
from tapo_trl.policies import FAMILIES, Family
from tests.data.preference_pairs import color_pairs
from tests.policies.own_family import OwnPipeline, OwnPolicy, OwnTransformer


@pytest.fixture(autouse=True)
def family(monkeypatch):
    for own_class in (OwnPipeline, OwnTransformer):  # as if diffusers had them
        monkeypatch.setattr(diffusers, own_class.__name__, own_class, raising=False)
    ours = Family(
        pipeline="OwnPipeline",
        transformer="OwnTransformer",
        policy="tests.policies.own_family:OwnPolicy",
        score="tests.policies.own_family:OwnScoreTransformer",
    )
    FAMILIES.append(ours)
    yield ours
    FAMILIES.remove(ours)


PROMPTS = ["red cat", "a blue dog"]
COMMON = {
    "max_steps": 2,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
}
COMMON |= {"max_sequence_length": 6, "height": 32, "width": 32, "per_device_train_batch_size": 2, "save_steps": 2}
ROLLOUT = {"num_inference_steps": 4, "guidance_scale": 3.5, "learning_rate": 1e-3}


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
def test_samples_are_the_pipelines(guidance_scale):
    policy = tapo_trl.load_policy(OwnPolicy.tiny())
    options = {"num_inference_steps": 4, "guidance_scale": guidance_scale}
    latents = policy.sample(
        policy.transformer,
        policy.encode_prompts(PROMPTS, 6),
        latent_shape=policy.latent_shape(32, 64),
        generators=[torch.Generator().manual_seed(seed) for seed in range(2)],
        **options,
    )
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    size = {"height": 32, "width": 64, "max_sequence_length": 6, "output_type": "pt"}
    expected = policy.pipeline(PROMPTS, generator=generators, **size, **options).images
    torch.testing.assert_close(policy.decode(latents), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_masked_score_tokens_leave_the_velocity_of_the_base():
    policy = tapo_trl.load_policy(OwnPolicy.tiny())
    slrm = tapo_trl.SLRMModel.from_policy(policy, max_sequence_length=6)
    latents, sigma, prompts = torch.randn(2, 4, 4, 8), torch.tensor([0.3, 0.8]), policy.encode_prompts(PROMPTS, 6)
    expected = policy.velocity(policy.transformer, latents, sigma, prompts)
    masked = slrm(latents, sigma, **prompts.tensors, mask_task_tokens=True)
    torch.testing.assert_close(masked.velocity, expected, rtol=0, atol=2e-6)
    assert not torch.allclose(slrm(latents, sigma, **prompts.tensors).velocity, expected, atol=1e-4)


def make_lora():
    return LoraConfig(r=2, lora_alpha=6, target_modules=OwnPolicy.lora_target_modules)


def train_slrm(tmp_path):
    options = {"eval_sigmas": [0.5], "output_dir": str(tmp_path / "slrm"), "cache_dir": str(tmp_path / "cache")}
    args = tapo_trl.SLRMConfig(**COMMON, **options)
    trainer = tapo_trl.SLRMTrainer(OwnPolicy.tiny(), args, train_dataset=color_pairs(4), peft_config=make_lora())
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    trainer.save_model()
    return args.output_dir, [n for n, p in trainer.model.named_parameters() if torch.equal(p, before[n])]


@pytest.mark.parametrize(
    "method", ["TAPO", "FlowGRPO", "OnlineDiffusionDPO", "DiffusionNFT", "DiffusionDPO", "DiffusionSFT"]
)
def test_training(tmp_path, method):
    options = {
        "TAPO": {"num_sde_steps": 2, "num_candidates": 2, "train_cfg": False},
        "FlowGRPO": {"num_generations": 2},
    }
    folder = tmp_path / method
    args = {**COMMON, **ROLLOUT, "output_dir": str(folder), "cache_dir": str(tmp_path / "cache")}
    args = getattr(tapo_trl, f"{method}Config")(**args, **options.get(method, {}))
    rewards, dataset = [[redness]], Dataset.from_dict({"prompt": PROMPTS})
    if method == "DiffusionDPO":
        rewards, dataset = [], color_pairs(4)
    elif method == "DiffusionSFT":
        rewards, dataset = [], color_pairs(4).rename_column("chosen", "image")
    elif method == "TAPO":
        reward, unchanged = train_slrm(tmp_path)
        assert not [name for name in unchanged if "score" in name or "task" in name]
        rewards = [[tapo_trl.load_reward_model(reward, base_model=OwnPolicy.tiny()), redness]]
    trainer = getattr(tapo_trl, f"{method}Trainer")(
        OwnPolicy.tiny(), *rewards, args=args, train_dataset=dataset, peft_config=make_lora()
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    expected = {"FlowGRPO": 0.0, "DiffusionNFT": losses[0], "DiffusionSFT": losses[0]}.get(method, math.log(2))
    assert losses[0] == pytest.approx(expected, abs=1e-6)
    pipeline = OwnPolicy.tiny()
    pipeline.load_lora_weights(str(folder / "checkpoint-2"))
    inputs = (torch.randn(1, 4, 4, 4), 0.5, trainer.prompt_cache.load([dataset["prompt"][0]]), None, 3.5)
    found = OwnPolicy(pipeline).velocity(pipeline.transformer, *inputs)
    torch.testing.assert_close(found, trainer.policy.velocity(trainer.model.eval(), *inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("command", ["tapo", "grpo", "online_dpo", "nft", "dpo", "sft", "slrm"])
def test_dry_run(tmp_path, capsys, command):
    OwnPolicy.tiny().save_pretrained(tmp_path / "flux")
    data = ["--dataset_name", "pairs"] if command in ("dpo", "sft", "slrm") else ["--reward_model", "judges:redness"]
    model = ["--model_name_or_path", str(tmp_path / "flux"), "--use_peft", "--dry_run"]
    size = ["--height", "64", "--width", "32", "--output_dir", str(tmp_path / "out")]
    size += ["--num_generations", "4"] if command in ("grpo", "nft") else []  # their defaults take a minute
    assert main([command, *data, *model, *size]) == 0
    text = capsys.readouterr().out
    assert "4 x 8 x 4" in text and "8 of a sample + 512 of its prompt" in text and "is an estimate" in text
