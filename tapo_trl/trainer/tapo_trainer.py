# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import math
from typing import Any

import torch
from peft import PeftConfig
from transformers.utils import logging

from ..data.prompts import ROW_COLUMN
from ..losses import logit_noise, tapo_loss, transferred_beta
from ..rewards import RangeWeight
from ..rollouts import PAIRINGS, TAPOSampler, TrajectoryPairs, TransitionPairs, get_pairing
from ..rollouts.pairs import pair_metrics
from ..rollouts.subset import draw_examples
from ..runs.checks import check_train_cfg
from ..schedulers import gaussian_kl, sde_step_indices
from ..seeding import seeded_generator
from .rollout_trainer import RolloutTrainer
from .tapo_config import TAPOConfig


logger = logging.get_logger(__name__)

FAR = 0.1
"""KL divergence per dimension and step of a policy that has moved far."""
MAX_LOGIT_NOISE = 10.0


class TAPOTrainer(RolloutTrainer):
    r"""
    Trainer for Trajectory Advantages Preference Optimization (TAPO).

    Every update samples a winning and a losing trajectory for each prompt. At n of the T sampling steps, P stochastic
    candidates are drawn, and the best and the worst are kept (Algorithm 1). The policy trains on these pairs with a
    step-wise DPO loss (Eq. 13).

    Example:

    ```python
    from tapo_trl import TAPOConfig, TAPOTrainer

    trainer = TAPOTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward_model="my-name/sd35-slrm",
        args=TAPOConfig(output_dir="sd35-tapo"),
    )
    trainer.train()
    ```

    Args:
        model (`str`, [`~diffusers.DiffusionPipeline`] or [`FlowPolicy`]):
            Hub id or folder of a pipeline, a pipeline, or a policy.
        reward_model (`str`, [`StepRewardModel`], `Callable` or a `list` of those):
            - `str`: Hub id or folder of a [`StepRewardModel`], such as an [`SLRMModel`]; or the name of a pretrained scorer of
              images or videos, such as `"pickscore"`, see [`get_reward`].
            - [`StepRewardModel`]: scores the noisy latents, or (an [`SPMModel`]) what they would become.
            - `Callable`: `f(images, prompts, **columns) -> scores`, with images as a float tensor in [0, 1] of shape
              `(N, 3, height, width)`, or `(N, 3, num_frames, height, width)` for video. It is applied to the decoded
              one-step estimate of the clean sample.
            - `list`: a weighted sum of them, see `args.reward_weights`.
        args ([`TAPOConfig`], *optional*):
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

    config_class = TAPOConfig
    rollout_class = TrajectoryPairs
    has_stochastic_steps = True
    method_card = PAIRINGS["tapo"].card
    _seed_name = "tapo"
    _card_metrics = ("reward", "eval_", "kl")
    _card_options = (
        "pairing",
        "continue_with",
        "pair_threshold",
        "beta",
        "loss_type",
        "num_inference_steps",
        "num_sde_steps",
        "num_candidates",
        "noise_level",
        "sde_type",
        "guidance_scale",
        "velocity_target",
        "score_estimates",
        "reward_min_sigma",
        "reward_max_sigma",
        "pairs_per_update",
    )

    def _check_options(self, args: TAPOConfig, peft_config: PeftConfig | None) -> None:
        super()._check_options(args, peft_config)
        self.method_card = PAIRINGS[args.pairing].card
        self._range_weights(args)

    def _build_network(self, args: TAPOConfig, peft_config: PeftConfig | None) -> torch.nn.Module:
        check_train_cfg(args, self.policy)
        network = super()._build_network(args, peft_config)
        self.reward.weights = self._range_weights(args) or self.reward.weights
        return network

    # Rollout: Algorithm 1, lines 2-13

    def build_sampler(self, **kwargs) -> TAPOSampler:
        args = self.args
        self.scheduler = self.stochastic_scheduler()
        indices = sde_step_indices(args.num_inference_steps, args.num_sde_steps, args.t_init)
        self.step_indices = self.stochastic_steps(indices)
        pairing = get_pairing(args.pairing, args.continue_with, args.pair_threshold, args.consistent_pairs)
        pairing.check_number(args.pairs_per_update, len(self.step_indices))  # the steps of the trained `expert`
        self._check_rewarded()
        self.step_weights = self._step_weights()
        self._warn_of_saturation()
        return TAPOSampler(
            scheduler=self.scheduler,
            step_indices=self.step_indices,
            num_candidates=args.num_candidates,
            pairing=pairing,
            reference=self.reference,
            score_batch_size=args.score_batch_size,
            keep_candidate_means=args.center_log_ratios,
            **kwargs,
        )

    def _range_weights(self, args: TAPOConfig) -> list[RangeWeight] | None:
        """Weights of the reward models by noise level, `None` without `reward_min_sigma` and `reward_max_sigma`."""
        count = len(self._reward_models)
        given = {name: getattr(args, name) for name in ("reward_min_sigma", "reward_max_sigma")}
        given = {name: values for name, values in given.items() if values is not None}
        if not given:
            return None
        for name, values in given.items():
            if len(values) != count:
                raise ValueError(f"`{name}` has {len(values)} entries for {count} reward models.")
        weights, low = args.reward_weights or [1.0] * count, args.reward_min_sigma or [0.0] * count
        high = args.reward_max_sigma or [math.inf] * count
        ranges = [RangeWeight(*values) for values in zip(weights, low, high, strict=True)]
        for weight in ranges:
            if not weight.min_sigma < weight.max_sigma:
                raise ValueError(
                    f"A reward model that counts from `reward_min_sigma` {weight.min_sigma:g} on and below `reward_max_sigma` "
                    f"{weight.max_sigma:g} never does: swap them, or leave it out."
                )
        return ranges

    def _check_rewarded(self) -> None:
        sigmas = {index: self.scheduler.sigmas[index + 1].item() for index in self.step_indices}
        for index, sigma in sigmas.items():
            if not any(self.reward.weights_at(sigma)):
                raise ValueError(
                    f"No reward model counts for the candidates of step {index}, at sigma {sigma:.3f}: change `reward_weights`, "
                    f"`reward_min_sigma` or `reward_max_sigma`. The candidates are at {[round(other, 3) for other in sigmas.values()]}."
                )

    def _warn_of_saturation(self) -> None:
        """Say that the sigmoid will saturate long before the policy has moved far, which `beta` decides with the size."""
        args, num_dims = self.args, math.prod(self.latent_shape)
        if (args.loss_type, args.logprob_reduction) != ("sigmoid", "mean") or args.process_index != 0:
            return
        beta = transferred_beta(args.beta, num_dims, args.beta_reference_dim)
        noise = logit_noise(beta, num_dims, kl=FAR)
        if noise > MAX_LOGIT_NOISE:
            logger.warning(
                f"`beta={beta:g}` is large for latents of {num_dims} dimensions: at a KL divergence of {FAR} per dimension, the noise "
                f"of a pair's logit is {noise:.0f}, and most pairs have no gradient or all of it, whatever the reward says. The "
                f"paper's 1000 is for 65,536 dimensions, where it is 2.5. `beta_reference_dim=65536` scales it by the size. See "
                "`logits/std` and `logits/saturated` in the logs."
            )

    def _step_weights(self) -> torch.Tensor:
        """Weight of each of the T steps in the loss, `step_weighting`, with mean 1 over the stochastic ones."""
        weights = torch.ones(self.args.num_inference_steps)
        if self.args.step_weighting == "velocity":
            # The mean of a step is linear in the velocity: the log-ratio's gradient is its slope over the std.
            steps = torch.tensor(self.step_indices)
            zeros = torch.zeros(len(steps), 1, device=self.accelerator.device)
            offset, std = self.scheduler.sde_mean_std(zeros, zeros, steps)
            slope = self.scheduler.sde_mean_std(zeros, zeros + 1, steps)[0] - offset
            inverse = (std / slope.abs()).flatten().cpu()
            weights[steps] = inverse / inverse.mean()
        return weights

    def _rollout_of_step(self, batch: list[dict[str, Any]]) -> TrajectoryPairs:
        rollout, args = super()._rollout_of_step(batch), self.args
        if args.pairs_per_update is None:
            return rollout
        keys = [(args.seed, self.state.global_step, row[ROW_COLUMN]) for row in batch]
        return draw_examples(rollout, args.pairs_per_update, [seeded_generator("tapo, pairs", *key) for key in keys])

    def rollout_metrics(self, rollout: TrajectoryPairs) -> dict[str, torch.Tensor]:
        return pair_metrics(rollout)

    # Loss: Eq. 13

    def transition_losses(
        self, model: torch.nn.Module, inputs: TransitionPairs
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """
        Losses of transition pairs. Nothing is logged, and the trainer stays as it is.

        Args:
            model (`torch.nn.Module`): the policy's network.
            inputs ([`TransitionPairs`]): the pairs, on the device of the training.

        Returns:
            `tuple`: losses of shape `(num_pairs,)`; the same with all that the training loss adds, the weights of pairs
            and of steps and the KL term; and metrics of shape `(num_pairs,)` each.
        """
        latents = inputs.latents.flatten(0, 1)
        indices = inputs.step_indices.repeat(inputs.num_parents)
        embeds = inputs.prompt_embeds.repeat(inputs.num_parents)
        sigma = self.scheduler.sigma(indices.to(self.scheduler.sigmas.device))
        guidance_scale = self.args.guidance_scale
        if not self.args.train_cfg:
            guidance_scale = self.policy.unguided(guidance_scale)
        arguments = (latents, sigma, embeds, self.negative_prompt_embeds, guidance_scale)

        # One forward each for the parents of both sides, [win; lose]
        with self.timer.stage("policy, training", latents=len(latents)):
            velocity = self.policy.velocity(model, *arguments)
        ref_velocity = self.reference_velocity(inputs, *arguments)

        mean, std = self.scheduler.sde_mean_std(latents, velocity, indices)
        ref_mean, _ = self.scheduler.sde_mean_std(latents, ref_velocity, indices)
        kl = gaussian_kl(mean, ref_mean, std, self.args.logprob_reduction).view(inputs.num_parents, -1).mean(0)
        mean, ref_mean, std = map(inputs.of_both_sides, (mean, ref_mean, std))
        log_ratios = self.scheduler.log_ratio(inputs.next_latents.flatten(0, 1), mean, ref_mean, std)
        beta = transferred_beta(self.args.beta, latents[0].numel(), self.args.beta_reference_dim)
        of_parents = {}
        if (
            inputs.candidate_means is not None
        ):  # the log-ratio is linear in x': that of the mean is the mean of all candidates'
            mean_log_ratios = self.scheduler.log_ratio(inputs.candidate_means.flatten(0, 1), mean, ref_mean, std)
            log_ratios = log_ratios - mean_log_ratios
            win, lose = mean_log_ratios.detach().chunk(2)
            of_parents["logits/parents"] = beta * (win - lose).abs()
        chosen_log_ratios, rejected_log_ratios = log_ratios.chunk(2)
        losses, metrics = tapo_loss(
            chosen_log_ratios,
            rejected_log_ratios,
            beta=beta,
            loss_type=self.args.loss_type,
            label_smoothing=self.args.label_smoothing,
            ratio_clip=self.args.ratio_clip,
        )
        weights = self.step_weights[inputs.step_indices].to(losses.device) * inputs.weights
        weighted_losses = weights * (losses + self.args.kl_coef * kl)
        return losses, weighted_losses, metrics | of_parents | {"kl": kl.detach()}

    def step_metrics(self, losses: torch.Tensor, metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            "loss": losses.detach(),
            "accuracy": metrics["rewards/accuracies"],
            "margin": metrics["rewards/margins"],
        }
