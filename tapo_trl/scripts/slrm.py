# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = [
#     "tapo-trl[video]",
# ]
# ///

"""
Train a score-based latent reward model (SLRM) on preference pairs of images or videos. The same as `tapo-trl slrm`, as a script to
start your own from.

The emoji world, on a CPU (the first half of `make demo`):

```bash
accelerate launch --config_file recipes/accelerate/cpu.yaml examples/slrm_sd35.py --config recipes/emoji/slrm.yaml
```

Stable Diffusion 3.5 medium on eight GPUs, with the paper's hyperparameters, on Pick-a-Pic v2:

```bash
accelerate launch --config_file recipes/accelerate/multi_gpu.yaml examples/slrm_sd35.py --config recipes/sd35/slrm.yaml
```

Pairs of your own. Any field of `SLRMConfig`, `SLRMScriptArguments` or `DiffusionModelConfig` can be given as a flag:

```bash
accelerate launch examples/slrm_sd35.py --config recipes/sd35/slrm.yaml \
    --dataset_name path/to/pairs.parquet --pair_preset none --dataset_test_split "train[:2%]" --dataset_train_split "train[2%:]" \
    --use_peft --lora_r 64 --learning_rate 1e-4 --output_dir my-reward-model
```

Wan2.1 1.3B on pairs of videos: `--dry_run true` says what it needs, without a GPU and without weights.

```bash
python examples/slrm_wan21.py --config recipes/wan21/slrm.yaml --dry_run true
accelerate launch examples/slrm_wan21.py --config recipes/wan21/slrm.yaml \
    --dataset_name path/to/pairs.parquet --num_frames 33 --use_peft --lora_r 64 --output_dir my-reward-model
```
"""


def make_parser():
    """Parser of `tapo-trl slrm`."""
    from tapo_trl import SLRMConfig
    from tapo_trl.cli.parser import RecipeParser
    from tapo_trl.scripts.utils import SLRMScriptArguments
    from tapo_trl.trainer.model_config import DiffusionModelConfig

    return RecipeParser((SLRMScriptArguments, SLRMConfig, DiffusionModelConfig), prog="tapo-trl slrm")


def make_trainer(script_args, training_args, model_args):
    """Load the data and make the [`SLRMTrainer`]."""
    from tapo_trl import SLRMTrainer
    from tapo_trl.scripts.utils import load_preference_splits, model_init_kwargs
    from tapo_trl.trainer.model_config import get_lora_config

    # Load
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    evaluates = training_args.eval_strategy != "no" or training_args.eval_on_start
    train_dataset, eval_dataset = load_preference_splits(script_args, evaluates)

    # Trainer
    trainer = SLRMTrainer(
        model=model_args.require_model(),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_lora_config(model_args),
    )
    trainer.dataset_name = script_args.dataset_name
    return trainer


def main(script_args, training_args, model_args):
    """Train a latent reward model on preference pairs, and save or upload it. With `dry_run`, print what it would do."""
    if script_args.dry_run:
        from tapo_trl.estimate.dry_run import dry_run_slrm, print_dry_run

        return print_dry_run(dry_run_slrm(training_args, model_args), script_args.device_memory)

    from tapo_trl.scripts.utils import save_or_push

    trainer = make_trainer(script_args, training_args, model_args)
    trainer.train()
    save_or_push(trainer)
    trainer.end()


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
