# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
What a pair of trajectories costs: seconds of sampling, scoring and updating, forwards, floating-point operations and memory of
[`TAPOTrainer`] with random weights. `tapo-trl bench` writes it down.
"""

import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .networks.sharing import all_tensors
from .policies import FlowPolicy, PromptEmbeddings
from .profiling import StageTimer, on_forward
from .rewards import SLRMModel
from .rollouts import TAPOSampler, TrajectoryPairs, TransitionPairs
from .trainer.policy_setup import eval_mode
from .trainer.tapo_config import TAPOConfig
from .trainer.tapo_trainer import TAPOTrainer


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
        bare_seconds (`float`): of the rollout's forwards alone.
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
    A [`TAPOTrainer`] with a policy, its LoRA and a new SLRM of it, to be measured.

    Args:
        policy ([`FlowPolicy`]): the policy, whose prompts are random embeddings from now on.
        options ([`TAPOConfig`]): the configuration. Steps, candidates and sizes are those of each [`Setting`]; its folders are
            not used.
        lora_r (`int`, *optional*, defaults to `64`): rank of the LoRA.
        num_experts (`int`, *optional*, defaults to `1`): transformers of the pipeline, of which the policy is one.
    """

    policy: FlowPolicy
    options: TAPOConfig
    lora_r: int = 64
    num_experts: int = 1
    trainer: TAPOTrainer = field(init=False)

    def __post_init__(self):
        policy, args = self.policy, self.options
        policy.encode_prompts = lambda prompts, max_sequence_length=None: self.embeddings(len(prompts))
        slrm = SLRMModel.from_policy(policy, max_sequence_length=args.max_sequence_length)
        if args.share_backbone:
            slrm.add_lora(self._lora())
        with tempfile.TemporaryDirectory() as folder:  # nothing is kept
            args.output_dir = args.cache_dir = folder
            prompts = Dataset.from_dict({"prompt": ["prompt"]})
            self.trainer = TAPOTrainer(policy, slrm, args, prompts, peft_config=self._lora())
        self.options = self.trainer.args  # whose changes have an effect

    @property
    def model(self) -> PeftModel:
        return self.trainer.model

    @property
    def slrm(self) -> SLRMModel:
        return self.trainer.reward.rewards[0].model

    @property
    def device(self) -> torch.device:
        return self.trainer.accelerator.device

    @property
    def weight_bytes(self) -> int:
        """Bytes of the networks' parameters and buffers, each counted once."""
        tensors = [tensor for network in (self.model, self.slrm) for _, tensor in all_tensors(network)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())

    def embeddings(self, count: int) -> PromptEmbeddings:
        """Random embeddings of `count` prompts."""
        generator = torch.Generator().manual_seed(count)
        shapes = self.policy.prompt_shapes(self.options.max_sequence_length)
        tensors = {name: torch.randn(count, *shape, generator=generator) for name, shape in shapes.items()}
        return PromptEmbeddings(**tensors).to(self.options.device)

    def sampler(self, setting: Setting, timer: StageTimer | None = None) -> TAPOSampler:
        """The trainer's sampler of a setting."""
        trainer, args = self.trainer, self.options
        args.num_inference_steps, args.num_sde_steps = setting.num_inference_steps, setting.num_sde_steps
        args.num_candidates, trainer.latent_shape = setting.num_candidates, self.policy.latent_shape(*setting.size)
        return trainer.build_sampler(
            policy=self.policy,
            reward=trainer.reward,
            latent_shape=trainer.latent_shape,
            guidance_scale=args.guidance_scale,
            timer=timer or StageTimer(),
        )

    def rollout(self, sampler: TAPOSampler, embeds: PromptEmbeddings) -> TrajectoryPairs:
        """The pairs of a batch of prompts, from the noise of seeds 0, 1, ..."""
        prompts, generators = ["prompt"] * len(embeds), seeded_generators(len(embeds))
        with eval_mode(self.model), self.trainer.accelerator.autocast():
            return sampler.sample(self.model, prompts, embeds, self.embeddings(1), generators)

    def update(self, pairs: TrajectoryPairs, optimizer: torch.optim.Optimizer) -> None:
        """An optimiser step on the pairs of a rollout, in the trainer's chunks and with its loss."""
        for chunk in pairs.transitions(self.options.transition_batch_size):
            with self.trainer.accelerator.autocast():
                _, losses, _ = self.trainer.transition_losses(self.model, chunk.to(self.device))
            (losses.mean() * chunk.share).backward()
        optimizer.step()
        optimizer.zero_grad()

    def update_by_chunk(self, setting: Setting, chunk_sizes: list[int], repeats: int = 3) -> list[dict[str, float]]:
        """
        Seconds of the update by the size of its chunks, beside an ideal update: the reference's forwards, and the policy's
        forwards and backwards without recomputation, in batches of the best of these sizes, and nothing else.

        Args:
            setting ([`Setting`]): what to run.
            chunk_sizes (`list[int]`): values of `transition_batch_size`, in pairs.
            repeats (`int`, *optional*, defaults to `3`): times each part is run after a first time; the median counts.

        Returns:
            `list[dict[str, float]]`: `chunk`, `update s` and `ideal s`, seconds per prompt, and `update / ideal`.
        """
        pairs = self.rollout(self.sampler(setting), self.embeddings(setting.prompts))
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-6)

        def median(program: Callable[[], Any]) -> float:
            return statistics.median([seconds(program, self.device)[0] for _ in range(repeats + 1)][1:])

        updates = []
        for size in chunk_sizes:
            self.options.transition_batch_size = size
            updates.append(median(lambda: self.update(pairs, optimizer)) / setting.prompts)
        recomputes, bare = self.policy.transformer.is_gradient_checkpointing, []
        self.policy.transformer.disable_gradient_checkpointing()
        for size in chunk_sizes:
            chunk = next(pairs.transitions(size)).to(self.device)
            bare.append(median(lambda: self._bare_update(chunk)) / len(chunk.weights))  # noqa: B023
        if recomputes:
            self.policy.transformer.enable_gradient_checkpointing()
        ideal = min(bare) * pairs.num_pairs / setting.prompts
        return [
            {"chunk": size, "update s": update, "ideal s": ideal, "update / ideal": update / ideal}
            for size, update in zip(chunk_sizes, updates, strict=True)
        ]

    def _bare_update(self, chunk: TransitionPairs) -> None:
        """A forward of the reference, and a forward and backward of the policy, for the parents of a chunk."""
        trainer, options = self.trainer, self.options
        embeds = chunk.prompt_embeds.repeat(chunk.num_parents)
        sigma = trainer.scheduler.sigma(chunk.step_indices.repeat(chunk.num_parents).to(self.device))
        guidance = (trainer.negative_prompt_embeds, options.guidance_scale)
        arguments = (chunk.latents.flatten(0, 1), sigma, embeds, *guidance)
        with trainer.accelerator.autocast():
            with torch.no_grad(), trainer.reference(self.model) as reference:
                self.policy.velocity(reference, *arguments)
            loss = self.policy.velocity(self.model, *arguments).sum()
        loss.backward()
        self.model.zero_grad()

    def flops(self, size: tuple[int, ...]) -> dict[str, int]:
        """
        Floating-point operations of one latent through `policy`, `reward` and, forward and backward without what
        checkpointing computes again, `training`. They are counted on the meta device, where attention is two products.
        """
        transformer = self.policy.transformer
        with torch.device("meta"):
            base = type(transformer).from_config(transformer.config).requires_grad_(False)
            model, slrm = get_peft_model(base, self._lora()), SLRMModel.without_weights(self.policy)
            if self.options.share_backbone:
                slrm.add_lora(self._lora())
            latents, sigma = torch.randn(1, *self.policy.latent_shape(*size)), torch.tensor(0.5)
        model, slrm = (nn.Module.to(network, transformer.dtype) for network in (model, slrm))
        embeds = self.embeddings(1).to("meta")
        programs = {
            "policy": torch.no_grad()(lambda: self.policy.velocity(model, latents, sigma, embeds)),
            "reward": torch.no_grad()(lambda: slrm.score(latents, sigma, **embeds.tensors)),
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
        flops, embeds = self.flops(setting.size), self.embeddings(setting.prompts)
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-6)
        if self.device.type != "cpu":
            torch.cuda.reset_peak_memory_stats()
        times: dict[str, list[float]] = {"sampling": [], "scoring": [], "update": [], "bare": []}
        for repeat in range(repeats + warm_up):
            timer = StageTimer(enabled=True, device=self.device)
            sampler, network = self.sampler(setting, timer), self.policy.transformer
            with _latents_through(network) as policy, _latents_through(self.slrm.transformer) as reward:
                elapsed, pairs = seconds(lambda: self.rollout(sampler, embeds), self.device)  # noqa: B023
            with _latents_through(network) as update:
                update_seconds, _ = seconds(lambda: self.update(pairs, optimizer), self.device)  # noqa: B023
            if repeat < warm_up:
                continue
            scoring = timer.stages["reward"].seconds
            bare = scoring + timer.stages["policy"].seconds
            found = {"sampling": elapsed - scoring, "scoring": scoring, "update": update_seconds, "bare": bare}
            for name, value in found.items():
                times[name].append(value / setting.prompts)
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
            peak_bytes=process_peak_bytes() if self.device.type == "cpu" else torch.cuda.max_memory_allocated(),
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
    policy.transformer = policy.transformer.to_empty(device=device).eval()
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
