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
    from ..trainer.slrm_trainer import SLRMTrainer


def make_parser() -> RecipeParser:
    """Parser of `tapo-trl slrm`."""
    from ..trainer.slrm_config import SLRMConfig
    from .model_arguments import DiffusionModelConfig
    from .script_arguments import SLRMScriptArguments

    return RecipeParser((SLRMScriptArguments, SLRMConfig, DiffusionModelConfig), prog="tapo-trl slrm")


def make_trainer(script_args, training_args, model_args) -> "SLRMTrainer":
    """
    The trainer that the flags describe.

    Args:
        script_args ([`SLRMScriptArguments`]): The preference pairs.
        training_args ([`SLRMConfig`]): The training.
        model_args ([`DiffusionModelConfig`]): The pipeline that the reward model starts from, or the reward model.
    """
    from ..trainer.slrm_trainer import SLRMTrainer
    from .builders import load_preference_splits, model_init_kwargs
    from .model_arguments import get_lora_config

    train_dataset, eval_dataset = load_preference_splits(script_args)
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    return SLRMTrainer(
        model=model_args.require_model(),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_lora_config(model_args),
    )


def main(script_args, training_args, model_args) -> None:
    """
    Trains a latent reward model on preference pairs, saves it to `output_dir` and, with `push_to_hub`, uploads it.
    With `dry_run`, prints what it would do instead.

    Args:
        script_args ([`SLRMScriptArguments`]): The preference pairs.
        training_args ([`SLRMConfig`]): The training.
        model_args ([`DiffusionModelConfig`]): The pipeline that the reward model starts from, or the reward model.
    """
    if script_args.dry_run:
        from .dry_run import print_dry_run
        from .dry_run_pairs import dry_run_slrm

        print_dry_run(dry_run_slrm(training_args, model_args))
        return

    from .builders import run_training

    run_training(make_trainer(script_args, training_args, model_args), training_args, script_args.dataset_name)
