# Copyright 2026 The tapo_trl authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

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

from tapo_trl.cli.tapo import main, make_parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
