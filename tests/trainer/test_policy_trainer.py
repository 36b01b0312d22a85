# Copyright 2026 The tapo_trl authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What must hold for every trainer of a policy, whatever its algorithm."""

import pytest
import torch
from datasets import Dataset

from tapo_trl import (
    DiffusionDPOTrainer,
    FlowGRPOTrainer,
    OnlineDiffusionDPOTrainer,
    SLRMConfig,
    SLRMTrainer,
    TAPOTrainer,
)

from ..data.preference_pairs import latent_pairs
from ..testing_utils import tiny_sd3_pipeline
from . import test_diffusion_dpo_trainer, test_flow_grpo_trainer, test_online_dpo_trainer, test_tapo_trainer
from .policy_checks import trainable
from .test_tapo_trainer import PROMPTS, make_lora, redness


METHODS = {
    "tapo": (TAPOTrainer, test_tapo_trainer.make_args),
    "online_dpo": (OnlineDiffusionDPOTrainer, test_online_dpo_trainer.make_args),
    "grpo": (FlowGRPOTrainer, test_flow_grpo_trainer.make_args),
    "dpo": (DiffusionDPOTrainer, test_diffusion_dpo_trainer.make_args),
}
SMALL = {"num_inference_steps": 2, "max_steps": 1, "per_device_train_batch_size": 1, "guidance_scale": 1.0}


def make_trainer(
    method, tmp_path, pipeline=None, peft_config=None, eval_dataset=None, optimizers=(None, None), **kwargs
):
    """The trainer of `method`; `eval_dataset` has prompts or pairs, as it needs."""
    torch.manual_seed(0)
    trainer_class, make_args = METHODS[method]
    counts = {"tapo": {"num_sde_steps": 1}, "online_dpo": {"num_noise_levels": 1}, "grpo": {}, "dpo": {}}
    arguments = [tiny_sd3_pipeline() if pipeline is None else pipeline]
    arguments += [] if method == "dpo" else [redness]
    return trainer_class(
        *arguments,
        make_args(tmp_path, **SMALL | counts[method] | kwargs),
        train_dataset=latent_pairs(4) if method == "dpo" else Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset=eval_dataset,
        optimizers=optimizers,
        peft_config=peft_config,
    )


def make_slrm_trainer(tmp_path, pipeline=None, peft_config=None, eval_dataset=None, optimizers=(None, None), **kwargs):
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
        "resolution": 32,
        "max_sequence_length": 3,
        "num_task_tokens": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "logging_steps": 1,
        "eval_sigmas": [0.5],
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return SLRMTrainer(
        tiny_sd3_pipeline() if pipeline is None else pipeline,
        SLRMConfig(**defaults | kwargs),
        train_dataset=latent_pairs(4),
        eval_dataset=eval_dataset,
        optimizers=optimizers,
        peft_config=peft_config,
    )


def make(method, tmp_path, *args, **kwargs):
    if method == "slrm":
        return make_slrm_trainer(tmp_path, *args, **kwargs)
    return make_trainer(method, tmp_path, *args, **kwargs)


class TestPrecision:
    @pytest.mark.parametrize("method", [*METHODS, "slrm"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_full_fine_tuning_moves_weights_that_come_in_half_precision(self, tmp_path, method, dtype):
        """In half precision, most updates of 1e-5 are rounded away."""
        trainer = make(method, tmp_path, tiny_sd3_pipeline().to(dtype), learning_rate=1e-5)
        before = trainable(trainer)
        trainer.train()
        after = trainable(trainer)
        assert {value.dtype for value in after.values()} == {torch.float32}
        moved = sum((after[name] != value).sum().item() for name, value in before.items())
        assert moved > 0.8 * sum(value.numel() for value in before.values())

    @pytest.mark.parametrize("method", [*METHODS, "slrm"])
    @pytest.mark.parametrize("peft", [True, False])
    def test_two_half_precisions_are_refused(self, tmp_path, method, peft):
        peft_config = make_lora() if peft else None
        with pytest.raises(
            ValueError, match="`bf16=True` computes in torch.bfloat16, but the `transformer` of `model`"
        ):
            make(method, tmp_path, tiny_sd3_pipeline().to(torch.float16), peft_config, bf16=True)

    @pytest.mark.parametrize("method", [*METHODS, "slrm"])
    @pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
    def test_two_half_precisions_are_refused_before_loading(self, tmp_path, method, name):
        with pytest.raises(ValueError, match=f"`{name}` in `model_init_kwargs` is float16"):
            make(method, tmp_path, "no-such/model", bf16=True, model_init_kwargs={name: "float16"})

    def test_half_precision_of_text_encoders_alone(self, tmp_path):
        pipeline = tiny_sd3_pipeline()
        pipeline.text_encoder.to(torch.float16)
        with pytest.raises(ValueError, match="the `text_encoder` of `model` is float16"):
            make("tapo", tmp_path, pipeline, bf16=True)
