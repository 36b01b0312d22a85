# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import torch
from peft import PeftConfig

from ..method_card import MethodCard
from ..rewards.pretrained.base import PretrainedReward
from ..rewards.remote import RemoteReward
from ..rewards.scoring import CleanSamples, PixelReward
from ..rollouts import LateStates, LateStateSampler, StateTransitions
from ..seeding import seeded_generator
from .policy_setup import trained_levels
from .refl_config import ReFLConfig
from .rollout_trainer import RolloutTrainer


class ReFLTrainer(RolloutTrainer):
    r"""
    Trainer for reward feedback learning (ReFL): gradient ascent on a differentiable reward, backpropagated through the
    last sampling steps.

    Every update samples a batch of prompts, the last `num_grad_steps` sampling steps with gradients, and maximises the
    reward of the final samples. With `estimate_range`, sampling stops at a random step of that range, and the one-step
    prediction of the clean latent is rewarded.

    Example:

    ```python
    from peft import LoraConfig
    from tapo_trl import ReFLConfig, ReFLTrainer, get_reward

    trainer = ReFLTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward_model=get_reward("pickscore"),
        args=ReFLConfig(output_dir="sd35-refl"),
        peft_config=LoraConfig(r=64, lora_alpha=64, init_lora_weights="gaussian"),
    )
    trainer.train()
    ```

    Args:
        reward_model (`str`, [`StepRewardModel`], [`PretrainedReward`], `Callable` or a `list` of those):
            As for [`TAPOTrainer`], but with gradients. A reward model scores the latents of final samples at noise level 0; the
            others score decoded samples, and must be differentiable.
        args ([`ReFLConfig`], *optional*):
            Configuration. Defaults to one with a folder named after the model.

    The others are those of [`TAPOTrainer`].
    """

    config_class = ReFLConfig
    rollout_class = LateStates
    method_card = MethodCard(
        name="ReFL",
        tags=("refl",),
        paper="xu2023imagereward",
        title="**reward feedback learning (ReFL)**",
        text="The policy draws samples, and the gradient of their reward is backpropagated through the last sampling steps.",
    )
    _seed_name = "refl"
    _card_metrics = ("reward", "eval_", "distance")
    _card_options = ("num_grad_steps", "estimate_range", "beta", "num_inference_steps", "guidance_scale")

    def _build_network(self, args: ReFLConfig, peft_config: PeftConfig | None) -> torch.nn.Module:
        network = super()._build_network(args, peft_config)
        for reward, weight in zip(self.reward.rewards, self.reward.weights, strict=True):
            function = reward.function if isinstance(reward, PixelReward) and weight else None
            if isinstance(function, (PretrainedReward, RemoteReward)) and not function.differentiable:
                raise ValueError(
                    f"`ReFLTrainer` needs the gradient of the reward, and `{function.name}` has none: choose another reward, or "
                    "`TAPOTrainer`, which needs scores only."
                )
        return network

    # Rollout: trajectories up to the steps with gradient

    def build_sampler(self, **kwargs) -> LateStateSampler:
        args = self.args
        self.scheduler = self.policy.build_scheduler(
            args.num_inference_steps, self.latent_shape, self.accelerator.device
        )
        first, last = args.estimate_range or (
            args.num_inference_steps - args.num_grad_steps,
            args.num_inference_steps - 1,
        )
        levels = trained_levels(self.policy, self.scheduler.sigmas[first : last + 1])
        if args.estimate_range is not None and not levels.all():
            raise ValueError(
                f"`estimate_range={args.estimate_range}` has steps of both experts, but `expert` trains one: keep to its steps, "
                f"{[first + step for step in levels.nonzero().flatten().tolist()]}."
            )
        return LateStateSampler(
            scheduler=self.scheduler, stop_at=args.num_inference_steps - args.num_grad_steps, **kwargs
        )

    def rollout(self, batch: list[dict[str, Any]], seed_step: int | None = None) -> LateStates:
        if self.args.estimate_range is not None:  # the same step on all processes, which make the same forwards
            first, last = self.args.estimate_range
            step = self.state.global_step if seed_step is None else seed_step
            generator = seeded_generator("refl_step", self.args.seed, step)
            self.sampler.stop_at = torch.randint(first, last + 1, (), generator=generator).item()
        return super().rollout(batch, seed_step)

    def rollout_metrics(self, rollout: LateStates) -> dict[str, torch.Tensor]:
        return {}  # the rewards are known in the loss

    # Loss: minus the reward of where the trajectories end

    def transition_losses(
        self, model: torch.nn.Module, inputs: StateTransitions
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        latents, distances = inputs.latents, []
        first, is_estimate = inputs.step_indices[0].item(), self.args.estimate_range is not None
        for index in [first] if is_estimate else range(first, self.args.num_inference_steps):
            sigma = self.scheduler.sigma(index)
            arguments = (latents, sigma, inputs.prompt_embeds, self.negative_prompt_embeds, self.args.guidance_scale)
            with self.timer.stage("policy, training", latents=len(latents)):
                velocity = self.policy.velocity(model, *arguments)
            if self.args.beta > 0:
                reference = self.reference_velocity(inputs, *arguments)
                distances.append((velocity - reference).square().flatten(1).mean(1))
            latents = latents - sigma * velocity if is_estimate else self.scheduler.ode_step(latents, velocity, index)

        samples = CleanSamples(latents, inputs.noise, inputs.prompts or [], inputs.prompt_embeds, inputs.columns)
        with self.timer.stage("reward", latents=len(latents)):
            # Evaluation has no gradient, which functions of one's own need not give then
            rewards = self.reward.score(samples) if torch.is_grad_enabled() else self.reward(samples)
        losses, metrics = -rewards, {"reward": rewards.detach()}
        if len(self.reward.rewards) > 1:
            metrics |= {f"rewards/{name}/mean": scores for name, scores in self.reward.last_scores.items()}
        if not distances:
            return losses, inputs.weights * losses, metrics
        distance = torch.stack(distances).mean(0)
        metrics["distance"] = distance.detach()
        return losses, inputs.weights * (losses + self.args.beta * distance), metrics

    def check_before_first_update(self, losses: torch.Tensor, metrics: dict[str, torch.Tensor]) -> None:
        if self._checks_start and metrics.get("distance", losses.new_zeros(1)).max() > 1e-9:
            raise RuntimeError(
                f"Before the first update the squared differences from the reference are {metrics['distance'].tolist()}, not 0: "
                "the policy and the reference differ. Does the adapter start from trained weights, or is some layer (dropout, "
                "batch norm) random? Set `self_check=False` if the difference is meant."
            )
