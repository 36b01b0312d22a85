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

"""The frozen rewards of a TAPO run: loading them, and keeping them small."""

from collections.abc import Sequence

import torch
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

from ..policies import FlowPolicy
from ..rewards import LatentRewardModel, StepRewardModel, load_reward_model
from ..rewards.scoring import EstimateReward, LatentReward, PixelReward, RewardFunction
from .tapo_config import TAPOConfig


RewardModel = str | StepRewardModel | RewardFunction

# Beside norms and embeddings, which diffusers leaves alone: the score stream and LoRA matrices keep their precision.
SCORE_LAYERS = ("score_projections", "score_output", "score_head", "lora_")


def check_rewards(rewards: Sequence[RewardModel], args: TAPOConfig) -> None:
    """
    Refuse what cannot work, before anything is loaded.

    Raises:
        ValueError: if a reward is neither a name, a reward model nor a callable, or if an option for latent reward
            models has nothing to act on.
    """
    for reward in rewards:
        if not isinstance(reward, (str, StepRewardModel)) and not callable(reward):
            raise ValueError(
                "`reward_model` must be a folder or Hub id, a reward model such as `SLRMModel`, or a callable, got "
                f"`{type(reward).__name__}`."
            )
    has_latent = any(isinstance(reward, (str, LatentRewardModel)) for reward in rewards)
    for option in ("reward_layerwise_casting", "reward_group_offload"):
        if getattr(args, option) and not has_latent:
            raise ValueError(
                f"`{option}=True` is for SLRMs and other latent reward models, but every `reward_model` is a function: leave it "
                "unset."
            )
    if args.reward_model_init_kwargs and not any(isinstance(reward, str) for reward in rewards):
        raise ValueError("`reward_model_init_kwargs` is for reward models that are loaded by name, but none is.")
    if args.reward_group_offload and args.device.type == "cpu":
        raise ValueError(
            "`reward_group_offload=True` keeps the reward model on the CPU and lends its blocks to an accelerator, but this run is "
            "on the CPU: leave it unset."
        )


def load_reward(
    reward: RewardModel, policy: FlowPolicy, args: TAPOConfig
) -> LatentReward | EstimateReward | PixelReward:
    """
    A reward as the sampler calls it. A reward model, of whichever kind a folder holds, is frozen, and stays on the CPU until
    [`place_reward`].

    Args:
        reward (`str`, [`StepRewardModel`] or `Callable`): see [`TAPOTrainer`].
        policy ([`FlowPolicy`]): the policy whose latents will be rated.
        args ([`TAPOConfig`]): the configuration.

    Raises:
        ValueError: if a reward model does not fit the policy, or an option not the reward model.
    """
    if not isinstance(reward, (str, StepRewardModel)):
        return PixelReward(reward, policy, args.score_batch_size)
    model = reward
    if isinstance(reward, str):
        kwargs = dict(args.reward_model_init_kwargs or {})
        if isinstance(kwargs.get("torch_dtype"), str):
            kwargs["torch_dtype"] = getattr(torch, kwargs["torch_dtype"])
        model = load_reward_model(reward, **kwargs)
    model.check_compatible(policy, max_sequence_length=args.max_sequence_length)
    model.requires_grad_(False).eval()
    target = model.rollout_target(args.velocity_target)
    if isinstance(model, LatentRewardModel):
        return LatentReward(model, target, args.score_batch_size)
    check_has_transformer(model, args)
    return EstimateReward(model, policy, args.score_batch_size)


def check_has_transformer(model: StepRewardModel, args: TAPOConfig) -> None:
    """
    Check that options for the blocks of a diffusion transformer have one to act on.

    Raises:
        ValueError: if the reward model is none, and one of them is set.
    """
    for option in ("reward_layerwise_casting", "reward_group_offload"):
        if getattr(args, option) and not isinstance(model, LatentRewardModel):
            raise ValueError(
                f"`{option}=True` is for reward models on a diffusion transformer, but the reward model is a {model.label} on "
                "a CLIP: leave it unset; `reward_model_init_kwargs` can load it in half precision."
            )


def place_reward(reward: LatentReward | EstimateReward | PixelReward, args: TAPOConfig) -> None:
    """Put a reward model where it computes, in the way that the configuration asks for. Pixel rewards have nothing to place."""
    if isinstance(reward, PixelReward):
        return
    if args.reward_layerwise_casting:
        store_in_float8(reward.model)
    if args.reward_group_offload:
        offload_blocks(reward.model, args.device)
    else:
        reward.model.to(args.device)


def store_in_float8(model: LatentRewardModel) -> None:
    """
    Keep the linear layers of a frozen reward model's backbone in float8, one byte per weight; each is cast to the backbone's
    precision for its own forward. The score stream or head, norms and embeddings, and LoRA matrices stay as they are.
    """
    transformer = model.transformer
    transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn,
        compute_dtype=transformer.backbone_dtype,
        skip_modules_pattern=(*DEFAULT_SKIP_MODULES_PATTERN, *SCORE_LAYERS),
    )


def offload_blocks(model: LatentRewardModel, device: torch.device) -> None:
    """Keep a frozen backbone on the CPU; each block comes to `device` for its own forward, the next one on its way already."""
    for name, child in model.named_children():
        if name != "transformer":
            child.to(device)
    for name, buffer in model.named_buffers(recurse=False):
        model.register_buffer(name, buffer.to(device))
    model.transformer.enable_group_offload(
        onload_device=device,
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=device.type == "cuda",
    )
