# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""How good a reward model or a policy is, on held-out pairs and prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset

from tapo_trl.data.loading import load_prompts
from tapo_trl.metrics import diagnose_scores, score_pairs
from tapo_trl.policies import load_policy
from tapo_trl.rewards import load_reward_model

from .world import Judge, World


SIGMAS = (0.0, 0.001, *(step / 10 + 0.001 for step in range(1, 10)))
"""Clean, and t = 1, 101, ..., 901, the timesteps of Table 4."""

CURVE_SIGMAS = (0.0, 0.301, 0.601, 0.901)
"""Where checkpoints are measured."""

BATCH_SIZE = 48


def measure_reward_model(folder: str | Path, pairs: str, sigmas: Sequence[float] = SIGMAS) -> dict[str, dict]:
    """
    Accuracy, consistency and distributions, by rule, see [`~metrics.diagnosis.diagnose_scores`].

    Args:
        folder (`str` or `Path`): the reward model.
        pairs (`str`): parquet file of held-out pairs.
        sigmas (`Sequence[float]`, *optional*, defaults to [`SIGMAS`]): the noise levels.
    """
    model = load_reward_model(folder)
    policy = load_policy(model.config.base_model_name_or_path)
    dataset = load_dataset("parquet", data_files=pairs, split="train")
    rules = ("ground_truth", "reference", "none") if model.uses_velocity_target else None
    return diagnose_scores(score_pairs(model, policy, dataset, sigmas, rules, batch_size=BATCH_SIZE))


def measure_checkpoints(folder: Path, pairs: dict[str, str]) -> dict[str, dict]:
    """
    Accuracy of the checkpoints of a training by step, split, rule and sigma, at [`CURVE_SIGMAS`].

    Args:
        folder (`Path`): where the training wrote them.
        pairs (`dict[str, str]`): parquet file of held-out pairs of each split.
    """
    checkpoints = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}
    curves = {}
    for step, path in sorted(checkpoints.items()):
        measured = {split: measure_reward_model(path, file, CURVE_SIGMAS) for split, file in pairs.items()}
        curves[str(step)] = {
            split: {rule: parts["accuracy"]["by_sigma"] for rule, parts in rules.items()}
            for split, rules in measured.items()
        }
    return curves


class Samples:
    """
    Draws samples of a policy and scores them.

    Args:
        world ([`World`]): says how they are drawn.
        recipe (`dict[str, Any]`): the recipe of the training, which names the base and the reward models.
        lora (`Path`, *optional*): folder of the LoRA. Without it the base draws.
    """

    def __init__(self, world: World, recipe: dict[str, Any], lora: Path | None = None):
        self.world = world
        self.policy = load_policy(recipe["model_name_or_path"])
        if lora is not None:
            self.policy.pipeline.load_lora_weights(lora)
        self.rewards = [load_reward_model(name) for name in recipe.get("reward_model", [])]
        self.max_sequence_length = recipe.get("max_sequence_length")
        size = [recipe.get("height", recipe["resolution"]), recipe.get("width", recipe["resolution"])]
        self.latent_shape = self.policy.latent_shape(*size, recipe.get("num_frames"))
        self.negative = self.policy.encode_prompts([recipe.get("negative_prompt", "")], self.max_sequence_length)

    @torch.no_grad()
    def score(self, prompts: list[str], samples_per_prompt: int, judge: Judge | None) -> dict[str, torch.Tensor]:
        """
        Args:
            prompts (`list[str]`): the prompts.
            samples_per_prompt (`int`): samples of each.
            judge (`Callable`, *optional*): see [`World`].

        Returns:
            `dict[str, torch.Tensor]`: what the judge says, and `reward`, that of the reward model for the same samples
                without noise, of shape `(samples_per_prompt, num_prompts)` each.
        """
        values: dict[str, list[torch.Tensor]] = {}
        for number in range(samples_per_prompt):
            for start in range(0, len(prompts), BATCH_SIZE):
                batch = prompts[start : start + BATCH_SIZE]
                embeds = self.policy.encode_prompts(batch, self.max_sequence_length)
                latents = self.policy.sample(
                    self.policy.transformer,
                    embeds,
                    self.negative,
                    latent_shape=self.latent_shape,
                    num_inference_steps=self.world.num_inference_steps,
                    guidance_scale=self.world.guidance_scale,
                    generators=[
                        torch.Generator().manual_seed(1000 * number + start + row) for row in range(len(batch))
                    ],
                )
                scores = {} if judge is None else judge(self.policy.decode(latents), batch)
                clean = torch.zeros(len(latents))
                for reward in self.rewards:
                    output = reward(**reward.forward_inputs(self.policy, latents, clean, batch, embeds))
                    scores["reward"] = reward.score_output(output, clean)
                for name, of_batch in scores.items():
                    values.setdefault(name, []).append(of_batch)
        return {name: torch.cat(parts).view(samples_per_prompt, -1) for name, parts in values.items()}


def measure_policy(
    world: World, recipe: dict[str, Any], lora: Path | None, samples_per_prompt: int
) -> dict[str, dict[str, float]]:
    """Means over samples of held-out prompts, by split, of what [`Samples`] says of them."""
    samples = Samples(world, recipe, lora)
    return {
        split: {
            name: values.mean().item()
            for name, values in samples.score(_lines(file), samples_per_prompt, world.judge).items()
        }
        for split, file in world.prompts.items()
    }


def hard_prompts(world: World, recipe: dict[str, Any], samples_per_prompt: int) -> list[str]:
    """
    The half of the training prompts whose samples by the base have the least reward, in their order. Whole batches of
    `world.prompts_per_step` alone.
    """
    prompts = list(load_prompts(recipe["dataset_name"], split=recipe.get("dataset_split", "train"))["prompt"])
    reward = Samples(world, recipe).score(prompts, samples_per_prompt, judge=None)["reward"].mean(0)
    count = len(prompts) // 2 // world.prompts_per_step * world.prompts_per_step
    return [prompts[row] for row in sorted(reward.argsort()[:count].tolist())]


def _lines(file: str) -> list[str]:
    return Path(file).read_text(encoding="utf-8-sig").splitlines()
