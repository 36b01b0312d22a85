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

Stable Diffusion 3.5 medium on eight GPUs, with the paper's settings:

```bash
accelerate launch --config_file recipes/accelerate/multi_gpu.yaml examples/slrm_sd35.py --config recipes/sd35/slrm.yaml
```

Any field of `SLRMConfig`, `SLRMScriptArguments` or `DiffusionModelConfig` can be given as a flag, too:

```bash
accelerate launch examples/slrm_sd35.py --config recipes/sd35/slrm.yaml \
    --dataset_name path/to/pairs.parquet --use_peft --lora_r 64 --learning_rate 1e-4 --output_dir my-reward-model
```
"""

from tapo_trl import SLRMConfig, SLRMTrainer
from tapo_trl.cli import (
    DiffusionModelConfig,
    RecipeParser,
    SLRMScriptArguments,
    get_lora_config,
    load_policy_from_args,
    load_preference_pairs,
)


def main(script_args: SLRMScriptArguments, training_args: SLRMConfig, model_args: DiffusionModelConfig) -> None:
    # Preference pairs: the columns `prompt`, `chosen` and `rejected`
    train_dataset = load_preference_pairs(script_args, script_args.dataset_train_split)
    eval_dataset = None
    if script_args.dataset_test_split is not None:
        eval_dataset = load_preference_pairs(script_args, script_args.dataset_test_split)

    # The pipeline whose transformer becomes the reward model; its VAE and text encoders make the inputs
    policy = load_policy_from_args(model_args, training_args)

    trainer = SLRMTrainer(
        model=policy,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_lora_config(model_args, policy),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    # `SLRMModel.from_pretrained(output_dir)` loads the result
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


if __name__ == "__main__":
    parser = RecipeParser((SLRMScriptArguments, SLRMConfig, DiffusionModelConfig), prog="slrm_sd35.py")
    main(*parser.parse_args_and_config())
