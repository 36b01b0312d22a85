# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = [
#     "tapo-trl[video]",
# ]
# ///

"""
Train a score-based latent reward model (SLRM) on preference pairs of videos.

What Wan2.1 1.3B with the paper's hyperparameters needs (shapes, tokens, parameters, memory), without a GPU and without weights:

```bash
python examples/slrm_wan21.py --config recipes/wan21/slrm.yaml --dry_run true
```

The run on eight GPUs:

```bash
accelerate launch --config_file recipes/accelerate/multi_gpu.yaml examples/slrm_wan21.py --config recipes/wan21/slrm.yaml
```

Any field of `SLRMConfig`, `SLRMScriptArguments` or `DiffusionModelConfig` can be given as a flag, too:

```bash
accelerate launch examples/slrm_wan21.py --config recipes/wan21/slrm.yaml \
    --dataset_name path/to/pairs.parquet --num_frames 33 --use_peft --lora_r 64 --output_dir my-reward-model
```
"""

from tapo_trl.scripts.slrm import main, make_parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
