# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = [
#     "tapo-trl[video]",
# ]
# ///

"""
Align a text-to-image or text-to-video model with preference pairs that were collected beforehand, by Diffusion-DPO, Inversion-DPO
or DenseReward. The same as `tapo-trl dpo`, as a script to start your own from.

The emoji world, on a CPU (pairs: `python examples/emoji/make_pairs.py`):

```bash
accelerate launch --config_file recipes/accelerate/cpu.yaml examples/dpo_sd35.py --config recipes/emoji/dpo.yaml
```

Stable Diffusion 3.5 medium on eight GPUs, on Pick-a-Pic:

```bash
accelerate launch --config_file recipes/accelerate/multi_gpu.yaml examples/dpo_sd35.py --config recipes/sd35/dpo.yaml
```

Inversion-DPO on pairs of your own. Any field of `DiffusionDPOConfig`, `DPOScriptArguments` or `DiffusionModelConfig` can be given
as a flag:

```bash
accelerate launch examples/dpo_sd35.py --config recipes/sd35/dpo.yaml \
    --variant inversion_dpo --dataset_name path/to/pairs.parquet --pair_preset none --dataset_test_split "train[:2%]" \
    --dataset_train_split "train[2%:]" --output_dir my-model
```

Wan2.1 1.3B on pairs of videos (columns `prompt`, `chosen` and `rejected`). `--dry_run true` says what that needs:

```bash
accelerate launch --config_file recipes/accelerate/multi_gpu.yaml examples/dpo_wan21.py \
    --model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --torch_dtype bfloat16 --use_peft true --lora_r 128 \
    --dataset_name path/to/pairs.parquet --num_frames 49 --height 480 --width 832 --per_device_train_batch_size 1 \
    --output_dir my-model
```
"""


def make_parser():
    """Parser of `tapo-trl dpo`."""
    from tapo_trl import DiffusionDPOConfig
    from tapo_trl.cli.parser import RecipeParser
    from tapo_trl.scripts.utils import DPOScriptArguments
    from tapo_trl.trainer.model_config import DiffusionModelConfig

    return RecipeParser((DPOScriptArguments, DiffusionDPOConfig, DiffusionModelConfig), prog="tapo-trl dpo")


def make_trainer(script_args, training_args, model_args):
    """Load the data and make the [`DiffusionDPOTrainer`]."""
    from tapo_trl import DiffusionDPOTrainer
    from tapo_trl.scripts.utils import build_sample_callbacks, load_preference_splits, model_init_kwargs
    from tapo_trl.trainer.model_config import get_lora_config

    # Load
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    train_dataset, eval_dataset = load_preference_splits(script_args)

    # Trainer
    trainer = DiffusionDPOTrainer(
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
    """Align a policy with preference pairs, and save or upload it. With `dry_run`, print what it would do."""
    if script_args.dry_run:
        from tapo_trl.estimate.dry_run import dry_run_dpo, print_dry_run

        return print_dry_run(dry_run_dpo(training_args, model_args), script_args.device_memory)

    from tapo_trl.scripts.utils import save_or_push

    trainer = make_trainer(script_args, training_args, model_args)
    trainer.train()
    save_or_push(trainer)
    trainer.end()


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
