# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = [
#     "tapo-trl",
# ]
# ///

"""
Train a score-based latent reward model (SLRM) on preference pairs of images.

The emoji world, on a CPU (the first half of `make demo`):

```bash
accelerate launch --config_file recipes/accelerate/cpu.yaml examples/slrm_sd35.py --config recipes/emoji/slrm.yaml
```

Stable Diffusion 3.5 medium on eight GPUs, with the paper's hyperparameters, on Pick-a-Pic v2:

```bash
accelerate launch --config_file recipes/accelerate/multi_gpu.yaml examples/slrm_sd35.py --config recipes/sd35/slrm.yaml
```

Any field of `SLRMConfig`, `SLRMScriptArguments` or `DiffusionModelConfig` can be given as a flag, too:

```bash
accelerate launch examples/slrm_sd35.py --config recipes/sd35/slrm.yaml \
    --dataset_name path/to/pairs.parquet --pair_preset none --dataset_test_split "train[:2%]" --dataset_train_split "train[2%:]" \
    --use_peft --lora_r 64 --learning_rate 1e-4 --output_dir my-reward-model
```
"""

from tapo_trl.scripts.slrm import main, make_parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
