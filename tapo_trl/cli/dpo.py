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

from typing import TYPE_CHECKING

from .parser import RecipeParser


if TYPE_CHECKING:
    from ..trainer.diffusion_dpo_trainer import DiffusionDPOTrainer


def make_parser() -> RecipeParser:
    """Parser of `tapo-trl dpo`."""
    from ..trainer.diffusion_dpo_config import DiffusionDPOConfig
    from .model_arguments import DiffusionModelConfig
    from .script_arguments import DPOScriptArguments

    return RecipeParser((DPOScriptArguments, DiffusionDPOConfig, DiffusionModelConfig), prog="tapo-trl dpo")


def make_trainer(script_args, training_args, model_args) -> "DiffusionDPOTrainer":
    """
    The trainer that the flags describe.

    Args:
        script_args ([`DPOScriptArguments`]): The preference pairs and the callbacks.
        training_args ([`DiffusionDPOConfig`]): The training.
        model_args ([`DiffusionModelConfig`]): The pipeline to align.
    """
    from ..trainer.diffusion_dpo_trainer import DiffusionDPOTrainer
    from .builders import build_sample_callbacks, load_policy_from_args, load_preference_splits
    from .model_arguments import get_lora_config

    train_dataset, eval_dataset = load_preference_splits(script_args)
    policy = load_policy_from_args(model_args, training_args)
    return DiffusionDPOTrainer(
        model=policy,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=build_sample_callbacks(script_args, training_args, train_dataset, eval_dataset),
        peft_config=get_lora_config(model_args, policy),
    )


def main(script_args, training_args, model_args) -> None:
    """
    Aligns a policy with preference pairs, saves it to `output_dir` and, with `push_to_hub`, uploads it.
    With `dry_run`, prints what it would do instead.

    Args:
        script_args ([`DPOScriptArguments`]): The preference pairs and the callbacks.
        training_args ([`DiffusionDPOConfig`]): The training.
        model_args ([`DiffusionModelConfig`]): The pipeline to align.
    """
    if script_args.dry_run:
        from .dry_run import print_dry_run
        from .dry_run_pairs import dry_run_dpo

        print_dry_run(dry_run_dpo(training_args, model_args))
        return

    from .builders import run_training

    run_training(make_trainer(script_args, training_args, model_args), training_args, script_args.dataset_name)
