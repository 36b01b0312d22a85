# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
What needs a GPU: `pytest -m gpu tests/gpu`. With `TAPO_TRL_GPU_TESTS=cpu`, the tests that a CPU can run rehearse there.
"""

import math
import os

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tapo_trl import TAPOConfig, TAPOTrainer, load_policy
from tapo_trl.policies import SD3Policy, WanPolicy
from tapo_trl.policies.flux import FluxPolicy
from tapo_trl.rewards import SLRMModel


REHEARSAL = os.environ.get("TAPO_TRL_GPU_TESTS") == "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() and not REHEARSAL, reason="needs a CUDA device"),
]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = ["cat", "red fox"]


def redness(images, prompts):
    return images[:, 0].mean(dim=tuple(range(1, images.ndim - 1)))


@pytest.fixture(autouse=True)
def float32_products():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("policy_class", [SD3Policy, FluxPolicy, WanPolicy])
def test_samples_and_scores_are_those_of_the_cpu(policy_class):
    found = {}
    for device in ("cpu", DEVICE):
        policy = load_policy(policy_class.tiny())
        size = (32, 32, 5) if policy.modality == "video" else (32, 32)
        torch.manual_seed(0)
        slrm = SLRMModel.from_policy(policy, max_sequence_length=8).to(device)
        embeds = policy.encode_prompts(PROMPTS, max_sequence_length=8).to(device)
        negative = policy.encode_prompts([""], max_sequence_length=8).to(device)
        policy.transformer.to(device)
        latents = policy.sample(
            policy.transformer,
            embeds,
            negative,
            latent_shape=policy.latent_shape(*size),
            num_inference_steps=6,
            guidance_scale=3.0,
            generators=[torch.Generator().manual_seed(seed) for seed in range(2)],
        )
        with torch.no_grad():
            found[device] = latents.cpu(), slrm.score(latents, 0.5, **embeds.tensors).cpu()
    for on_cpu, on_device in zip(found["cpu"], found[DEVICE], strict=True):
        torch.testing.assert_close(on_device, on_cpu, atol=1e-4, rtol=1e-4)


def train(tmp_path, peft=True, **options):
    torch.manual_seed(0)
    args = TAPOConfig(
        output_dir=str(tmp_path / "out"),
        cache_dir=str(tmp_path / "cache"),
        resolution=32,
        max_sequence_length=3,
        num_inference_steps=6,
        num_sde_steps=3,
        num_candidates=2,
        guidance_scale=2.0,
        beta=100.0,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        max_steps=6,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **{"bf16": False, "use_cpu": DEVICE == "cpu"} | options,
    )
    lora = LoraConfig(r=2, lora_alpha=4, init_lora_weights="gaussian") if peft else None
    prompts = Dataset.from_dict({"prompt": PROMPTS * 6})
    trainer = TAPOTrainer(SD3Policy.tiny(), redness, args, prompts, peft_config=lora)
    trainer.train()
    return [logs for logs in trainer.state.log_history if "loss" in logs]


@pytest.mark.parametrize("precision", ["float32", "bf16", pytest.param("fp16", marks=needs_cuda)])
@pytest.mark.parametrize("peft", [True, False])
def test_training_starts_at_ln_2_and_stays_finite(tmp_path, precision, peft):
    logs = train(tmp_path, peft, **({} if precision == "float32" else {precision: True}))
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-3) and len(logs) == 6
    assert all(math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"]) for entry in logs[1:])
    assert logs[-1]["kl"] > 0 and logs[-1]["loss"] != logs[0]["loss"]


@needs_cuda
def test_updates_are_those_of_the_cpu(tmp_path):
    on_device, on_cpu = train(tmp_path / "device"), train(tmp_path / "cpu", use_cpu=True)
    for ours, theirs in zip(on_device[:3], on_cpu[:3], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)
        assert ours["reward"] == pytest.approx(theirs["reward"], abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"torch_compile": True},
        {"layerwise_casting": True, "bf16": True},
        {"attention_backend": "native"},
        pytest.param({"attention_backend": "_native_flash", "bf16": True}, marks=needs_cuda),
        pytest.param({"attention_backend": "_native_cudnn", "bf16": True}, marks=needs_cuda),
    ],
    ids=str,
)
def test_options_of_speed(tmp_path, options):
    policy = FluxPolicy.tiny()  # SD3 keeps its own attention
    torch.manual_seed(0)
    args = {"max_steps": 2, "num_sde_steps": 2, "num_candidates": 2, "num_inference_steps": 4, "resolution": 32}
    args |= {"output_dir": str(tmp_path), "cache_dir": str(tmp_path), "max_sequence_length": 8, "report_to": "none"}
    args |= {"per_device_train_batch_size": 2, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    config = TAPOConfig(**args | {"bf16": False, "use_cpu": DEVICE == "cpu"} | options)
    prompts = Dataset.from_dict({"prompt": PROMPTS * 2})
    trainer = TAPOTrainer(policy, redness, config, prompts, peft_config=LoraConfig(r=2))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-3) and math.isfinite(logs[-1]["loss"])


@needs_cuda
def test_a_reward_model_that_waits_on_the_cpu_scores_the_same(tmp_path):
    policy = load_policy(SD3Policy.tiny())
    torch.manual_seed(0)
    slrm = SLRMModel.from_policy(policy, max_sequence_length=3, resolution=32)
    slrm.save_pretrained(tmp_path / "slrm")
    rewards = []
    for offload in (False, True):
        torch.manual_seed(0)
        args = {"max_steps": 1, "num_sde_steps": 2, "num_candidates": 2, "num_inference_steps": 4, "resolution": 32}
        args |= {"max_sequence_length": 3, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        args |= {"cache_dir": str(tmp_path), "per_device_train_batch_size": 2, "logging_steps": 1, "bf16": False}
        config = TAPOConfig(str(tmp_path / f"out-{offload}"), **args, reward_group_offload=offload)
        prompts = Dataset.from_dict({"prompt": PROMPTS})
        trainer = TAPOTrainer(SD3Policy.tiny(), str(tmp_path / "slrm"), config, prompts, peft_config=LoraConfig(r=2))
        trainer.train()
        rewards.append(trainer.state.log_history[0]["reward"])
    assert rewards[1] == pytest.approx(rewards[0], abs=1e-4)


@needs_cuda
def test_one_process_of_nccl(tmp_path, monkeypatch):
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        logs = train(tmp_path, ddp_backend="nccl")
        assert torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl"
        assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
