# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Latents that go through each network, counted while a trainer's own sampler and loss run on the meta device."""

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..policies import FlowPolicy
from ..profiling import StageTimer, on_forward
from ..rewards import LatentRewardModel, StepRewardModel
from ..rewards.scoring import Candidates, LatentReward, WeightedReward
from ..rewards.step_reward import RewardOutput
from ..rollouts import Rollout
from ..rollouts.subset import draw_examples
from ..seeding import seeded_generator
from .meta_models import prompts_of_shapes, shrink
from .report import Row


META = torch.device("meta")


class ForwardCounts:
    """Batch sizes of forwards, by what they are for."""

    def __init__(self):
        self.sizes: dict[str, list[int]] = defaultdict(list)
        self._phase = ""

    def watch(self, network: nn.Module, name: str, has_phases: bool = True) -> None:
        """Count the forwards of a diffusers transformer, each under its name and, unless it has none, its phase."""
        on_forward(network, lambda latents: self.add(f"{name}, {self._phase}" if has_phases else name, latents))

    def add(self, name: str, latents: int) -> None:
        self.sizes[name + (" (forward and backward)" if torch.is_grad_enabled() else "")].append(latents)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, self._phase = self._phase, name
        yield
        self._phase = before

    def rows(self) -> list[Row]:
        """Latents of each kind of forward, and the batches that they come in."""
        rows = []
        for name, sizes in self.sizes.items():
            batches = " or ".join(str(size) for size in sorted(set(sizes)))
            rows.append(Row(name, sum(sizes), f"{len(sizes)} forward{'s' * (len(sizes) > 1)} of {batches}"))
        return rows


class MetaReward(WeightedReward):
    """
    Rewards on the meta device: what they ask the policy for is asked, and no value comes of it.

    Args:
        counts ([`ForwardCounts`]): Where that is counted.
        models (`Sequence[StepRewardModel]`): Reward models on the meta device.
        has_function (`bool`): Whether there is a function of decoded samples, too.
        args ([`RolloutConfig`]): The training.
    """

    def __init__(self, counts: ForwardCounts, models: Sequence[StepRewardModel], has_function: bool, args: Any):
        self.counts, self.batch_size, rewards = counts, 0, []
        for model in models:
            if isinstance(model, LatentRewardModel):
                model = _shrunk(model)
                counts.watch(model.transformer, "reward model", has_phases=False)
                target = model.rollout_target(args.velocity_target)
                rewards.append(LatentReward(model, target, args.score_batch_size, args.score_estimates))
            else:
                rewards.append(partial(self._read_estimates, name="reward model"))
        rewards += [partial(self._read_estimates)] * has_function
        for reward in rewards:
            reward.__name__ = "reward"
        super().__init__(rewards)

    def _read_estimates(self, candidates: Candidates, name: str | None = None) -> torch.Tensor:
        if name is not None:
            self.counts.add(name, len(candidates))
        return candidates.denoised.flatten(1).mean(1)

    def __call__(self, candidates: Candidates) -> torch.Tensor:
        self.batch_size = max(self.batch_size, len(candidates))
        if candidates.sigma.is_meta:  # of clean samples
            candidates.sigma = torch.zeros(())
        with self.counts.phase("at the candidates"):
            return super().__call__(candidates)

    def score(self, candidates: Candidates) -> torch.Tensor:
        self.batch_size = max(self.batch_size, len(candidates))
        self.rewards = [getattr(reward, "score", reward) for reward in self.rewards]
        return super().__call__(candidates)


