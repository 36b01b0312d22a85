# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..losses import diffusion_nft_loss, optimality_rewards
from ..method_card import MethodCard
from ..rollouts import NFTSampler, NoisedSamples, RewardedSamples
from ..rollouts.groups import group_metrics
from ..runs.shards import TrainedWeights
from ..schedulers.noise_levels import draw_uniform_or_logit_normal, training_sigmas
from .group_rewards import advantages_of_process
from .nft_config import DiffusionNFTConfig
from .old_policy import OldPolicy
from .policy_setup import trained_levels
from .rollout_trainer import RolloutTrainer


class DiffusionNFTTrainer(RolloutTrainer):
    r"""
    Trainer for DiffusionNFT (negative-aware fine-tuning), online reinforcement learning on the forward process.

    An old policy, a moving average of the trained one, draws several samples for each prompt, and their rewards become
    probabilities that they are good. The samples are noised, and the policy learns by flow matching: towards good samples,
    and away from bad ones by an implicit negative policy. No likelihoods and no sampling trajectories are needed.

    Example:

    ```python
    from peft import LoraConfig
    from tapo_trl import DiffusionNFTConfig, DiffusionNFTTrainer

    trainer = DiffusionNFTTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward_model="my-name/sd35-slrm",
        args=DiffusionNFTConfig(output_dir="sd35-nft"),
        peft_config=LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian"),
    )
    trainer.train()
    ```

    Args:
        reward_model (`str`, [`StepRewardModel`], `Callable` or a `list` of those):
            As for [`TAPOTrainer`], but for the final samples: a reward model scores their latents, at noise level 0, and a
            callable the decoded samples.
        args ([`DiffusionNFTConfig`], *optional*):
            Configuration. Defaults to one with a folder named after the model.

    The others are those of [`TAPOTrainer`].

    Attributes:
        old_policy ([`~trainer.old_policy.OldPolicy`]): weights of the policy that samples.
    """

    config_class = DiffusionNFTConfig
    rollout_class = RewardedSamples
    old_policy: OldPolicy | None = None
    method_card = MethodCard(
        name="DiffusionNFT",
        tags=("diffusion-nft",),
        paper="zheng2026diffusionnft",
        title="**DiffusionNFT**",
        text="A moving average of the policy draws several samples for every prompt, and a reward compares them. The samples are "
        "noised, and the policy is trained to predict the velocity of the good ones, and, by an implicit negative policy, to "
        "move away from the bad ones. Sample with the guidance scale of the training, see below.",
    )
    _seed_name = "diffusion_nft"
    _card_metrics = ("reward", "eval_", "distance/")
    _card_options = (
        "beta",
        "kl_coef",
        "advantage_clip",
        "scale_rewards",
        "loss_weighting",
        "num_generations",
        "num_noise_levels",
        "timestep_sampling",
        "old_policy_decay_rate",
        "old_policy_max_decay",
        "num_inference_steps",
        "guidance_scale",
    )

    def _set_up(self) -> None:
        super()._set_up()
        args = self.args
        self.old_policy = OldPolicy(
            TrainedWeights(self),
            args.old_policy_decay_rate,
            args.old_policy_max_decay,
            args.old_policy_decay_start,
            every=args.num_iterations,
        )
        self.add_callback(self.old_policy)

    # Rollout: samples of the old policy, and the noise levels at which each is trained on

    def build_sampler(self, **kwargs) -> NFTSampler:
        args = self.args
        scheduler = self.policy.build_scheduler(args.num_inference_steps, self.latent_shape, self.accelerator.device)
        is_of_sampler = args.timestep_sampling == "sampling_steps"
        sigmas = scheduler.sigmas[:-1].cpu() if is_of_sampler else training_sigmas(scheduler)
        self.sigmas = sigmas[trained_levels(self.policy, sigmas)]
        self.num_noise_levels = args.num_noise_levels or max(args.num_inference_steps - 1, 1)
        if is_of_sampler and args.num_noise_levels is None:
            self.num_noise_levels = max(len(self.sigmas) - 1, 1)
        elif is_of_sampler and self.num_noise_levels > len(self.sigmas):
            raise ValueError(
                f"`num_noise_levels={self.num_noise_levels}`, but only {len(self.sigmas)} sampling steps are those of the trained "
                "`expert`: lower it."
            )
        return NFTSampler(
            scheduler=scheduler, num_generations=args.num_generations, draw_sigmas=self._draw_sigmas, **kwargs
        )

    def _draw_sigmas(self, generator: torch.Generator) -> torch.Tensor:
        """Noise levels of one sample, of shape `(n,)`."""
        if self.args.timestep_sampling == "sampling_steps":
            return self.sigmas[torch.randperm(len(self.sigmas), generator=generator)[: self.num_noise_levels]]
        law, levels = self.args.timestep_sampling, range(self.num_noise_levels)
        positions = torch.cat([draw_uniform_or_logit_normal(law, generator) for _ in levels])
        return self.sigmas[(positions * len(self.sigmas)).long()]

    def rollout(self, batch: list[dict[str, Any]], seed_step: int | None = None) -> RewardedSamples:
        """See [`~RolloutTrainer.rollout`]. In training the old policy draws the samples, in an evaluation the trained one."""
        with self.old_policy.active() if self.model.training else nullcontext():
            rollout = super().rollout(batch, seed_step)
        rollout.advantages = advantages_of_process(rollout.rewards, self.args.scale_rewards, self.accelerator)
        return rollout

    def rollout_metrics(self, rollout: RewardedSamples) -> dict[str, torch.Tensor]:
        decay = self.old_policy.decay(self.state.global_step)
        return group_metrics(rollout) | {"old_policy/decay": torch.full_like(rollout.rewards[:, 0], decay)}

    # Loss: flow matching with the implicit positive and negative policies

    def transition_losses(
        self, model: torch.nn.Module, inputs: NoisedSamples
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        args, noisy = self.args, inputs.noisy_latents
        guidance_scale = self.policy.unguided(args.guidance_scale)  # without classifier-free guidance
        arguments = (noisy, inputs.sigmas, inputs.prompt_embeds, None, guidance_scale)
        old_velocity = self.old_velocity(*arguments)
        with self.timer.stage("policy, training", latents=len(noisy)):
            velocity = self.policy.velocity(model, *arguments)

        optimality = optimality_rewards(inputs.advantages, args.advantage_clip)
        losses, metrics = diffusion_nft_loss(
            velocity, old_velocity, inputs.velocities, inputs.sigmas, optimality, args.beta, args.loss_weighting
        )
        losses = args.advantage_clip / args.beta * losses
        if args.kl_coef == 0:
            return losses, inputs.weights * losses, metrics
        distance = (velocity - self.reference_velocity(inputs, *arguments)).square().flatten(1).mean(1)
        metrics["distance/ref"] = distance.detach()
        return losses, inputs.weights * (losses + args.kl_coef * distance), metrics

    @torch.no_grad()
    def old_velocity(self, latents: torch.Tensor, *arguments: Any) -> torch.Tensor:
        """Velocity of the old policy, without gradient. Arguments are those of [`~FlowPolicy.velocity`] after the model."""
        with (
            self.timer.stage("old policy, training", latents=len(latents)),
            nullcontext() if self.old_policy is None else self.old_policy.active(),
        ):
            return self.policy.velocity(self.model, latents, *arguments)

    def check_before_first_update(self, losses: torch.Tensor, metrics: dict[str, torch.Tensor]) -> None:
        if not self._checks_start:
            return
        for name in ("old", "ref"):
            distance = metrics.get(f"distance/{name}", losses.new_zeros(1))
            if distance.max() > 1e-9:
                other = "old policy" if name == "old" else "reference"
                raise RuntimeError(
                    f"Before the first update the squared differences from the {other} are {distance.tolist()}, not 0: the policy "
                    f"and the {other} differ. Does the adapter start from trained weights, or is some layer (dropout, batch norm) "
                    "random? Set `self_check=False` if the difference is meant."
                )

    # Checkpoints

    def _save_training_state(self, folder: Path) -> None:
        super()._save_training_state(folder)
        self.old_policy.save(folder, self.args.should_save)

    def _load_training_state(self, folder: Path) -> None:
        super()._load_training_state(folder)
        self.old_policy.load(folder)
