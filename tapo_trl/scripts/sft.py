# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = [
#     "tapo-trl[video]",
# ]
# ///

"""
Fine-tune a text-to-image or text-to-video model on images or videos with prompts, by flow matching. The same as `tapo-trl sft`.

Stable Diffusion 3.5 medium on images of your own (columns `prompt` and `image`):

```bash
accelerate launch -m tapo_trl.scripts.sft --config recipes/sd35/sft.yaml --dataset_name images.parquet
```
"""


def make_parser():
    """Parser of `tapo-trl sft`."""
    from tapo_trl import DiffusionSFTConfig
    from tapo_trl.cli.parser import RecipeParser
    from tapo_trl.scripts.utils import SFTScriptArguments
    from tapo_trl.trainer.model_config import DiffusionModelConfig

    return RecipeParser((SFTScriptArguments, DiffusionSFTConfig, DiffusionModelConfig), prog="tapo-trl sft")


def make_trainer(script_args, training_args, model_args):
    """Load the data and make the [`DiffusionSFTTrainer`]."""
    from tapo_trl import DiffusionSFTTrainer
    from tapo_trl.scripts.utils import build_sample_callbacks, load_sample_splits, model_init_kwargs
    from tapo_trl.trainer.model_config import get_lora_config

    # Load
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    train_dataset, eval_dataset = load_sample_splits(script_args, training_args)

    # Trainer
    trainer = DiffusionSFTTrainer(
        model=model_args.require_model(),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=build_sample_callbacks(script_args, training_args, train_dataset, eval_dataset),
        peft_config=get_lora_config(model_args),
    )
    trainer.dataset_name = script_args.dataset_name
    return trainer


def main(script_args, training_args, model_args):
    """Fine-tune a model, and save or upload it. With `dry_run`, print what it would do."""
    if script_args.dry_run:
        from tapo_trl.estimate.dry_run import dry_run_sft, print_dry_run

        return print_dry_run(dry_run_sft(training_args, model_args), script_args.device_memory)

    from tapo_trl.scripts.utils import save_or_push

    trainer = make_trainer(script_args, training_args, model_args)
    trainer.train()
    save_or_push(trainer)
    trainer.end()


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