def meta_trainer(trainer_class: type, args: Any, policy: FlowPolicy, counts: ForwardCounts, **attributes) -> Any:
    """
    A trainer of which only what makes rollouts and losses works, on the meta device and with one layer.

    Args:
        trainer_class (`type`): Its class.
        args (`TrainingArguments`): Its configuration, in which sizes are filled in.
        policy ([`FlowPolicy`]): The policy on the meta device. It is not changed.
        counts ([`ForwardCounts`]): Where its forwards are counted.
        attributes: Further attributes of the trainer.
    """
    policy, args = copy.copy(policy), copy.copy(args)
    policy.pipeline = copy.copy(policy.pipeline)
    policy.transformer, reference = _shrunk(policy.transformer), _shrunk(policy.transformer)
    counts.watch(policy.transformer, "policy")
    counts.watch(reference, "reference")
    args.self_check = False
    trainer = object.__new__(trainer_class)
    vars(trainer).update(
        args=args,
        policy=policy,
        model=policy.transformer,
        ref_model=reference,
        latent_shape=policy.latent_shape(args.height, args.width, args.num_frames),
        negative_prompt_embeds=prompts_of_shapes(policy, 1, args.max_sequence_length),
        timer=StageTimer(),
        # Noise levels are numbers, on the CPU
        accelerator=SimpleNamespace(
            device=torch.device("cpu"),
            unwrap_model=lambda model: model,
            autocast=nullcontext,
            gather=lambda state: torch.zeros_like(state, device="cpu"),
            gather_for_metrics=lambda values: values,
        ),
        _record=lambda metrics: None,
        _record_pairs=lambda metrics, labels: None,
        **attributes,
    )
    return trainer


