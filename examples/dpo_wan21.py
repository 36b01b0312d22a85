# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

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

from tapo_trl.scripts.dpo import main, make_parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
