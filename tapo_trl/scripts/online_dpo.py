# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = [
#     "tapo-trl[video]",
# ]
# ///

"""
Align a text-to-image or text-to-video model with a reward model by Diffusion-DPO on its own samples. The same as
`tapo-trl online_dpo`.

The emoji world, on a CPU, with the reward model of `examples/slrm_sd35.py`:

```bash
accelerate launch -m tapo_trl.scripts.online_dpo --config recipes/emoji/online_dpo.yaml
```
"""


def make_parser():
    """Parser of `tapo-trl online_dpo`."""
    from tapo_trl import OnlineDiffusionDPOConfig
    from tapo_trl.cli.parser import RecipeParser
    from tapo_trl.scripts.utils import TAPOScriptArguments
    from tapo_trl.trainer.model_config import DiffusionModelConfig

    return RecipeParser(
        (TAPOScriptArguments, OnlineDiffusionDPOConfig, DiffusionModelConfig), prog="tapo-trl online_dpo"
    )


def make_trainer(script_args, training_args, model_args):
    """Load the data and the reward functions and make the [`OnlineDiffusionDPOTrainer`]."""
    from pathlib import Path

    from tapo_trl import OnlineDiffusionDPOTrainer
    from tapo_trl.human.live import HumanReward
    from tapo_trl.scripts.utils import (
        HUMAN,
        build_callbacks,
        load_prompt_dataset,
        load_reward_models,
        model_init_kwargs,
    )
    from tapo_trl.trainer.model_config import get_lora_config

    # Load
    is_live = HUMAN in (script_args.reward_model or [])
    human = HumanReward(Path(training_args.output_dir) / "people") if is_live else None
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    train_dataset, eval_dataset = load_prompt_dataset(script_args, training_args)

    # Trainer
    return OnlineDiffusionDPOTrainer(
        model=model_args.require_model(),
        reward_model=load_reward_models(script_args.reward_model, human),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=build_callbacks(script_args, training_args, train_dataset, eval_dataset),
        peft_config=get_lora_config(model_args),
    )


def main(script_args, training_args, model_args):
    """Align a policy by Diffusion-DPO on its own samples, and save or upload it. With `dry_run`, print what it would do."""
    if script_args.dry_run:
        from tapo_trl import OnlineDiffusionDPOTrainer
        from tapo_trl.estimate.dry_run import dry_run_rollouts, print_dry_run

        report = dry_run_rollouts(
            "online_dpo",
            OnlineDiffusionDPOTrainer,
            training_args,
            model_args,
            script_args.reward_model,
            script_args.guard_reward,
            script_args.guard_reward_init_kwargs,
        )
        return print_dry_run(report, script_args.device_memory)

    from tapo_trl.scripts.utils import save_or_push

    trainer = make_trainer(script_args, training_args, model_args)
    trainer.train()
    save_or_push(trainer)
    trainer.end()


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
