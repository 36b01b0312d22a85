# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = [
#     "tapo-trl[video]",
# ]
# ///

"""
Align a text-to-video model with a reward model by Trajectory Advantages Preference Optimization (TAPO).

What Wan2.1 1.3B with the paper's hyperparameters needs (shapes, tokens, parameters, memory), without a GPU and without weights:

```bash
python examples/tapo_wan21.py --config recipes/wan21/tapo.yaml --dry_run true
```

The run on eight GPUs, with the reward model of `slrm_wan21.py`:

```bash
accelerate launch --config_file recipes/accelerate/multi_gpu.yaml examples/tapo_wan21.py --config recipes/wan21/tapo.yaml
```

Any field of `TAPOConfig`, `TAPOScriptArguments` or `DiffusionModelConfig` can be given as a flag, too. Less memory and time, with
fewer and smaller frames and the reward model in float8:

```bash
accelerate launch examples/tapo_wan21.py --config recipes/wan21/tapo.yaml \
    --num_frames 33 --height 256 --width 448 --reward_layerwise_casting true --output_dir my-model
```
"""

from tapo_trl.scripts.tapo import main, make_parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
