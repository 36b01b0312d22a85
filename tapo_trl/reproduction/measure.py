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

"""How good a reward model or a policy is, on held-out pairs and prompts."""

from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset

from ..metrics import diagnose_scores, score_pairs
from ..policies import load_policy
from ..rewards import load_reward_model
from .world import World


SIGMAS = (0.0, 0.001, *(step / 10 + 0.001 for step in range(1, 10)))
"""Clean, and t = 1, 101, ..., 901, the timesteps of Table 4."""

BATCH_SIZE = 48


def measure_reward_model(folder: str | Path, pairs: str) -> dict[str, dict]:
    """
    Accuracy, consistency and distributions at [`SIGMAS`], by rule, see [`~metrics.diagnosis.diagnose_scores`].

    Args:
        folder (`str` or `Path`): the reward model.
        pairs (`str`): parquet file of held-out pairs.
    """
    model = load_reward_model(folder)
    policy = load_policy(model.config.base_model_name_or_path)
    dataset = load_dataset("parquet", data_files=pairs, split="train")
    rules = ("ground_truth", "reference", "none") if model.compares_velocities else None
    return diagnose_scores(score_pairs(model, policy, dataset, SIGMAS, rules, batch_size=BATCH_SIZE))


@torch.no_grad()
def measure_policy(
    world: World, recipe: dict[str, Any], lora: Path | None, samples_per_prompt: int
) -> dict[str, dict[str, float]]:
    """
    Means of the judges over samples of held-out prompts, by split; and `reward`, that of the reward model of the training
    for the same samples without noise.

    Args:
        world ([`World`]): has the prompts and the judges.
        recipe (`dict[str, Any]`): the recipe of the training.
        lora (`Path`, *optional*): folder of the LoRA. Without it the base is judged.
        samples_per_prompt (`int`): samples of each prompt.
    """
    policy = load_policy(recipe["model_name_or_path"])
    if lora is not None:
        policy.pipeline.load_lora_weights(lora)
    rewards = [load_reward_model(name) for name in recipe.get("reward_model", [])]
    length = recipe.get("max_sequence_length")
    size = [recipe.get("height", recipe["resolution"]), recipe.get("width", recipe["resolution"])]
    shape = policy.latent_shape(*size, recipe.get("num_frames"))
    negative = policy.encode_prompts([recipe.get("negative_prompt", "")], length)
    results = {}
    for split, file in world.prompts.items():
        prompts = Path(file).read_text(encoding="utf-8").splitlines()
        values: dict[str, list[torch.Tensor]] = {}
        for number in range(samples_per_prompt):
            for start in range(0, len(prompts), BATCH_SIZE):
                batch = prompts[start : start + BATCH_SIZE]
                embeds = policy.encode_prompts(batch, length)
                latents = policy.sample(
                    policy.transformer,
                    embeds,
                    negative,
                    latent_shape=shape,
                    num_inference_steps=world.num_inference_steps,
                    guidance_scale=world.guidance_scale,
                    generators=[
                        torch.Generator().manual_seed(1000 * number + start + row) for row in range(len(batch))
                    ],
                )
                judged = world.judge(policy.decode(latents), batch)
                clean = torch.zeros(len(latents))
                for reward in rewards:
                    output = reward(**reward.forward_inputs(policy, latents, clean, batch, embeds))
                    judged["reward"] = reward.score_output(output, clean)
                for name, scores in judged.items():
                    values.setdefault(name, []).append(scores)
        results[split] = {name: torch.cat(parts).mean().item() for name, parts in values.items()}
    return results
