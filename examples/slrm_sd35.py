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

from tapo_trl.cli.slrm import main, make_parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
