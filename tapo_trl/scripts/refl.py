# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = [
#     "tapo-trl[video]",
# ]
# ///

"""
Align a text-to-image or text-to-video model with a reward model by ReFL, the gradient of a differentiable reward. The same as `tapo-trl refl`.

The emoji world, on a CPU, with the reward model of `examples/slrm_sd35.py`:

```bash
accelerate launch -m tapo_trl.scripts.refl --config recipes/emoji/refl.yaml
```
"""


def make_parser():
    """Parser of `tapo-trl refl`."""
    from tapo_trl import ReFLConfig
    from tapo_trl.cli.parser import RecipeParser
    from tapo_trl.scripts.utils import TAPOScriptArguments
    from tapo_trl.trainer.model_config import DiffusionModelConfig

    return RecipeParser((TAPOScriptArguments, ReFLConfig, DiffusionModelConfig), prog="tapo-trl refl")


def make_trainer(script_args, training_args, model_args):
    """Load the data and the reward functions and make the [`ReFLTrainer`]."""
    from tapo_trl import ReFLTrainer
    from tapo_trl.scripts.utils import build_callbacks, load_prompt_dataset, load_reward_models, model_init_kwargs
    from tapo_trl.trainer.model_config import get_lora_config

    # Load
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    train_dataset, eval_dataset = load_prompt_dataset(script_args, training_args)

    # Trainer
    return ReFLTrainer(
        model=model_args.require_model(),
        reward_model=load_reward_models(script_args.reward_model),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=build_callbacks(script_args, training_args, train_dataset, eval_dataset),
        peft_config=get_lora_config(model_args),
    )


def main(script_args, training_args, model_args):
    """Align a policy by ReFL, and save or upload it. With `dry_run`, print what it would do."""
    if script_args.dry_run:
        from tapo_trl import ReFLTrainer
        from tapo_trl.estimate.dry_run import dry_run_rollouts, print_dry_run

        report = dry_run_rollouts(
            "refl",
            ReFLTrainer,
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
