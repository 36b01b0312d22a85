# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = [
#     "tapo-trl",
# ]
# ///

"""
Align a text-to-image model with preference pairs that were collected beforehand, by Diffusion-DPO.

The emoji world, on a CPU (pairs: `python examples/emoji/make_pairs.py`):

```bash
accelerate launch --config_file recipes/accelerate/cpu.yaml examples/dpo_sd35.py --config recipes/emoji/dpo.yaml
```

Stable Diffusion 3.5 medium on eight GPUs, on Pick-a-Pic:

```bash
accelerate launch --config_file recipes/accelerate/multi_gpu.yaml examples/dpo_sd35.py --config recipes/sd35/dpo.yaml
```

Any field of `DiffusionDPOConfig`, `DPOScriptArguments` or `DiffusionModelConfig` can be given as a flag, too. Inversion-DPO on
pairs of your own:

```bash
accelerate launch examples/dpo_sd35.py --config recipes/sd35/dpo.yaml \
    --variant inversion_dpo --dataset_name path/to/pairs.parquet --pair_preset none --dataset_test_split "train[:2%]" \
    --dataset_train_split "train[2%:]" --output_dir my-model
```
"""

from tapo_trl.scripts.dpo import main, make_parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
