# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Samples of a policy, in batches: what the trainer shows while it trains, and what the command line draws."""

from collections.abc import Callable, Sequence

import torch

from . import FlowPolicy, PromptEmbeddings


@torch.no_grad()
def generate_samples(
    policy: FlowPolicy,
    model: torch.nn.Module,
    prompts: list[str],
    encode_prompts: Callable[[list[str]], PromptEmbeddings],
    negative_prompt: str,
    *,
    latent_shape: tuple[int, ...],
    num_inference_steps: int,
    guidance_scale: float,
    seed: int | Sequence[int],
    batch_size: int,
) -> torch.Tensor:
    """
    Draw and decode one sample per prompt, by deterministic sampling.

    Args:
        policy ([`FlowPolicy`]): model family.
        model (`torch.nn.Module`): its network, wrapped or not.
        prompts (`list[str]`): the prompts.
        encode_prompts (`Callable`): prompts to embeddings, on the device of the network.
        negative_prompt (`str`): prompt of the unconditional half of the guidance.
        latent_shape (`tuple[int, ...]`): shape of one latent.
        num_inference_steps (`int`): number of sampling steps.
        guidance_scale (`float`): see [`~FlowPolicy.velocity`].
        seed (`int` or `Sequence[int]`): sample i starts from the noise of `seed + i`, or of `seed[i]`, whatever the batches.
        batch_size (`int`): prompts at once.

    Returns:
        `torch.Tensor` of shape `(len(prompts), 3, height, width)`, or `(len(prompts), 3, num_frames, height, width)` for
        a video policy: in [0, 1], float32, on the CPU.
    """
    seeds = range(seed, seed + len(prompts)) if isinstance(seed, int) else seed
    negative_prompt_embeds = encode_prompts([negative_prompt])
    samples = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        latents = policy.sample(
            model,
            encode_prompts(batch),
            negative_prompt_embeds,
            latent_shape=latent_shape,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generators=[torch.Generator().manual_seed(own) for own in seeds[start : start + batch_size]],
        )
        samples.append(policy.decode(latents).cpu())
    return torch.cat(samples)
