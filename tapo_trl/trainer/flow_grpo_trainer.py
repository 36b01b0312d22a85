# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import torch
from peft import PeftConfig

from ..losses import flow_dppo_loss, flow_grpo_loss
from ..method_card import MethodCard
from ..rollouts import FlowGRPOSampler, GroupTransitions, TrajectoryGroups
from ..rollouts.groups import group_metrics
from ..runs.checks import check_train_cfg
from ..schedulers import gaussian_kl, normalised_log_ratio, window_step_indices
from .flow_grpo_config import FlowGRPOConfig
from .group_rewards import advantages_of_process
from .rollout_trainer import RolloutTrainer


class FlowGRPOTrainer(RolloutTrainer):
    r"""
    Trainer for Flow-GRPO, policy gradients on the stochastic steps of a flow-matching sampler.

    Every update draws a group of stochastic trajectories for each prompt and scores their final samples. The advantage
    of a trajectory is its reward relative to its group. Training raises the probability of the steps of trajectories
    with a positive advantage and lowers that of the others; a KL term keeps the policy close to the reference.

    Example:

    ```python
    from peft import LoraConfig
    from tapo_trl import FlowGRPOConfig, FlowGRPOTrainer

    trainer = FlowGRPOTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward_model="my-name/sd35-slrm",
        args=FlowGRPOConfig(output_dir="sd35-grpo"),
        peft_config=LoraConfig(r=64, lora_alpha=64, init_lora_weights="gaussian"),
    )
    trainer.train()
    ```

    Args:
        reward_model (`str`, [`StepRewardModel`], `Callable` or a `list` of those):
            As for [`TAPOTrainer`], but for the final samples: a reward model scores their latents, at noise level 0, and a
            callable the decoded samples.
        args ([`FlowGRPOConfig`], *optional*):
            Configuration. Defaults to one with a folder named after the model.

    The others are those of [`TAPOTrainer`].
    """

    config_class = FlowGRPOConfig
    rollout_class = TrajectoryGroups
    has_stochastic_steps = True
    method_card = MethodCard(
        name="Flow-GRPO",
        tags=("flow-grpo",),
        paper="liu2025flow",
        title="**Flow-GRPO**",
        text="The policy draws a group of stochastic trajectories for every prompt, and a reward scores their final samples. "
        "Training raises the probability of the steps of trajectories that are better than the mean of their group, and "
        "lowers that of the others, with a penalty on the divergence from the base model.",
    )
    _seed_name = "flow_grpo"
    _card_metrics = ("reward", "eval_", "kl")
    _card_options = (
        "loss_type",
        "beta",
        "epsilon",
        "window_size",
        "scale_rewards",
        "num_generations",
        "num_iterations",
        "num_inference_steps",
        "num_sde_steps",
        "noise_level",
        "sde_type",
        "guidance_scale",
        "train_cfg",
        "shared_noise",
    )

    def _build_network(self, args: FlowGRPOConfig, peft_config: PeftConfig | None) -> torch.nn.Module:
        check_train_cfg(args, self.policy)
        return super()._build_network(args, peft_config)

    # Rollout: groups of trajectories and their advantages

    def build_sampler(self, **kwargs) -> FlowGRPOSampler:
        args = self.args
        self.scheduler = self.stochastic_scheduler()
        self.all_step_indices = self.stochastic_steps(args.step_indices)
        if args.window_size is not None and args.window_size > len(self.all_step_indices):
            raise ValueError(
                f"`window_size={args.window_size}`, but only the stochastic steps {self.all_step_indices} are those of the trained "
                "`expert`: lower it."
            )
        return FlowGRPOSampler(
            scheduler=self.scheduler,
            step_indices=self._window(0),
            num_generations=args.num_generations,
            train_cfg=args.train_cfg,
            shared_noise=args.shared_noise,
            **kwargs,
        )

    def _window(self, step: int) -> list[int]:
        """The stochastic steps of the rollout of an optimizer step, or of an evaluation (-1)."""
        args = self.args
        if args.window_size is None:
            return self.all_step_indices
        iteration = max(step, 0) // args.num_iterations
        options = (args.window_interval, args.window_stride, args.window_strategy, args.seed)
        return window_step_indices(self.all_step_indices, args.window_size, iteration, *options)

    @property
    def step_indices(self) -> list[int]:
        """The stochastic steps of the current update."""
        return self._window(self.state.global_step)

    def rollout(self, batch: list[dict[str, Any]], seed_step: int | None = None) -> TrajectoryGroups:
        self.sampler.step_indices = self._window(self.state.global_step if seed_step is None else seed_step)
        rollout = super().rollout(batch, seed_step)
        rollout.advantages = advantages_of_process(rollout.rewards, self.args.scale_rewards, self.accelerator)
        return rollout

    def rollout_metrics(self, rollout: TrajectoryGroups) -> dict[str, torch.Tensor]:
        return group_metrics(rollout)

    # Loss: clipped policy gradient and KL

    def transition_losses(
        self, model: torch.nn.Module, inputs: GroupTransitions
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        latents, indices = inputs.latents, inputs.step_indices
        sigma = self.scheduler.sigma(indices.to(self.scheduler.sigmas.device))
        guidance_scale = self.args.guidance_scale
        if not self.args.train_cfg:
            guidance_scale = self.policy.unguided(guidance_scale)
        # As in the rollout: the ratio is to the policy that sampled
        arguments = (latents, sigma, inputs.prompt_embeds, self.negative_prompt_embeds, guidance_scale)
        with self.timer.stage("policy, training", latents=len(latents)):
            velocity = self.policy.velocity(model, *arguments)
        mean, std = self.scheduler.sde_mean_std(latents, velocity, indices)

        log_ratios = self.scheduler.log_ratio(inputs.next_latents, mean, inputs.means, std)
        losses, metrics = self._policy_losses(log_ratios, mean, std, inputs)
        metrics["advantages"] = inputs.advantages.abs()
        if self.args.beta == 0:
            return losses, inputs.weights * losses, metrics

        ref_velocity = self.reference_velocity(inputs, *arguments)
        ref_mean, _ = self.scheduler.sde_mean_std(latents, ref_velocity, indices)
        kl = gaussian_kl(mean, ref_mean, std, self.args.logprob_reduction)
        metrics["kl"] = kl.detach()
        return losses, inputs.weights * (losses + self.args.beta * kl), metrics

    def _policy_losses(
        self, log_ratios: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, inputs: GroupTransitions
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Losses by `loss_type`, and metrics, of shape `(num_examples,)` each."""
        args = self.args
        if args.loss_type == "flow_grpo":
            return flow_grpo_loss(log_ratios, inputs.advantages, args.epsilon)
        divergences = gaussian_kl(mean, inputs.means, std, args.logprob_reduction)
        if args.loss_type == "flow_dppo":
            divergences = divergences.detach()
            losses, metrics = flow_dppo_loss(log_ratios, inputs.advantages, divergences, args.divergence_threshold)
            return losses, metrics | {"kl/old": divergences}
        sigmas, indices = self.scheduler.sigmas, inputs.step_indices.to(self.scheduler.sigmas.device)
        step_sizes = (sigmas[indices] - sigmas[indices + 1]).to(mean.device)
        log_ratios = normalised_log_ratio(log_ratios, divergences, std)
        losses, metrics = flow_grpo_loss(log_ratios, inputs.advantages, args.epsilon)
        return losses / step_sizes, metrics | {"kl/old": divergences.detach()}

    def step_metrics(self, losses: torch.Tensor, metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = {"ratio": "ratio", "clip_ratio": "clip_ratio/region_mean", "kl": "kl"}
        return {name: metrics[key] for name, key in names.items() if key in metrics}

    def check_before_first_update(self, losses: torch.Tensor, metrics: dict[str, torch.Tensor]) -> None:
        if not self._checks_start:
            return
        ratios = metrics["ratio"]
        if (ratios - 1).abs().mean() > self.args.epsilon:
            raise RuntimeError(
                f"Before the first update the ratios to the policy that sampled are {ratios.tolist()}, not 1 up to "
                f"`epsilon={self.args.epsilon}`: what is trained is not what has sampled, or rounding in half precision is "
                "larger than the clip range. Is some layer (dropout, batch norm) random? If not, raise `epsilon`, or train "
                "with `bf16=False`. Set `self_check=False` if the difference is meant."
            )
        if "kl" in metrics and metrics["kl"].max() > 1e-9:
            raise RuntimeError(
                f"Before the first update the divergences from the reference are {metrics['kl'].tolist()}, not 0: the policy and "
                "the reference differ. Does the adapter start from trained weights, or is some layer (dropout, batch norm) "
                "random? Set `self_check=False` if the difference is meant."
            )
