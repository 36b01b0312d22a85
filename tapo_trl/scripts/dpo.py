# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from typing import TYPE_CHECKING

from ..cli.parser import RecipeParser


if TYPE_CHECKING:
    from ..trainer.diffusion_dpo_trainer import DiffusionDPOTrainer


def make_parser() -> RecipeParser:
    """Parser of `tapo-trl dpo`."""
    from ..cli.model_arguments import DiffusionModelConfig
    from ..cli.script_arguments import DPOScriptArguments
    from ..trainer.diffusion_dpo_config import DiffusionDPOConfig

    return RecipeParser((DPOScriptArguments, DiffusionDPOConfig, DiffusionModelConfig), prog="tapo-trl dpo")


def make_trainer(script_args, training_args, model_args) -> "DiffusionDPOTrainer":
    """
    The trainer that the flags describe.

    Args:
        script_args ([`DPOScriptArguments`]): The preference pairs and the callbacks.
        training_args ([`DiffusionDPOConfig`]): The training.
        model_args ([`DiffusionModelConfig`]): The pipeline to align.
    """
    from ..cli.builders import build_sample_callbacks, load_policy_from_args, load_preference_splits
    from ..cli.model_arguments import get_lora_config
    from ..trainer.diffusion_dpo_trainer import DiffusionDPOTrainer

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
        from ..estimate.dry_run import print_dry_run
        from ..estimate.dry_run_pairs import dry_run_dpo

        print_dry_run(dry_run_dpo(training_args, model_args))
        return

    from ..cli.builders import run_training

    run_training(make_trainer(script_args, training_args, model_args), training_args, script_args.dataset_name)
