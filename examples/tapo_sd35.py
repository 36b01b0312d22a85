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

Stable Diffusion 3.5 medium on eight GPUs, with the paper's settings and the reward model of `slrm_sd35.py`:

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

from tapo_trl import TAPOConfig, TAPOTrainer
from tapo_trl.cli import (
    DiffusionModelConfig,
    RecipeParser,
    TAPOScriptArguments,
    build_callbacks,
    get_lora_config,
    load_policy_from_args,
    load_prompt_dataset,
    load_reward_models,
)


def main(script_args: TAPOScriptArguments, training_args: TAPOConfig, model_args: DiffusionModelConfig) -> None:
    # Prompts to train on, and held-out ones to evaluate on and to watch
    train_dataset, eval_dataset = load_prompt_dataset(script_args, training_args)

    # The policy, and what it is rewarded for: an SLRM, functions of the decoded images, or several of them
    policy = load_policy_from_args(model_args, training_args)
    reward_model = load_reward_models(script_args.reward_model)

    trainer = TAPOTrainer(
        model=policy,
        reward_model=reward_model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=build_callbacks(script_args, training_args, train_dataset, eval_dataset),
        peft_config=get_lora_config(model_args, policy),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    # `StableDiffusion3Pipeline.from_pretrained(base).load_lora_weights(output_dir)` loads the result
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=training_args.dataset_name)
    trainer.end()


if __name__ == "__main__":
    parser = RecipeParser((TAPOScriptArguments, TAPOConfig, DiffusionModelConfig), prog="tapo_sd35.py")
    main(*parser.parse_args_and_config())
