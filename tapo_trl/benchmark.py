# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
What a pair of trajectories costs: seconds of sampling, scoring and updating, forwards, floating point operations and memory,
on random weights. `tapo-trl bench` writes it down.
"""

import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .losses import tapo_loss
from .networks.compilation import compile_blocks
from .networks.sharing import all_tensors, share_parameters
from .policies import FlowPolicy, PromptEmbeddings
from .profiling import StageTimer, on_forward
from .rewards import LatentReward, SLRMModel, WeightedReward
from .rollouts import TAPOSampler, TrajectoryPairs
from .runs.option_checks import check_speed_options
from .schedulers import sde_step_indices
from .trainer.policy_setup import apply_memory_options
from .trainer.reward_setup import check_rewards, check_sharing, move_rewards
from .trainer.rollout_config import RolloutConfig


BETA = 1000.0


@dataclass(frozen=True)
class Setting:
    """
    One rollout and the update on it.

    Args:
        num_inference_steps (`int`): T.
        num_sde_steps (`int`): n.
        num_candidates (`int`): P.
        prompts (`int`): prompts per batch.
        size (`tuple[int, ...]`): height, width and, for video, frames of a sample.
    """

    num_inference_steps: int
    num_sde_steps: int
    num_candidates: int
    prompts: int
    size: tuple[int, ...]


@dataclass
class Measurement:
    """
    What was measured. Seconds, forwards and operations are those of one prompt, that is of one pair of trajectories.

    Args:
        setting ([`Setting`]): what was run.
        seconds (`dict[str, float]`): `sampling` (the policy and the steps of the SDE), `scoring` and `update`, each the
            median over the repetitions.
        bare_seconds (`float`): of the rollout's forwards in the same batches, and nothing else.
        forwards (`dict[str, int]`): latents through `policy` and `reward` in the rollout, guidance counted twice, and
            through `training` (forward and backward) and `reference`.
        flops (`dict[str, int]`): operations of `rollout` and `update`, recomputation not counted.
        peak_bytes (`int`): the most memory of the accelerator; on a CPU, of the process up to here.
    """

    setting: Setting
    seconds: dict[str, float]
    bare_seconds: float
    forwards: dict[str, int]
    flops: dict[str, int]
    peak_bytes: int

    @property
    def rollout_seconds(self) -> float:
        return self.seconds["sampling"] + self.seconds["scoring"]

    @property
    def rollout_forwards(self) -> int:
        return self.forwards["policy"] + self.forwards["reward"]


@dataclass
class Bench:
    """
    A policy with random weights, its LoRA and a new SLRM of it, to be measured.

    Args:
        policy ([`FlowPolicy`]): the policy, on the device. Its transformer gets a LoRA.
        max_sequence_length (`int`): tokens of the T5 or UMT5 text encoder.
        options ([`RolloutConfig`]): those of its options that change speed and memory are applied as a trainer does.
        lora_r (`int`): rank of the LoRA.
        guidance_scale (`float`): scale of classifier-free guidance.
        score_batch_size (`int`, *optional*): candidates per forward of the reward model.
        transition_batch_size (`int`, *optional*, defaults to `1`): transition pairs per forward and backward.
    """

    policy: FlowPolicy
    max_sequence_length: int
    options: RolloutConfig
    lora_r: int = 64
    guidance_scale: float = 4.5
    score_batch_size: int | None = None
    transition_batch_size: int = 1
    model: PeftModel = field(init=False)
    reward: WeightedReward = field(init=False)

    def __post_init__(self):
        transformer = self.policy.transformer.requires_grad_(False).eval()
        slrm = SLRMModel.from_policy(self.policy, max_sequence_length=self.max_sequence_length).requires_grad_(False)
        if self.options.share_backbone:
            slrm.add_lora(self._lora())
            slrm.requires_grad_(False)
            share_parameters(slrm.transformer, transformer)
        self.reward = WeightedReward([LatentReward(slrm, "parent", self.score_batch_size)])
        check_rewards([slrm], self.options)
        check_sharing([slrm], self.options, self._lora())
        check_speed_options(self.options, self._lora())
        self.model = get_peft_model(transformer, self._lora())
        apply_memory_options(self.policy, None, self.reward.rewards, self.options)
        move_rewards(self.reward.rewards, self.policy, self.options)
        if self.options.torch_compile:
            options = (self.options.torch_compile_backend, self.options.torch_compile_mode)
            compile_blocks([transformer, slrm.transformer], *options)
        transformer.enable_gradient_checkpointing()

    @property
    def weight_bytes(self) -> int:
        """Bytes of the networks' parameters and buffers, each counted once."""
        tensors = [tensor for network in (self.model, self.slrm) for _, tensor in all_tensors(network)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())

    @property
    def slrm(self) -> SLRMModel:
        return self.reward.rewards[0].model

    @property
    def device(self) -> torch.device:
        return self.policy.transformer.device

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """As in a trainer: LoRA in float32 over a base in half precision."""
        dtype = self.policy.transformer.dtype
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            yield

    def embeddings(self, count: int) -> PromptEmbeddings:
        """Random embeddings of `count` prompts."""
        generator = torch.Generator().manual_seed(count)
        config = self.policy.transformer.config
        if self.policy.modality == "video":
            shape = (count, self.max_sequence_length, config.text_dim)
            return PromptEmbeddings(torch.randn(shape, generator=generator)).to(self.device)
        shape = (count, 77 + self.max_sequence_length, config.joint_attention_dim)
        pooled = torch.randn(count, config.pooled_projection_dim, generator=generator)
        return PromptEmbeddings(torch.randn(shape, generator=generator), pooled).to(self.device)

    def sampler(self, setting: Setting, timer: StageTimer | None = None) -> TAPOSampler:
        """The sampler of a setting."""
        latent_shape = self.policy.latent_shape(*setting.size)
        return TAPOSampler(
            policy=self.policy,
            scheduler=self.policy.build_scheduler(setting.num_inference_steps, latent_shape, self.device),
            step_indices=sde_step_indices(setting.num_inference_steps, setting.num_sde_steps),
            num_candidates=setting.num_candidates,
            reward=self.reward,
            latent_shape=latent_shape,
            guidance_scale=self.guidance_scale,
            timer=timer or StageTimer(),
        )

    def rollout(self, sampler: TAPOSampler, embeds: PromptEmbeddings) -> TrajectoryPairs:
        """The pairs of a batch of prompts, from the noise of seeds 0, 1, ..."""
        prompts, generators = ["prompt"] * len(embeds), seeded_generators(len(embeds))
        with self.autocast():
            return sampler.sample(self.model, prompts, embeds, self.embeddings(1), generators)

    def update(self, sampler: TAPOSampler, pairs: TrajectoryPairs, optimizer: torch.optim.Optimizer) -> None:
        """An optimiser step on the pairs of a rollout, in the chunks of [`TAPOTrainer`]."""
        negative = self.embeddings(1)
        for chunk in pairs.transitions(self.transition_batch_size):
            chunk = chunk.to(self.device)
            latents, indices = chunk.latents.flatten(0, 1), chunk.step_indices.repeat(2)
            sigma = sampler.scheduler.sigma(indices.to(sampler.scheduler.sigmas.device))
            arguments = (latents, sigma, chunk.prompt_embeds.repeat(2), negative, self.guidance_scale)
            with self.autocast():
                velocity = self.policy.velocity(self.model, *arguments)
                with torch.no_grad(), self.model.disable_adapter():
                    ref_velocity = self.policy.velocity(self.model, *arguments)
            mean, std = sampler.scheduler.sde_mean_std(latents, velocity, indices)
            ref_mean, _ = sampler.scheduler.sde_mean_std(latents, ref_velocity, indices)
            ratios = sampler.scheduler.log_ratio(chunk.next_latents.flatten(0, 1), mean, ref_mean, std)
            losses, _ = tapo_loss(*ratios.chunk(2), beta=BETA)
            (losses.mean() * chunk.share).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def bare_forwards(self, sampler: TAPOSampler, embeds: PromptEmbeddings) -> None:
        """The networks' forwards of a rollout, in the same batches."""
        batch_size, negative = len(embeds), self.embeddings(1)
        first, size = sampler.step_indices[0], 2 * sampler.num_candidates * batch_size
        latents = torch.randn(size, *sampler.latent_shape, device=self.device)
        repeated, many = embeds.repeat(2), embeds.repeat(2 * sampler.num_candidates)
        chunk_size = self.score_batch_size or size
        for index in range(sampler.scheduler.num_inference_steps):
            branches, sigma = 1 if index <= first else 2, sampler.scheduler.sigma(index)
            chosen, some = (embeds if branches == 1 else repeated), latents[: branches * batch_size]
            with self.autocast():
                self.policy.velocity(self.model, some, sigma, chosen, negative, self.guidance_scale)
                for start in range(0, size if index in sampler.step_indices else 0, chunk_size):
                    part = slice(start, start + chunk_size)
                    embed, sigma = many[part], sampler.scheduler.sigma(index + 1)
                    texts = (embed.prompt_embeds, embed.pooled_prompt_embeds)
                    self.slrm.score(latents[part], sigma, *texts, velocity_target=latents[part])

    def flops(self, size: tuple[int, ...]) -> dict[str, int]:
        """
        Floating point operations of one latent through `policy`, `reward` and, forward and backward without what
        checkpointing computes again, `training`. They are counted on the meta device, where attention is two products.
        """
        transformer = self.policy.transformer
        with torch.device("meta"):
            model = get_peft_model(
                type(transformer).from_config(transformer.config).requires_grad_(False), self._lora()
            )
            slrm = SLRMModel.without_weights(self.policy)
            if self.options.share_backbone:
                slrm.add_lora(self._lora())
            latents = torch.randn(1, *self.policy.latent_shape(*size))
            sigma = torch.tensor(0.5)
        model, slrm = (nn.Module.to(network, transformer.dtype) for network in (model, slrm))
        embeds = self.embeddings(1).to("meta")
        texts = (embeds.prompt_embeds, embeds.pooled_prompt_embeds)
        programs = {
            "policy": torch.no_grad()(lambda: self.policy.velocity(model, latents, sigma, embeds)),
            "reward": torch.no_grad()(lambda: slrm.score(latents, sigma, *texts)),
            "training": lambda: self.policy.velocity(model, latents, sigma, embeds).sum().backward(),
        }
        counts = {}
        for name, program in programs.items():
            with FlopCounterMode(display=False) as counter:
                program()
            counts[name] = counter.get_total_flops()
        return counts

    def _lora(self) -> LoraConfig:
        return LoraConfig(r=self.lora_r, lora_alpha=self.lora_r, target_modules=self.policy.lora_target_modules)

    def measure(self, setting: Setting, repeats: int = 3, warm_up: bool = True) -> Measurement:
        """
        Run a setting.

        Args:
            setting ([`Setting`]): what to run.
            repeats (`int`, *optional*, defaults to `3`): times each part is run; the median counts.
            warm_up (`bool`, *optional*, defaults to `True`): run everything once before.
        """
        flops = self.flops(setting.size)
        embeds = self.embeddings(setting.prompts)
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-6)
        on_accelerator = self.device.type != "cpu"
        if on_accelerator:
            torch.cuda.reset_peak_memory_stats()
        times: dict[str, list[float]] = {"sampling": [], "scoring": [], "update": [], "bare": []}
        for repeat in range(repeats + warm_up):
            timer = StageTimer(enabled=True, device=self.device)
            sampler = self.sampler(setting, timer)
            with (
                _latents_through(self.policy.transformer) as policy,
                _latents_through(self.slrm.transformer) as reward,
            ):
                elapsed, pairs = seconds(lambda: self.rollout(sampler, embeds), self.device)  # noqa: B023
            with _latents_through(self.policy.transformer) as update:
                update_seconds, _ = seconds(lambda: self.update(sampler, pairs, optimizer), self.device)  # noqa: B023
            bare, _ = seconds(lambda: self.bare_forwards(sampler, embeds), self.device)  # noqa: B023
            if repeat < warm_up:
                continue
            scoring = timer.stages["reward"].seconds
            for name, value in (("sampling", elapsed - scoring), ("scoring", scoring), ("update", update_seconds)):
                times[name].append(value / setting.prompts)
            times["bare"].append(bare / setting.prompts)
        forwards = {"policy": sum(policy), "reward": sum(reward), "training": sum(update) // 2}
        forwards = {name: count // setting.prompts for name, count in forwards.items()}
        forwards["reference"] = forwards["training"]
        medians = {name: statistics.median(values) for name, values in times.items()}
        return Measurement(
            setting=setting,
            bare_seconds=medians.pop("bare"),
            seconds=medians,
            forwards=forwards,
            flops={
                "rollout": forwards["policy"] * flops["policy"] + forwards["reward"] * flops["reward"],
                "update": forwards["training"] * (flops["training"] + flops["policy"]),
            },
            peak_bytes=torch.cuda.max_memory_allocated() if on_accelerator else process_peak_bytes(),
        )


@contextmanager
def _latents_through(network: nn.Module) -> Iterator[list[int]]:
    """Batch sizes of a network's forwards."""
    sizes: list[int] = []
    hook = on_forward(network, sizes.append)
    try:
        yield sizes
    finally:
        hook.remove()


def randomize(policy: FlowPolicy, device: torch.device, dtype: torch.dtype) -> None:
    """Give a policy on the meta device random weights. Its VAE is left uninitialised, on the CPU: nothing here decodes."""
    kept = policy.transformer._keep_in_fp32_modules or []
    for name, tensor in all_tensors(policy.transformer):
        if not any(module in name.split(".") for module in kept):
            tensor.data = tensor.data.to(dtype)
    policy.pipeline.transformer = policy.transformer.to_empty(device=device).eval()
    policy.pipeline.vae = policy.vae.to_empty(device="cpu")
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in policy.transformer.state_dict().items():
        tensor.normal_(0, 0.02, generator=generator)
        if "norm" in name and name.endswith("weight") and tensor.ndim == 1:
            tensor.fill_(1)
    for name, buffer in policy.transformer.named_buffers():
        if name not in policy.transformer.state_dict():
            buffer.zero_()


def seeded_generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def seconds(program: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """How long a program takes, and what it returns."""

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    start = now()
    result = program()
    return now() - start, result


def process_peak_bytes() -> int:
    """The most memory that this process ever had, on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.no_grad()
def matmul_peak(device: torch.device, dtype: torch.dtype, budget: float = 0.5) -> float:
    """Operations per second of the best square matrix product of some sizes, the measured peak of a device."""
    best = 0.0
    for size in (512, 1024) if device.type == "cpu" else (2048, 4096, 8192):
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        left @ right
        elapsed, count = 0.0, 0
        while elapsed < budget:
            took, _ = seconds(lambda: [left @ right for _ in range(4)], device)  # noqa: B023
            elapsed, count = elapsed + took, count + 4
        best = max(best, count * 2 * size**3 / elapsed)
    return best


def linear_fit(x: list[float], y: list[float]) -> dict[str, float]:
    """
    Least squares of `y = intercept + slope x`.

    Returns:
        `dict[str, float]`: `intercept`, `slope` and `r2`, the share of the variance that the line explains.
    """
    if len(set(x)) < 2:
        raise ValueError("A line needs points at two places at least: measure more settings.")
    slope, intercept = statistics.linear_regression(x, y)
    return {
        "intercept": intercept,
        "slope": slope,
        "r2": statistics.correlation(x, y) ** 2 if len(set(y)) > 1 else 1.0,
    }
