# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from tapo_trl.runs.checks import check_launch


def configuration(world_size=2, zero=None, deepspeed=None, **overrides):
    distributed_type = DistributedType.MULTI_GPU if world_size > 1 else DistributedType.NO
    plugin = None
    if zero is not None:
        config = {"zero_optimization": zero, "gradient_clipping": 1.0} | (deepspeed or {})
        plugin = SimpleNamespace(deepspeed_config={name: value for name, value in config.items() if value is not None})
    values = {
        "world_size": world_size,
        "bf16": True,
        "fp16": False,
        "per_device_train_batch_size": 2,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_grad_norm": 1.0,
        "deepspeed_plugin": plugin,
        "fsdp": None,
        "fsdp_plugin_args": None,
        "distributed_state": SimpleNamespace(distributed_type=distributed_type),
    }
    return SimpleNamespace(**values | overrides)


def problems(args, num_rows=None, **environment):
    environment = {"WORLD_SIZE": str(args.world_size)} | environment
    try:
        check_launch(args, num_rows, environment)
    except ValueError as error:
        return str(error).split("\n- ")[1:]
    return []


class TestCheckLaunch:
    @pytest.mark.parametrize(
        "args",
        [
            configuration(1),
            configuration(),
            configuration(zero={"stage": 2}),
            configuration(zero={"stage": 2}, deepspeed={"gradient_clipping": "auto", "train_batch_size": "auto"}),
            configuration(zero={"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}),
            configuration(zero={"stage": 2}, deepspeed={"gradient_clipping": None}, max_grad_norm=0.0),
        ],
    )
    def test_accepts(self, args):
        assert problems(args, num_rows=12, ACCELERATE_MIXED_PRECISION="bf16") == []
        assert problems(args, num_rows=12, ACCELERATE_MIXED_PRECISION="no") == []

    @pytest.mark.parametrize(
        ("args", "environment", "words"),
        [
            (configuration(1), {"WORLD_SIZE": "8"}, ["8 processes", "they are 1", "`use_cpu: true`"]),
            (configuration(1), {"SLURM_STEP_NUM_TASKS": "8"}, ["8 tasks", "--ntasks-per-node=1"]),
            (configuration(), {"ACCELERATE_MIXED_PRECISION": "fp16"}, ["'fp16'", "`bf16: true`", "'no'"]),
            (configuration(bf16=False), {"ACCELERATE_MIXED_PRECISION": "bf16"}, ["'bf16'", "`bf16: false`"]),
            (
                configuration(zero={"stage": 2}, deepspeed={"gradient_accumulation_steps": 1}),
                {},
                ["`gradient_accumulation_steps` is 1", "is 3", "'auto'"],
            ),
            (configuration(zero={"stage": 2}, max_grad_norm=0.5), {}, ["`gradient_clipping` is 1.0", "is 0.5"]),
            (
                configuration(zero={"stage": 2}, deepspeed={"gradient_clipping": None}),
                {},
                ["would not clip", "`max_grad_norm` is 1.0"],
            ),
            (
                configuration(zero={"stage": 2}, deepspeed={"bf16": {"enabled": False}}),
                {},
                ["`bf16.enabled` is False"],
            ),
            (
                configuration(zero={"stage": 2, "reduce_bucket_size": "auto"}),
                {},
                ["`reduce_bucket_size`", "hidden_size"],
            ),
            (configuration(zero={"stage": 3}), {}, ["would not be written", "zero3_save_16bit_model"]),
            (
                configuration(),
                {"ACCELERATE_USE_FSDP": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
                ["SHARDED_STATE_DICT", "FULL_STATE_DICT"],
            ),
            (
                configuration(fsdp=True, fsdp_plugin_args={"state_dict_type": "SHARDED_STATE_DICT"}),
                {},
                ["SHARDED_STATE_DICT", "FULL_STATE_DICT"],
            ),
            (
                configuration(distributed_state=SimpleNamespace(distributed_type=DistributedType.MULTI_CPU)),
                {"ACCELERATE_USE_FSDP": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
                ["shards nothing"],
            ),
        ],
    )
    def test_refuses(self, args, environment, words):
        (problem,) = problems(args, **environment)
        for word in words:
            assert word in problem

    def test_batch_that_is_larger_than_the_dataset(self):
        (problem,) = problems(configuration(), num_rows=11)
        assert "A batch of 12 rows" in problem and "(11)" in problem
        assert problems(configuration(1), num_rows=1) == []  # one process just makes it smaller

    def test_says_everything_at_once(self):
        args = configuration(zero={"stage": 3, "stage3_prefetch_bucket_size": "auto"}, max_grad_norm=0.5)
        assert len(problems(args, num_rows=2, ACCELERATE_MIXED_PRECISION="fp16")) == 5