def _shrunk(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    shrink(network)
    return network


def count_rollout(
    trainer_class: type,
    args: Any,
    policy: FlowPolicy,
    models: Sequence[StepRewardModel] = (),
    has_function: bool = False,
) -> tuple[ForwardCounts, Rollout, int]:
    """
    Make the rollout of one prompt, and the losses of its examples.

    Args:
        trainer_class (`type`): A [`RolloutTrainer`].
        args ([`RolloutConfig`]): Its configuration, in which sizes are filled in.
        policy ([`FlowPolicy`]): The policy on the meta device.
        models (`Sequence[StepRewardModel]`, *optional*): Reward models on the meta device.
        has_function (`bool`, *optional*, defaults to `False`): Whether there is a reward of decoded samples, too.

    Returns:
        `tuple[ForwardCounts, Rollout, int]`: What was counted, the rollout, and the most samples that were scored at once.
    """
    counts = ForwardCounts()
    reward = MetaReward(counts, models, has_function, args)
    trainer = meta_trainer(trainer_class, args, policy, counts, reward=reward)
    trainer.sampler = trainer.build_sampler(
        policy=trainer.policy, reward=reward, latent_shape=trainer.latent_shape, guidance_scale=args.guidance_scale
    )
    embeds = prompts_of_shapes(policy, 1, args.max_sequence_length)
    generators = [seeded_generator("dry run", 0)]
    with counts.phase("rollout"):
        rollout = trainer.sampler.sample(trainer.model, [""], embeds, trainer.negative_prompt_embeds, generators)
    if hasattr(rollout, "advantages"):  # which the trainer computes of all processes
        rollout.advantages = rollout.rewards
    if args.pairs_per_update is not None:
        rollout.weights = torch.ones(rollout.weights.shape)  # which have no values on the meta device
        rollout = draw_examples(rollout, args.pairs_per_update, generators)
    with counts.phase("training"):
        for chunk in rollout.transitions(args.transition_batch_size or 1):
            trainer.transition_losses(trainer.model, chunk.to(META))
    return counts, rollout, reward.batch_size


def count_pair(trainer_class: type, args: Any, policy: FlowPolicy) -> ForwardCounts:
    """
    Make the loss of one pair, of [`DiffusionDPOTrainer`].

    Args:
        trainer_class (`type`): The trainer.
        args ([`DiffusionDPOConfig`]): Its configuration, in which sizes are filled in.
        policy ([`FlowPolicy`]): The policy on the meta device.
    """
    counts = ForwardCounts()
    trainer = meta_trainer(trainer_class, args, policy, counts, inversion_cache=None)
    invert = trainer.policy.invert

    def invert_in_phase(*values, **kwargs) -> torch.Tensor:
        with counts.phase("inversion"):
            return invert(*values, **kwargs)

    trainer.policy.invert = invert_in_phase
    trainer.sigmas = policy.build_scheduler(args.num_inference_steps, trainer.latent_shape).sigmas[:-1]
    inputs, noise = _meta_pair(policy, args, trainer.latent_shape)
    with counts.phase("training"):
        trainer._pair_losses(trainer.model, inputs, torch.zeros(1, dtype=torch.long), noise)
    return counts


def count_sample(trainer_class: type, args: Any, policy: FlowPolicy) -> ForwardCounts:
    """
    Make the loss of one sample, of [`DiffusionSFTTrainer`].

    Args:
        trainer_class (`type`): The trainer.
        args ([`DiffusionSFTConfig`]): Its configuration, in which sizes are filled in.
        policy ([`FlowPolicy`]): The policy on the meta device.
    """
    counts = ForwardCounts()
    trainer = meta_trainer(trainer_class, args, policy, counts, sigmas=torch.full((1,), 0.5))
    inputs, noise = _meta_pair(policy, args, trainer.latent_shape)
    with counts.phase("training"):
        trainer._sample_losses(trainer.model, inputs, noise, torch.zeros(1, dtype=torch.long), noise)
    return counts


def count_reward_pair(trainer_class: type, args: Any, policy: FlowPolicy, model: StepRewardModel) -> ForwardCounts:
    """
    Make the loss of one pair, of [`SLRMTrainer`].

    Args:
        trainer_class (`type`): The trainer.
        args ([`SLRMConfig`]): Its configuration, in which sizes are filled in.
        policy ([`FlowPolicy`]): The policy on the meta device, whose transformer is the base model.
        model ([`StepRewardModel`]): The reward model on the meta device, in training mode.
    """
    counts = ForwardCounts()
    trainer = meta_trainer(trainer_class, args, policy, counts)
    base, model = _shrunk(policy.transformer), _shrunk(model)
    trainer.policy.transformer = base
    counts.watch(base, "base model", has_phases=False)
    if isinstance(model, LatentRewardModel):
        counts.watch(model.transformer, "reward model", has_phases=False)
    else:
        _read_no_images(model, trainer.policy, counts)
    vars(trainer).update(model=model.train(), base_model=base)
    inputs, noise = _meta_pair(policy, args, trainer.latent_shape)
    trainer._pair_loss(model, inputs, torch.full((1,), 0.5, device=META), torch.cat([noise, noise]))
    return counts


def _meta_pair(policy: FlowPolicy, args: Any, latent_shape: tuple[int, ...]) -> tuple[dict[str, Any], torch.Tensor]:
    """A batch of one pair, and its noise."""
    latents = torch.empty(1, *latent_shape, device=META)
    inputs = {
        "prompt": [""],
        "prompt_embeds": prompts_of_shapes(policy, 1, args.max_sequence_length),
        "chosen_latents": latents,
        "rejected_latents": latents,
        "label": torch.ones(1, device=META),
    }
    return inputs, latents


def _read_no_images(model: StepRewardModel, policy: FlowPolicy, counts: ForwardCounts) -> None:
    """Let a reward model of images do without a decoder, a tokenizer and its towers, whose shapes do not matter here."""

    def forward(pixel_values: torch.Tensor, sigma: torch.Tensor, input_ids: torch.Tensor) -> RewardOutput:
        counts.add("reward model", len(pixel_values))
        return RewardOutput(logits=pixel_values.flatten(1).mean(1).requires_grad_())

    policy.decode = model.pixel_values = lambda images: images
    model.tokenize = lambda prompts: torch.zeros(len(prompts), 1, dtype=torch.long)
    model.forward = forward
