# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import torch

from ..losses import diffusion_dpo_loss, transferred_beta, velocity_error_change
from ..method_card import MethodCard
from ..rollouts import NoisedPairs, OnlineDPOSampler, SamplePairs
from ..rollouts.groups import group_metrics
from ..schedulers.noise_levels import draw_uniform_or_logit_normal, training_sigmas
from .online_dpo_config import OnlineDiffusionDPOConfig
from .policy_setup import trained_levels
from .rollout_trainer import RolloutTrainer


class OnlineDiffusionDPOTrainer(RolloutTrainer):
    r"""
    Trainer for online Diffusion-DPO: Diffusion-DPO on pairs that the policy draws itself.

    Every step draws several samples for each prompt, makes a pair of the one with the highest and the one with the lowest
    reward, and trains as [`DiffusionDPOTrainer`] does: both sides are noised, and the policy learns to predict the velocity
    of the better one better than the reference does, and that of the other one worse.

    Example:

    ```python
    from peft import LoraConfig
    from tapo_trl import OnlineDiffusionDPOConfig, OnlineDiffusionDPOTrainer

    trainer = OnlineDiffusionDPOTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward_model="my-name/sd35-slrm",
        args=OnlineDiffusionDPOConfig(output_dir="sd35-online-dpo"),
        peft_config=LoraConfig(r=64, lora_alpha=64, init_lora_weights="gaussian"),
    )
    trainer.train()
    ```

    Args:
        reward_model (`str`, [`StepRewardModel`], `Callable` or a `list` of those):
            As for [`TAPOTrainer`], but for the final samples: a reward model scores their latents, at noise level 0, and a
            callable the decoded samples.
        args ([`OnlineDiffusionDPOConfig`], *optional*):
            Configuration. Defaults to one with a folder named after the model.

    The others are those of [`TAPOTrainer`].
    """

    config_class = OnlineDiffusionDPOConfig
    rollout_class = SamplePairs
    method_card = MethodCard(
        name="Online-Diffusion-DPO",
        tags=("online-diffusion-dpo",),
        paper="wallace2024diffusion",
        title="**Online-Diffusion-DPO**",
        text="The policy draws several samples for every prompt, and a reward selects the best and the worst of them. Both are "
        "noised to the same levels. The policy is trained to predict the velocity of the better one better than the "
        "base model does, and that of the other one worse.",
    )
    _seed_name = "online_dpo"
    _card_metrics = ("reward", "error/", "eval_")
    _card_options = (
        "beta",
        "label_smoothing",
        "num_generations",
        "num_noise_levels",
        "timestep_sampling",
        "num_inference_steps",
        "guidance_scale",
    )

    # Rollout: samples, and the noise levels at which they are compared

    def build_sampler(self, **kwargs) -> OnlineDPOSampler:
        args = self.args
        scheduler = self.policy.build_scheduler(args.num_inference_steps, self.latent_shape, self.accelerator.device)
        sigmas = training_sigmas(scheduler)
        self.sigmas = sigmas[trained_levels(self.policy, sigmas)]
        return OnlineDPOSampler(
            scheduler=scheduler,
            num_generations=args.num_generations,
            num_noise_levels=args.num_noise_levels,
            draw_sigma=self._draw_sigma,
            **kwargs,
        )

    def _draw_sigma(self, generator: torch.Generator) -> torch.Tensor:
        """A noise level of the training, of shape `(1,)`."""
        position = draw_uniform_or_logit_normal(self.args.timestep_sampling, generator)
        return self.sigmas[(position * len(self.sigmas)).long()]

    def rollout_metrics(self, rollout: SamplePairs) -> dict[str, torch.Tensor]:
        gaps = rollout.rewards.amax(1) - rollout.rewards.amin(1)
        return group_metrics(rollout) | {"reward_gap": gaps}

    # Loss: Diffusion-DPO

    def transition_losses(
        self, model: torch.nn.Module, inputs: NoisedPairs
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        # [best; worst] in one forward each, without classifier-free guidance
        noisy, target = inputs.noisy_latents.flatten(0, 1), inputs.velocities.flatten(0, 1)
        guidance_scale = self.policy.unguided(self.args.guidance_scale)
        arguments = (noisy, inputs.sigmas.repeat(2), inputs.prompt_embeds.repeat(2), None, guidance_scale)
        with self.timer.stage("policy, training", latents=len(noisy)):
            velocity = self.policy.velocity(model, *arguments)
        ref_velocity = self.reference_velocity(inputs, *arguments)

        chosen, rejected = velocity_error_change(velocity, ref_velocity, target).chunk(2)
        beta = transferred_beta(self.args.beta, noisy[0].numel(), self.args.beta_reference_dim)
        losses, metrics = diffusion_dpo_loss(chosen, rejected, beta=beta, label_smoothing=self.args.label_smoothing)
        error = (velocity.detach() - target).square().flatten(1).mean(1)
        metrics["error/chosen"], metrics["error/rejected"] = error.chunk(2)
        return losses, inputs.weights * losses, metrics
