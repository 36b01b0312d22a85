# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json

import numpy as np
import pytest
from datasets import Dataset
from peft import LoraConfig
from PIL import Image

from tapo_trl import SLRMConfig, SLRMTrainer, TAPOConfig, TAPOTrainer
from tapo_trl.trainer.policy_setup import make_config_trackable


COMMON = {
    "resolution": 32,
    "max_sequence_length": 3,
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "tensorboard",
}


class TestMakeConfigTrackable:
    def test_adds_what_transformers_calls_and_changes_nothing(self, tiny_sd3_pipeline):
        transformer = tiny_sd3_pipeline.transformer
        before = dict(transformer.config)
        make_config_trackable(transformer)
        assert transformer.config.to_dict() == before
        assert json.loads(transformer.config.to_json_string())["num_layers"] == before["num_layers"]
        assert transformer.config.num_layers == before["num_layers"]

    def test_the_model_still_saves_and_loads(self, tiny_sd3_pipeline, tmp_path):
        transformer = tiny_sd3_pipeline.transformer
        make_config_trackable(transformer)
        transformer.save_pretrained(tmp_path)
        loaded = type(transformer).from_pretrained(tmp_path)
        assert loaded.config.dual_attention_layers == list(transformer.config.dual_attention_layers)
        assert loaded.config.num_layers == transformer.config.num_layers


class TestTensorBoard:
    """`report_to="tensorboard"` stops the training of any plain diffusers model."""

    @pytest.fixture(autouse=True)
    def needs_tensorboard(self):
        pytest.importorskip("tensorboard")

    def test_tapo(self, tmp_path, tiny_sd3_pipeline):
        args = TAPOConfig(
            str(tmp_path), num_inference_steps=4, num_sde_steps=2, num_candidates=2, cache_dir=str(tmp_path), **COMMON
        )
        TAPOTrainer(
            tiny_sd3_pipeline,
            lambda images, prompts: images.mean((1, 2, 3)),
            args,
            train_dataset=Dataset.from_dict({"prompt": ["cat", "dog"]}),
            peft_config=LoraConfig(r=2),
        ).train()
        assert list(tmp_path.rglob("events.out.*"))

    def test_slrm(self, tmp_path, tiny_sd3_pipeline):
        image = Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8))
        SLRMTrainer(
            tiny_sd3_pipeline,
            SLRMConfig(str(tmp_path), cache_dir=str(tmp_path), **COMMON),
            train_dataset=Dataset.from_dict(
                {"prompt": ["cat", "dog"], "chosen": [image] * 2, "rejected": [image] * 2}
            ),
        ).train()
        assert list(tmp_path.rglob("events.out.*"))
