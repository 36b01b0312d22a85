# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import pytest
import torch
from peft import LoraConfig

from tapo_trl.trainer.model_config import DiffusionModelConfig, get_lora_config


class TestDiffusionModelConfig:
    @pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
    def test_dtype(self, name):
        assert DiffusionModelConfig(torch_dtype=name).dtype == getattr(torch, name)

    def test_missing_model_names_the_flag(self):
        with pytest.raises(ValueError, match="--model_name_or_path"):
            DiffusionModelConfig().require_model()

    @pytest.mark.parametrize(("field", "value"), [("lora_r", 0), ("lora_dropout", 1.0), ("lora_dropout", -0.1)])
    def test_bad_values(self, field, value):
        with pytest.raises(ValueError, match=f"`{field}` must be"):
            DiffusionModelConfig(**{field: value})


class TestGetLoraConfig:
    def test_none_without_use_peft(self, tiny_sd3_policy):
        assert get_lora_config(DiffusionModelConfig(), tiny_sd3_policy) is None

    def test_defaults(self, tiny_sd3_policy):
        config = get_lora_config(DiffusionModelConfig(use_peft=True), tiny_sd3_policy)
        assert isinstance(config, LoraConfig)
        assert (config.r, config.lora_alpha, config.lora_dropout) == (64, 64, 0.0)
        assert config.task_type is None
        assert config.init_lora_weights == "gaussian"
        assert set(config.target_modules) == set(tiny_sd3_policy.lora_target_modules)

    def test_own_values(self, tiny_sd3_policy):
        args = DiffusionModelConfig(
            use_peft=True, lora_r=4, lora_alpha=8, lora_dropout=0.1, lora_target_modules=["to_q"]
        )
        args = dataclasses.replace(args, init_lora_weights="default")
        config = get_lora_config(args, tiny_sd3_policy)
        assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.1)
        assert config.target_modules == {"to_q"}
        assert config.init_lora_weights is True

    def test_all_linear_is_a_word_and_no_name(self, tiny_sd3_policy):
        args = DiffusionModelConfig(use_peft=True, lora_target_modules=["all-linear"])
        assert get_lora_config(args, tiny_sd3_policy).target_modules == "all-linear"

    def test_adapts_every_attention_layer_and_starts_at_zero(self, tiny_sd3_policy):
        config = get_lora_config(DiffusionModelConfig(use_peft=True, lora_r=2), tiny_sd3_policy)
        transformer = tiny_sd3_policy.transformer
        transformer.add_adapter(config)
        adapted = {name.split(".lora_A")[0] for name, _ in transformer.named_parameters() if ".lora_A" in name}
        assert any(".attn2.to_q" in name for name in adapted), "the dual attention layers of SD3.5 are adapted"
        assert any(".attn.add_k_proj" in name for name in adapted)
        matrices = [p for name, p in transformer.named_parameters() if ".lora_B" in name]
        assert matrices
        assert all((matrix == 0).all() for matrix in matrices)
