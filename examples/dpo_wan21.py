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
Align a text-to-video model with preference pairs that were collected beforehand, by Diffusion-DPO.

Wan2.1 1.3B on your pairs of videos (columns `prompt`, `chosen` and `rejected`), on eight GPUs:

```bash
accelerate launch --config_file recipes/accelerate/multi_gpu.yaml examples/dpo_wan21.py \
    --model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --torch_dtype bfloat16 --use_peft true --lora_r 128 \
    --dataset_name path/to/pairs.parquet --num_frames 49 --height 480 --width 832 --per_device_train_batch_size 1 \
    --output_dir my-model
```

`--dry_run true` says what that needs (shapes, tokens, parameters, memory), without a GPU and without weights. Any field of
`DiffusionDPOConfig`, `DPOScriptArguments` or `DiffusionModelConfig` can be given as a flag.
"""

from tapo_trl.cli.dpo import main, make_parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
