# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = [
#     "tapo-trl",
# ]
# ///

"""
Align a text-to-image model with a reward model by Trajectory Advantages Preference Optimization (TAPO).

The emoji world, on a CPU (the second half of `make demo`):

```bash
accelerate launch --config_file recipes/accelerate/cpu.yaml examples/tapo_sd35.py --config recipes/emoji/tapo.yaml
```

Stable Diffusion 3.5 medium on eight GPUs, with the paper's hyperparameters and the reward model of `slrm_sd35.py`:

```bash
accelerate launch --config_file recipes/accelerate/multi_gpu.yaml examples/tapo_sd35.py --config recipes/sd35/tapo.yaml
```

Any field of `TAPOConfig`, `TAPOScriptArguments` or `DiffusionModelConfig` can be given as a flag, too. A function
`f(images, prompts, **columns)` of your own as the reward, with a grid of samples every 20 steps:

```bash
accelerate launch examples/tapo_sd35.py --config recipes/sd35/tapo.yaml \
    --reward_model my_package.rewards:brightness --sample_every_steps 20 --output_dir my-model
```
"""

from tapo_trl.scripts.tapo import main, make_parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
