# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = [
#     "tapo-trl[video]",
# ]
# ///

"""
Align a text-to-image or text-to-video model with a reward model by Trajectory Advantages Preference Optimization (TAPO). The same
as `tapo-trl tapo`, as a script to start your own from.

The emoji world, on a CPU (the second half of `make demo`):

```bash
accelerate launch --config_file recipes/accelerate/cpu.yaml examples/tapo_sd35.py --config recipes/emoji/tapo.yaml
```

Stable Diffusion 3.5 medium on eight GPUs, with the paper's hyperparameters and the reward model of `slrm_sd35.py`:

```bash
accelerate launch --config_file recipes/accelerate/multi_gpu.yaml examples/tapo_sd35.py --config recipes/sd35/tapo.yaml
```

A function `f(images, prompts, **columns)` of your own as the reward, with a grid of samples every 20 steps. Any field of
`TAPOConfig`, `TAPOScriptArguments` or `DiffusionModelConfig` can be given as a flag:

```bash
accelerate launch examples/tapo_sd35.py --config recipes/sd35/tapo.yaml \
    --reward_model my_package.rewards:brightness --velocity_target none --sample_every_steps 20 --output_dir my-model
```

Wan2.1 1.3B: `--dry_run true` says what a training needs (shapes, tokens, parameters, memory), without a GPU and without weights.
The second run takes less memory and time, with fewer and smaller frames and the reward model in float8:

```bash
python examples/tapo_wan21.py --config recipes/wan21/tapo.yaml --dry_run true
accelerate launch examples/tapo_wan21.py --config recipes/wan21/tapo.yaml \
    --num_frames 33 --height 256 --width 448 --reward_layerwise_casting true --output_dir my-model
```
"""


def make_parser():
    """Parser of `tapo-trl tapo`."""
    from tapo_trl import TAPOConfig
    from tapo_trl.cli.parser import RecipeParser
    from tapo_trl.scripts.utils import TAPOScriptArguments
    from tapo_trl.trainer.model_config import DiffusionModelConfig

    return RecipeParser((TAPOScriptArguments, TAPOConfig, DiffusionModelConfig), prog="tapo-trl tapo")


def make_trainer(script_args, training_args, model_args):
    """Load the data and the reward functions and make the [`TAPOTrainer`]."""
    from tapo_trl import TAPOTrainer
    from tapo_trl.scripts.utils import build_callbacks, load_prompt_dataset, load_reward_models, model_init_kwargs
    from tapo_trl.trainer.model_config import get_lora_config

    # Load
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    train_dataset, eval_dataset = load_prompt_dataset(script_args, training_args)

    # Trainer
    return TAPOTrainer(
        model=model_args.require_model(),
        reward_model=load_reward_models(script_args.reward_model),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=build_callbacks(script_args, training_args, train_dataset, eval_dataset),
        peft_config=get_lora_config(model_args),
    )


def main(script_args, training_args, model_args):
    """Align a policy with its reward model, and save or upload it. With `dry_run`, print what it would do."""
    if script_args.dry_run:
        from tapo_trl import TAPOTrainer
        from tapo_trl.estimate.dry_run import dry_run_rollouts, print_dry_run

        report = dry_run_rollouts(
            "tapo",
            TAPOTrainer,
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
