# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from typing import TYPE_CHECKING

from ..cli.parser import RecipeParser


if TYPE_CHECKING:
    from ..trainer.online_dpo_trainer import OnlineDiffusionDPOTrainer


def make_parser() -> RecipeParser:
    """Parser of `tapo-trl online_dpo`."""
    from ..cli.model_arguments import DiffusionModelConfig
    from ..cli.script_arguments import TAPOScriptArguments
    from ..trainer.online_dpo_config import OnlineDiffusionDPOConfig

    return RecipeParser(
        (TAPOScriptArguments, OnlineDiffusionDPOConfig, DiffusionModelConfig), prog="tapo-trl online_dpo"
    )


def make_trainer(script_args, training_args, model_args) -> "OnlineDiffusionDPOTrainer":
    """
    The trainer that the flags describe.

    Args:
        script_args ([`TAPOScriptArguments`]): The reward model, the held-out prompts and the callbacks.
        training_args ([`OnlineDiffusionDPOConfig`]): The training.
        model_args ([`DiffusionModelConfig`]): The pipeline to align.
    """
    from ..cli.builders import make_rollout_trainer
    from ..trainer.online_dpo_trainer import OnlineDiffusionDPOTrainer

    return make_rollout_trainer(OnlineDiffusionDPOTrainer, script_args, training_args, model_args)


def main(script_args, training_args, model_args) -> None:
    """
    Aligns a policy by Diffusion-DPO on its own samples, saves it to `output_dir` and, with `push_to_hub`, uploads it.
    With `dry_run`, prints what it would do instead.

    Args:
        script_args ([`TAPOScriptArguments`]): The reward model, the held-out prompts and the callbacks.
        training_args ([`OnlineDiffusionDPOConfig`]): The training.
        model_args ([`DiffusionModelConfig`]): The pipeline to align.
    """
    if script_args.dry_run:
        from ..estimate.dry_run import print_dry_run
        from ..estimate.dry_run_rollouts import dry_run_online_dpo

        print_dry_run(dry_run_online_dpo(script_args, training_args, model_args))
        return

    from ..cli.builders import run_training

    run_training(make_trainer(script_args, training_args, model_args), training_args, training_args.dataset_name)
