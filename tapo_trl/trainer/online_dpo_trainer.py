# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import torch

from ..losses import diffusion_dpo_loss, velocity_error_change
from ..rollouts import NoisedPairs, OnlineDPOSampler, SamplePairs
from ..rollouts.metrics import group_metrics
from ..runs.model_card import DIFFUSION_DPO_PAPERS, ONLINE_DPO_OPTIONS
from ..schedulers.noise_levels import draw_uniform_or_logit_normal, training_sigmas
from .online_dpo_config import OnlineDiffusionDPOConfig
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
        model (`str`, [`~diffusers.DiffusionPipeline`] or [`FlowPolicy`]):
            Hub id or folder of a pipeline, a pipeline, or a policy.
        reward_model (`str`, [`StepRewardModel`], `Callable` or a `list` of those):
            - `str`: Hub id or folder of a [`StepRewardModel`], such as an [`SLRMModel`].
            - [`StepRewardModel`]: scores the final latents, at noise level 0.
            - `Callable`: `f(images, prompts, **columns) -> scores`, with images as a float tensor in [0, 1] of shape
              `(N, 3, height, width)`, or `(N, 3, num_frames, height, width)` for video. It is applied to the decoded
              samples.
            - `list`: a weighted sum of them, see `args.reward_weights`.
        args ([`OnlineDiffusionDPOConfig`], *optional*):
            Configuration. Defaults to one with a folder named after the model.
        train_dataset ([`~datasets.Dataset`], *optional*):
            Prompts, in the column `prompt`. Other columns are passed to reward callables. Defaults to
            `args.dataset_name`, else to the prompts that ship with the package.
        eval_dataset ([`~datasets.Dataset`] or `dict` of those, *optional*):
            Held-out prompts.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Callbacks. Those that are a [`PolicyCallback`] get the trainer and have their prompts encoded.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning rate scheduler.
        peft_config ([`~peft.PeftConfig`], *optional*):
            LoRA configuration. `target_modules` defaults to the policy's. Without it the transformer is fully
            fine-tuned, in float32 whatever precision it comes in, and a frozen copy of it is the reference.
    """

    config_class = OnlineDiffusionDPOConfig
    _seed_name = "online_dpo"
    _tag_names = ["trl", "online-diffusion-dpo"]
    _name = "Online-Diffusion-DPO"
    _paper = DIFFUSION_DPO_PAPERS["diffusion_dpo"]
    _card_metrics = ("reward", "error/", "eval_")
    _card_options = ONLINE_DPO_OPTIONS

    # Rollout: samples, and the noise levels at which they are compared

    def build_sampler(self, **kwargs) -> OnlineDPOSampler:
        args = self.args
        scheduler = self.policy.build_scheduler(args.num_inference_steps, self.latent_shape, self.accelerator.device)
        self.sigmas = training_sigmas(scheduler)
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
        losses, metrics = diffusion_dpo_loss(
            chosen, rejected, beta=self.args.beta, label_smoothing=self.args.label_smoothing
        )
        error = (velocity.detach() - target).square().flatten(1).mean(1)
        metrics["error/chosen"], metrics["error/rejected"] = error.chunk(2)
        return losses, inputs.weights * losses, metrics

    def check_before_first_update(self, losses: torch.Tensor, metrics: dict[str, torch.Tensor]) -> None:
        self._check_start(metrics["rewards/margins"])
