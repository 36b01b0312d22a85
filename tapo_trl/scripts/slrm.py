# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from typing import TYPE_CHECKING

from ..cli.parser import RecipeParser


if TYPE_CHECKING:
    from ..trainer.slrm_trainer import SLRMTrainer


def make_parser() -> RecipeParser:
    """Parser of `tapo-trl slrm`."""
    from ..cli.model_arguments import DiffusionModelConfig
    from ..cli.script_arguments import SLRMScriptArguments
    from ..trainer.slrm_config import SLRMConfig

    return RecipeParser((SLRMScriptArguments, SLRMConfig, DiffusionModelConfig), prog="tapo-trl slrm")


def make_trainer(script_args, training_args, model_args) -> "SLRMTrainer":
    """
    The trainer that the flags describe.

    Args:
        script_args ([`SLRMScriptArguments`]): The preference pairs.
        training_args ([`SLRMConfig`]): The training.
        model_args ([`DiffusionModelConfig`]): The pipeline that the reward model starts from, or the reward model.
    """
    from ..cli.builders import load_preference_splits, model_init_kwargs
    from ..cli.model_arguments import get_lora_config
    from ..trainer.slrm_trainer import SLRMTrainer

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
        from ..estimate.dry_run import print_dry_run
        from ..estimate.dry_run_pairs import dry_run_slrm

        print_dry_run(dry_run_slrm(training_args, model_args))
        return

    from ..cli.builders import run_training

    run_training(make_trainer(script_args, training_args, model_args), training_args, script_args.dataset_name)
