# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
`checkpoint-1` was written by version 0.1 between two updates from the same rollouts, and `after_two_steps.safetensors` by the same run one update
later. The run of `make_trainer` must give both again, and go on from the first.
"""

import shutil
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors import safe_open

from tapo_trl import TAPOConfig, TAPOTrainer
from tests.testing_utils import tiny_sd3_pipeline


FOLDER = Path(__file__).parent
LORA_FILE = "pytorch_lora_weights.safetensors"


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def make_trainer(folder):
    args = TAPOConfig(
        output_dir=str(folder / "tapo"),
        max_steps=2,
        num_iterations=2,
        save_steps=1,
        save_strategy="steps",
        per_device_train_batch_size=2,
        num_inference_steps=4,
        num_sde_steps=2,
        num_candidates=2,
        guidance_scale=2.0,
        learning_rate=0.01,
        resolution=32,
        bf16=False,
        use_cpu=True,
        cache_dir=str(folder / "cache"),
        max_sequence_length=2,
        lr_scheduler_type="constant",
        logging_steps=1,
    )
    return TAPOTrainer(
        tiny_sd3_pipeline(),
        redness,
        args,
        train_dataset=Dataset.from_dict({"prompt": ["a red cat", "a blue dog"]}),
        peft_config=LoraConfig(r=1, lora_alpha=1, init_lora_weights="gaussian", target_modules=["to_q"]),
    )


def read(file):
    with safe_open(file, framework="pt") as tensors:
        return tensors.metadata(), {name: tensors.get_tensor(name) for name in tensors.keys()}


def assert_same_file(found, expected):
    (metadata, tensors), (expected_metadata, expected_tensors) = read(found), read(expected)
    assert metadata.keys() == expected_metadata.keys()
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in expected_tensors.items():
        # Kernels of other processors round differently
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_same_run(tmp_path):
    make_trainer(tmp_path).train()
    assert_same_file(tmp_path / "tapo" / "checkpoint-1" / LORA_FILE, FOLDER / "checkpoint-1" / LORA_FILE)
    assert_same_file(tmp_path / "tapo" / "checkpoint-2" / LORA_FILE, FOLDER / "after_two_steps.safetensors")


def test_resume(tmp_path):
    checkpoint = shutil.copytree(FOLDER / "checkpoint-1", tmp_path / "tapo" / "checkpoint-1")
    trainer = make_trainer(tmp_path)
    rollouts = []
    generate = trainer.sampler.sample
    trainer.sampler.sample = lambda *args, **kwargs: rollouts.append(1) or generate(*args, **kwargs)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 2
    assert rollouts == []  # those of the checkpoint were used
    assert_same_file(tmp_path / "tapo" / "checkpoint-2" / LORA_FILE, FOLDER / "after_two_steps.safetensors")
