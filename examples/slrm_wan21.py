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

from tapo_trl.cli.slrm import main, make_parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
