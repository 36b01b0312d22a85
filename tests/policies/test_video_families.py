# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Runs of trainers on families of videos."""

import pkgutil
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

import tapo_trl
from tapo_trl.cli.main import main
from tapo_trl.policies import load_policy
from tapo_trl.policies.hunyuan_video15 import HunyuanVideo15Policy
from tests.data.preference_pairs import latent_pairs


pytestmark = pytest.mark.slow

POLICIES = [
    pytest.param("tests.policies.ti2v:TI2VPolicy", marks=pytest.mark.exhaustive),
    "tapo_trl.policies.wan_experts:WanExpertsPolicy",
    "tapo_trl.policies.hunyuan_video:HunyuanVideoPolicy",
    pytest.param("tapo_trl.policies.hunyuan_video15:HunyuanVideo15Policy", marks=pytest.mark.exhaustive),
]
SIZE = {"height": 32, "width": 32, "num_frames": 5}


def redness(samples, prompts):
    return (samples[:, 0] - samples[:, 1]).flatten(1).mean(1)


def make_trainer(method, pipeline, tmp_path, name, **changed):
    policy = load_policy(pipeline)
    options = {
        **SIZE,
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_sequence_length": 24,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "cache_dir": str(tmp_path / "cache"),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if method == "SLRM":
        options |= {"num_task_tokens": 2, "expert": "low" if len(policy.experts) > 1 else None}
    else:
        options |= {"guidance_scale": 3.0, "num_inference_steps": 8}
    if method == "TAPO":
        options |= {"num_sde_steps": 2, "num_candidates": 2, "num_iterations": 2, "beta": 1.0}
    online = method == "TAPO"
    return getattr(tapo_trl, f"{method}Trainer")(
        policy,
        *([redness] if online else []),
        args=getattr(tapo_trl, f"{method}Config")(str(tmp_path / name), **options | changed),
        train_dataset=Dataset.from_dict({"prompt": ["red cat", "a blue dog that runs"] * 2})
        if online
        else latent_pairs(4, policy.latent_shape(**SIZE)),
        peft_config=LoraConfig(r=2, lora_alpha=6),
    )


@pytest.mark.parametrize("method", ["TAPO", "DiffusionDPO", "SLRM"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda name: name.split(":")[1])
def test_resumed_bit_for_bit(tmp_path, policy, method):
    policy_class = pkgutil.resolve_name(policy)
    whole = make_trainer(method, policy_class.tiny(), tmp_path, "whole")
    before = {name: parameter.clone() for name, parameter in whole.model.named_parameters() if "lora_B" in name}
    whole.train()
    again = make_trainer(method, policy_class.tiny(), tmp_path, "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for (name, first), (_, second) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(first, second), name
        assert name not in before or first.any() or not has_gradient(policy_class, name), name


def has_gradient(policy_class, name):
    """The last block's output of the text is not read where there is no single block behind it."""
    last = f"transformer_blocks.{1 if policy_class is HunyuanVideo15Policy else -1}.attn"
    return not any(f"{last}.{part}" in name for part in ("to_add_out", "add_q_proj"))


def test_hunyuan_video_15_is_merged_by_the_command(tmp_path):
    trainer = make_trainer("TAPO", HunyuanVideo15Policy.tiny(), tmp_path, "lora", max_steps=1)
    trainer.train()
    trainer.save_model()
    HunyuanVideo15Policy.tiny().save_pretrained(tmp_path / "base")
    flags = [f"--{name}={tmp_path / folder}" for name, folder in (("lora", "lora"), ("output_dir", "merged"))]
    assert main(["merge", f"--model_name_or_path={tmp_path / 'base'}", *flags]) == 0
    merged = load_policy(str(tmp_path / "merged"))
    prompts = trainer.prompt_cache.load(["red cat"])
    latents = torch.randn(1, *trainer.latent_shape)
    with torch.no_grad():
        expected = trainer.policy.velocity(trainer.model.eval(), latents, 0.5, prompts)
        found = merged.velocity(merged.transformer, latents, 0.5, prompts)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda name: name.split(":")[1])
def test_the_code_of_the_card_runs(tmp_path, policy, monkeypatch):
    """In the size of a test, and with the pipeline's folder as the base."""
    pipeline = pkgutil.resolve_name(policy).tiny()
    pipeline.save_pretrained(tmp_path / "base")
    trainer = make_trainer("TAPO", pipeline, tmp_path, "lora", max_steps=1, num_iterations=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "lora" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = re.sub(r'from_pretrained\("[^"]*"', f'from_pretrained("{tmp_path / "base"}"', code)
    code = re.sub(r'(load_lora_\w+)\("[^"]*"', rf'\1("{tmp_path / "lora"}"', code)
    code = code.replace("generator=", "height=32, width=32, num_frames=5, num_inference_steps=2, generator=")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert len(names["video"]) == 5 and (tmp_path / "lighthouse.mp4").stat().st_size > 0
    loaded = names["pipeline"]
    for name, expert in trainer.policy.experts.items():
        own, trained = (dict(network.named_parameters()) for network in (getattr(loaded, name), expert))
        adapters = {key: p for key, p in trained.items() if "lora_" in key}
        assert adapters
        for key, tensor in adapters.items():
            other = next(own[k] for k in own if re.sub(r"\.default\w*\.", ".", k) == key.replace(".default.", "."))
            torch.testing.assert_close(other.float(), tensor.to(torch.bfloat16).float())
    schedulers = re.findall(r"`(FlowMatchEuler[^`]*)`", card)
    assert len(schedulers) == ("flow_shift" in pipeline.scheduler.config)
    for line in schedulers:
        exec(f"from diffusers import FlowMatchEulerDiscreteScheduler\nscheduler = {line}", names)
