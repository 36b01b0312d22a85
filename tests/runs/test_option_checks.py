# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from tapo_trl import SLRMConfig
from tests.testing_utils import tiny_sd3_pipeline
from tests.trainer import test_diffusion_dpo_trainer, test_flow_grpo_trainer, test_tapo_trainer
from tests.trainer.policy_checks import trainable
from tests.trainer.test_policy_trainer import METHODS, make
from tests.trainer.test_tapo_trainer import make_lora


@pytest.mark.parametrize(
    ("make_args", "options", "message"),
    [
        (
            test_tapo_trainer.make_args,
            {"loss_type": "hinge", "label_smoothing": 0.1},
            "`label_smoothing=0.1` has no effect",
        ),
        (test_tapo_trainer.make_args, {"loss_type": "ipo", "label_smoothing": 0.1}, "with `loss_type='ipo'`"),
        (test_flow_grpo_trainer.make_args, {"ref_model_sync_steps": 8}, "without `sync_ref_model=True`"),
        (test_tapo_trainer.make_args, {"ref_model_mixup_alpha": 0.5}, "`ref_model_mixup_alpha=0.5` has no effect"),
        (
            test_diffusion_dpo_trainer.make_args,
            {"gamma": 0.5},
            "`gamma=0.5` has no effect with `variant='diffusion_dpo'`",
        ),
        (test_diffusion_dpo_trainer.make_args, {"gamma": 0.5, "variant": "inversion_dpo"}, "it is for 'dense_reward'"),
        (
            test_diffusion_dpo_trainer.make_args,
            {"timestep_sampling": "uniform", "variant": "dense_reward"},
            "`timestep_sampling='uniform'` has no effect",
        ),
    ],
)
def test_options_of_policies_that_cannot_act(tmp_path, make_args, options, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"velocity_target": "none", "rho": 1.0}, '`rho=1.0` has no effect with `velocity_target="none"`'),
        ({"velocity_target": "none", "detach_score": True}, "`detach_score=True` has no effect"),
        ({"rho": 0.0, "detach_score": True}, "`detach_score=True` has no effect with `rho=0`"),
    ],
)
def test_options_of_reward_models_that_cannot_act(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SLRMConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize("method", [*METHODS, "slrm"])
def test_arguments_of_loading_for_a_pipeline_that_is_loaded(tmp_path, method):
    with pytest.raises(ValueError, match="`model_init_kwargs=.*` has no effect because `model` is a pipeline"):
        make(method, tmp_path, tiny_sd3_pipeline(), model_init_kwargs={"revision": "main"})


@pytest.mark.parametrize("method", [*METHODS, "slrm"])
def test_jit_checkpoints(tmp_path, method):
    """`Trainer` would have its own handler of SIGTERM, which `GracefulStopCallback` replaces."""
    with pytest.raises(ValueError, match="`enable_jit_checkpoint=True` has no effect because on SIGTERM"):
        make(method, tmp_path, enable_jit_checkpoint=True)


@pytest.mark.parametrize("method", [*METHODS, "slrm"])
def test_frames_per_second_of_images(tmp_path, method):
    with pytest.raises(ValueError, match="`fps=8` has no effect because `model` makes images"):
        make(method, tmp_path, fps=8)


@pytest.mark.parametrize("method", ["tapo", "grpo"])
def test_training_without_guidance_that_there_is_none_of(tmp_path, method):
    with pytest.raises(ValueError, match="`train_cfg=False` has no effect without guidance .`guidance_scale=1`"):
        make(method, tmp_path, guidance_scale=1.0, train_cfg=False)


def test_a_velocity_target_for_a_function(tmp_path):
    with pytest.raises(
        ValueError, match="`velocity_target='parent'` is for SLRMs, .* but every `reward_model` is a function"
    ):
        make("tapo", tmp_path, "no-such/model", velocity_target="parent")


def test_rollouts_that_are_used_again_and_any_interval_of_checkpoints(tmp_path):
    args = test_tapo_trainer.make_args(tmp_path, num_iterations=3, save_strategy="steps", save_steps=4)
    assert args.save_steps == 4


class TestOptimizer:
    @pytest.mark.parametrize("method", [*METHODS, "slrm"])
    def test_one_that_holds_nothing_that_is_trained(self, tmp_path, method):
        pipeline = tiny_sd3_pipeline()
        optimizer = torch.optim.AdamW(pipeline.transformer.parameters())  # made before LoRA was added
        with pytest.raises(ValueError, match="holds none of the weights that are trained"):
            make(method, tmp_path, pipeline, make_lora(), optimizers=(optimizer, None))

    def test_one_that_holds_a_part_of_it(self, tmp_path, caplog):
        pipeline = tiny_sd3_pipeline()
        optimizer = torch.optim.SGD(pipeline.transformer.proj_out.parameters(), lr=1e-2)
        trainer = make("tapo", tmp_path, pipeline, optimizers=(optimizer, None))
        assert "holds 2 of the" in caplog.text and "`pos_embed.proj.weight`, stay as they are" in caplog.text
        before = trainable(trainer)
        trainer.train()
        changed = {name for name, value in trainable(trainer).items() if not torch.equal(value, before[name])}
        assert changed == {"proj_out.weight", "proj_out.bias"}

    def test_one_that_holds_all_of_it(self, tmp_path, caplog):
        pipeline = tiny_sd3_pipeline()
        optimizer = torch.optim.SGD(pipeline.transformer.parameters(), lr=1e-2)
        make("dpo", tmp_path, pipeline, optimizers=(optimizer, None))
        assert "stay as they are" not in caplog.text
