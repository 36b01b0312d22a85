# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import math
import weakref

import pytest
from diffusers import ContextParallelConfig, ParallelConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from tapo_trl import DiffusionSFTConfig, DiffusionSFTTrainer, LRMModel, SLRMConfig, SLRMModel, SLRMTrainer, TAPOConfig
from tapo_trl.policies import load_policy
from tapo_trl.policies.flux2 import Flux2KleinPolicy
from tapo_trl.trainer.policy_setup import fill_in_sizes
from tapo_trl.trainer.slrm_loading import check_engine
from tests.data.preference_pairs import color_pairs
from tests.testing_utils import tiny_sd3_pipeline


@pytest.fixture(scope="module")
def klein():
    return load_policy(Flux2KleinPolicy.tiny())


class TestShiftOfTheNoiseLevels:
    @pytest.mark.parametrize(
        ("num_inference_steps", "height", "factor"),
        [(50, 1024, None), (20, 1024, 9.01), (50, 512, 6.10), (50, 1088, 3.30)],
    )
    def test_warns_of_another_one(self, tmp_path, klein, caplog, num_inference_steps, height, factor):
        sizes = {"height": height, "width": 1024, "num_inference_steps": num_inference_steps}
        fill_in_sizes(TAPOConfig(str(tmp_path), bf16=False, **sizes), klein)
        expected = "" if factor is None else f"shifted by exp(mu) = {factor:.2f} with"
        assert expected in caplog.text and (caplog.text == "") == (factor is None)

    def test_jumps_where_there_are_more_than_4300_tokens(self, klein):
        """Up to there it depends on the steps."""
        few, many, more = (4, 43, 100), (4, 1, 4300), (4, 1, 4301)
        assert klein.mu(10, few) == klein.mu(10, many) > klein.mu(50, many) > klein.mu(50, more) == klein.mu(10, more)
        assert math.exp(klein.mu(50, many)) / math.exp(klein.mu(50, more)) == pytest.approx(2.3, abs=0.1)

    def test_no_word_where_it_is_one(self, tmp_path, tiny_sd3_policy, caplog):
        sizes = {"resolution": 32, "num_inference_steps": 4, "num_sde_steps": 2}
        assert fill_in_sizes(TAPOConfig(str(tmp_path), bf16=False, **sizes), tiny_sd3_policy) == (4, 8, 8)
        assert caplog.text == ""


class TestParallelism:
    """A transformer that diffusers' `enable_parallelism` has changed."""

    @pytest.mark.parametrize(
        ("trainer_class", "config_class"), [(DiffusionSFTTrainer, DiffusionSFTConfig), (SLRMTrainer, SLRMConfig)]
    )
    def test_is_refused(self, tmp_path, trainer_class, config_class):
        pipeline = tiny_sd3_pipeline()
        pipeline.transformer._parallel_config = ParallelConfig(context_parallel_config=ContextParallelConfig(None, 2))
        args = config_class(str(tmp_path), bf16=False, use_cpu=True, report_to="none", resolution=32)
        rows = color_pairs(2)
        if trainer_class is DiffusionSFTTrainer:
            rows = rows.rename_column("chosen", "image").remove_columns("rejected")
        with pytest.raises(ValueError, match="leave `enable_parallelism` out"):
            trainer_class(pipeline, args, rows)


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_scalar_weights_need_ddp(tmp_path, monkeypatch, tiny_sd3_policy, engine):
    args = SLRMConfig(str(tmp_path), bf16=False, use_cpu=True)
    models = [
        LRMModel.from_policy(tiny_sd3_policy, max_sequence_length=4),
        SLRMModel.from_policy(tiny_sd3_policy, num_task_tokens=0),
    ]
    whole = SLRMModel.from_policy(tiny_sd3_policy, num_task_tokens=1)
    for model in (*models, whole):
        check_engine(model, args)
    if engine == "fsdp":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        args.deepspeed_plugin = object()
    for model in models:
        with pytest.raises(ValueError, match="its temperature `.*logit_scale`.*use DDP"):
            check_engine(model, args)
    check_engine(whole, args)


def test_nothing_is_split_on_loading(tmp_path, monkeypatch):
    """ZeRO-3 is registered when a configuration is made: Transformers would split what is loaded from then on."""

    class Registered:
        def is_zero3(self):
            return True

    config = Registered()
    monkeypatch.setattr("transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref", weakref.ref(config))
    assert is_deepspeed_zero3_enabled()
    SLRMConfig(str(tmp_path), bf16=False, use_cpu=True)
    assert not is_deepspeed_zero3_enabled()
