# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
A world whose true reward is known and whose number of dimensions D can be chosen.

Samples are arrays `[channels, 8, 8]`, without a VAE: D = 64 channels. Every prompt, a letter, has a mean of its own. Around it, samples
vary along one direction that is rewarded, along a few that are not, and by noise:

    x0 = mean(prompt) + s u + sum_j a_j w_j + noise,    s ~ N(0, .4^2), a_j ~ N(0, .4^2), noise ~ N(0, .2^2)

The true reward of a sample is what alignment should raise without breaking the rest:

    r = clip(s, -1.5, 1.5) + log p(prompt | x0) - excess

`s` is read off the sample, p is that of a fixed classifier of the means, and `excess` is by how much the energy outside of all patterns
exceeds that of the noise, relative to it. None of the three depends on D.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from tapo_trl.policies import Defaults
from tapo_trl.policies.sd3 import SD3Policy
from tapo_trl.policies.tiny import spread


PROMPTS = list("abcdefgh")
SIDE, NUM_FREE = 8, 6
STYLE_STD, FREE_STD, NOISE_STD = 0.4, 0.4, 0.2
LARGEST_STYLE = 1.5
SHARPNESS = 30.0  # of the classifier


@dataclass(frozen=True)
class Mixture:
    """
    The distribution of the data, and the true reward.

    Args:
        channels (`int`): a sample has `64 * channels` dimensions.
    """

    channels: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, SIDE, SIDE

    @cached_property
    def patterns(self) -> torch.Tensor:
        """`[8 + 1 + 6, D]`: means, the direction that is rewarded, those that are free; orthogonal, of mean square 1."""
        coarse = torch.randn(
            len(PROMPTS) + 1 + NUM_FREE, self.channels, 4, 4, generator=torch.Generator().manual_seed(17)
        )
        smooth = F.interpolate(coarse, (SIDE, SIDE), mode="bilinear", align_corners=True).flatten(1)
        return torch.linalg.qr(smooth.T).Q.T * smooth.shape[1] ** 0.5

    def sample(self, prompts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Samples `[N, *shape]` of the data for the indices of prompts `[N]`."""
        k, n = len(PROMPTS), len(prompts)
        weights = torch.zeros(n, len(self.patterns))
        weights[torch.arange(n), prompts] = 1.0
        weights[:, k] = STYLE_STD * torch.randn(n, generator=generator)
        weights[:, k + 1 :] = FREE_STD * torch.randn(n, NUM_FREE, generator=generator)
        flat = weights @ self.patterns
        return (flat + NOISE_STD * torch.randn(flat.shape, generator=generator)).view(n, *self.shape)

    def judge(self, samples: torch.Tensor, prompts: torch.Tensor) -> dict[str, torch.Tensor]:
        """The true reward of `samples` and its parts, of shape `[N]` each."""
        flat, k = samples.flatten(1), len(PROMPTS)
        weights = flat @ self.patterns.T / flat.shape[1]
        # Squared distance per dimension to each mean, within the means' own space
        means = weights[:, :k]
        distances = (means.square().sum(1, keepdim=True) - 2 * means + 1) / 2
        log_p = (-SHARPNESS * distances).log_softmax(1)[torch.arange(len(flat)), prompts]
        rest = (flat - weights @ self.patterns).square().mean(1)
        expected = NOISE_STD**2 * (1 - len(self.patterns) / flat.shape[1])
        excess = (rest / expected - 1).clamp(min=0)
        style = weights[:, k].clamp(-LARGEST_STYLE, LARGEST_STYLE)
        return {
            "reward": style + log_p - excess,
            "style": style,
            "accuracy": (distances.argmin(1) == prompts).float(),
            "log_p": log_p,
            "excess": excess,
        }


class MixturePolicy(SD3Policy):
    """A small SD3 transformer on the samples themselves."""

    def __init__(self, pipeline: StableDiffusion3Pipeline):
        super().__init__(pipeline)
        self.name_or_path = f"mixture-{64 * self.transformer.config.in_channels}"

    @property
    def defaults(self) -> Defaults:
        return Defaults(height=SIDE, width=SIDE, num_inference_steps=10, guidance_scale=1.0)

    def latent_shape(self, height, width, num_frames=None):
        return self.transformer.config.in_channels, SIDE, SIDE

    def encode(self, pixels):
        return pixels

    def decode(self, latents, with_gradient=False):
        return latents


def new_pipeline(channels: int, seed: int = 0) -> StableDiffusion3Pipeline:
    """A pipeline with random weights. Its text encoders stay random: they only have to tell letters apart."""
    pipeline = SD3Policy.tiny(seed)
    transformer = SD3Transformer2DModel(
        sample_size=SIDE,
        patch_size=4,
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=64,
        pooled_projection_dim=20,
        pos_embed_max_size=SIDE,
        qk_norm="rms_norm",
    )
    spread(transformer)
    pipeline.register_modules(transformer=transformer)
    pipeline.tokenizer_max_length = 3  # start, the letter, end
    pipeline.scheduler.register_to_config(shift=1.0)
    return pipeline


def pretrain(channels: int, folder: Path, num_steps: int = 3000, batch_size: int = 128, seed: int = 0) -> None:
    """Flow matching on the data, and the average of the weights of the second half."""
    mixture, pipeline = Mixture(channels), new_pipeline(channels, seed)
    policy, generator = MixturePolicy(pipeline), torch.Generator().manual_seed(seed)
    prompts_embeds = policy.encode_prompts(PROMPTS, max_sequence_length=1)
    network = pipeline.transformer.train()
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_steps, pct_start=0.05)
    for step in range(num_steps):
        labels = torch.randint(len(PROMPTS), (batch_size,), generator=generator)
        clean = mixture.sample(labels, generator)
        noise = torch.randn(clean.shape, generator=generator)
        sigma = torch.rand(batch_size, generator=generator)
        level = sigma.view(-1, 1, 1, 1)
        velocity = policy.forward(network, (1 - level) * clean + level * noise, sigma, prompts_embeds[labels])
        loss = (velocity - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        if step % 500 == 0 or step == num_steps - 1:
            print(f"D = {64 * channels}, step {step}: loss {loss.item():.4f}", flush=True)
    network.load_state_dict(average.module.state_dict())
    network.save_pretrained(folder)


def load(folder: Path, seed: int = 0) -> tuple[Mixture, MixturePolicy]:
    """The world and its policy, with the base's weights. Text encoders are made anew from the seed of the pretraining."""
    transformer = SD3Transformer2DModel.from_pretrained(folder)
    pipeline = new_pipeline(transformer.config.in_channels, seed)
    pipeline.register_modules(transformer=transformer)
    return Mixture(transformer.config.in_channels), MixturePolicy(pipeline)
