# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import math
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig
from transformers import TrainerCallback

from ..callbacks.reward_guard import RewardHackingGuardCallback
from ..data.columns import Splits, column_values
from ..data.inversions import InversionCache
from ..data.pair_tables import SCORES
from ..data.preferences import TIE
from ..losses import diffusion_dpo_loss, rare_pair_weights, transferred_beta, velocity_error_change
from ..method_card import MethodCard
from ..metrics.pair_scores import evaluation_noise
from ..runs.checks import autocast_dtype, check_without_effect
from ..schedulers.noise_levels import draw_uniform_or_logit_normal, training_sigmas
from ..seeding import seeded_generator
from .diffusion_dpo_config import DiffusionDPOConfig
from .policy_setup import trained_levels
from .preference_trainer import PreferenceTrainer, loss_description


VARIANT_CARDS = {
    "diffusion_dpo": MethodCard(
        name="Diffusion-DPO",
        tags=("diffusion-dpo",),
        paper="wallace2024diffusion",
        title="**Diffusion-DPO**",
        text="Both sides of a preference pair are noised to the same level. The policy is trained to predict the velocity of the "
        "preferred side better than the base model does, and that of the other side worse.",
        from_pairs=True,
    ),
    "inversion_dpo": MethodCard(
        name="Inversion-DPO",
        tags=("diffusion-dpo", "inversion-dpo"),
        paper="li2025inversion",
        title="**Diffusion-DPO** in its variant **Inversion-DPO**",
        text="Both sides of a preference pair are inverted to noise with the velocity of the base model. The policy is trained to "
        "predict the velocity on the trajectory of the preferred side better than the base model does, and that on the "
        "other trajectory worse.",
        from_pairs=True,
    ),
    "dense_reward": MethodCard(
        name="DenseReward",
        tags=("diffusion-dpo", "dense-reward"),
        paper="yang2024dense",
        title="**Diffusion-DPO** in its variant **DenseReward**",
        text="Both sides of a preference pair are noised to a sampling step, which is an early one with higher probability. "
        "The policy is trained to predict the velocity of the preferred side better than the base model does, and that of the "
        "other side worse.",
        from_pairs=True,
    ),
    "video_dpo": MethodCard(
        name="VideoDPO",
        tags=("diffusion-dpo", "video-dpo"),
        paper="liu2025videodpo",
        title="**Diffusion-DPO** with the re-weighted pairs of **VideoDPO**",
        text="Both sides of a preference pair are noised to the same level. The policy is trained to predict the velocity of the "
        "preferred side better than the base model does, and that of the other side worse. Pairs whose scores are rare have a "
        "larger weight.",
        from_pairs=True,
    ),
}


def weights_of_pairs(dataset: Dataset, args: DiffusionDPOConfig) -> torch.Tensor:
    """
    Weights of the pairs in each row of a dataset, for `variant="video_dpo"`.

    Args:
        dataset ([`~datasets.Dataset`]): with the columns `chosen_score` and `rejected_score`, or `weight`.
        args ([`DiffusionDPOConfig`]): the configuration.

    Returns:
        `torch.Tensor` of shape `(num_rows,)`.

    Raises:
        ValueError: if the columns are missing, or hold anything else than finite numbers, or weights below 0.
    """
    found = dataset.column_names if isinstance(dataset, Dataset) else []
    columns = ("weight",) if "weight" in found else SCORES
    if not set(columns) <= set(found):
        raise ValueError(
            f'`variant="video_dpo"` needs the columns `chosen_score` and `rejected_score`, or `weight`, in `train_dataset`, which has '
            f"{found}."
        )
    values = [torch.tensor(np.array(column_values(dataset, column), dtype=np.float64)) for column in columns]
    if not all(value.isfinite().all() for value in values) or (len(columns) == 1 and (values[0] < 0).any()):
        raise ValueError(
            f"The columns {list(columns)} of `train_dataset` must hold finite numbers, and weights at least 0."
        )
    if len(columns) == 1:
        names = ["pair_weight_alpha", "score_bin_width"]
        check_without_effect(args, names, "with the column `weight`, since it is for scores")
        return values[0]
    return rare_pair_weights(*values, args.pair_weight_alpha, args.score_bin_width)


class DiffusionDPOTrainer(PreferenceTrainer):
    r"""
    Trainer for Diffusion-DPO, which aligns a flow-matching policy with pairs that were collected beforehand.

    Both sides of a pair are noised, and the policy learns to predict the velocity of the chosen one better than the
    reference does, and that of the rejected one worse. `args.variant` selects the noisy latents: latents at random
    noise levels (Diffusion-DPO), latents of inverted trajectories (Inversion-DPO), or latents at sampling steps that
    are drawn with higher probability the earlier they are (DenseReward). With VideoDPO, pairs have weights.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from tapo_trl import DiffusionDPOConfig, DiffusionDPOTrainer

    trainer = DiffusionDPOTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        args=DiffusionDPOConfig("sd35-dpo", resolution=512),
        train_dataset=load_dataset("my-name/pairs", split="train"),  # columns: prompt, chosen, rejected
        peft_config=LoraConfig(r=64, lora_alpha=64, init_lora_weights="gaussian"),
    )
    trainer.train()
    ```

    Args:
        model (`str`, [`~diffusers.DiffusionPipeline`] or [`FlowPolicy`]):
            Hub id or folder of a pipeline, a pipeline, or a policy.
        args ([`DiffusionDPOConfig`], *optional*):
            Configuration. Defaults to one with a folder named after the model.
        train_dataset ([`~datasets.Dataset`]):
            Preference pairs with columns `prompt`, `chosen`, `rejected`, and optionally `margin`, `label` and
            `label_<dimension>`, see [`~data.preferences.prepare_preference_dataset`]. `variant="video_dpo"` needs `chosen_score` and
            `rejected_score`, or `weight`.
        eval_dataset ([`~datasets.Dataset`] or `dict` of those, *optional*):
            Held-out pairs.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Callbacks. Those that are a [`PolicyCallback`] get the trainer and have their prompts encoded.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning rate scheduler.
        peft_config ([`~peft.PeftConfig`], *optional*):
            LoRA configuration. `target_modules` defaults to the policy's. Without it the transformer is fully
            fine-tuned, in float32 whatever precision it comes in, and a frozen copy of it is the reference.
    """

    config_class = DiffusionDPOConfig
    method_card = VARIANT_CARDS["diffusion_dpo"]
    _card_metrics = ("rewards/", "error/", "eval_")
    _card_options = (
        "variant",
        "beta",
        "label_smoothing",
        "timestep_sampling",
        "gamma",
        "pair_weight_alpha",
        "num_inference_steps",
        "dimension_weights",
    )

    def _check_options(self, args: DiffusionDPOConfig, peft_config: PeftConfig | None) -> None:
        super()._check_options(args, peft_config)
        self.method_card = VARIANT_CARDS[args.variant]

    def _check_callback(self, callback: TrainerCallback) -> None:
        if isinstance(callback, RewardHackingGuardCallback):
            raise ValueError(
                "`RewardHackingGuardCallback` compares a held-out reward with the training reward, which Diffusion-DPO does "
                "not have. Watch samples with `SampleGridCallback`, or held-out pairs with `eval_dataset`."
            )

    def _check_datasets(
        self, args: DiffusionDPOConfig, train_dataset: Dataset | None, eval_dataset: Splits
    ) -> tuple[Dataset, Splits]:
        train_dataset, eval_dataset = super()._check_datasets(args, train_dataset, eval_dataset)
        if args.variant == "video_dpo":
            self.pair_weights = weights_of_pairs(train_dataset, args)
        return train_dataset, eval_dataset

    def _build_network(self, args: DiffusionDPOConfig, peft_config: PeftConfig | None) -> torch.nn.Module:
        self.inversion_cache = None
        if args.cache_inversions:  # by the weights of the reference, which are those of the policy for now
            precision = autocast_dtype(args)
            self.inversion_cache = InversionCache(
                self.policy,
                args.cache_dir,
                args.num_inference_steps,
                (precision,),
                max_sequence_length=args.max_sequence_length,
                embeds_dtype=precision,
            )
        return super()._build_network(args, peft_config)

    def _encode_datasets(
        self, args: DiffusionDPOConfig, train_dataset: Dataset, eval_dataset: Splits, prompts: list[str]
    ) -> tuple[Dataset, Splits]:
        return super()._encode_datasets(args, train_dataset, eval_dataset, [args.negative_prompt, *prompts])

    def _set_up(self) -> None:
        """Noise levels of the training, from noise to data, and how likely each is."""
        super()._set_up()
        args, by_position = self.args, self._draws_positions
        sigmas = self._noise_levels(self.latent_shape)
        levels = trained_levels(self.policy, sigmas)
        self.sigmas = sigmas[levels] if by_position else sigmas
        gamma = args.gamma if args.variant == "dense_reward" else 1.0
        self.step_probabilities = torch.softmax(torch.arange(len(sigmas)) * math.log(gamma), dim=0) * levels
        steps = torch.arange(len(self.sigmas)) if by_position else levels.nonzero()[:, 0]
        nearest = {steps[(self.sigmas[steps] - sigma).abs().argmin()].item() for sigma in args.eval_sigmas}
        self.eval_steps = sorted(nearest)  # from the noise on, so that one inversion serves all

    # Noisy latents

    @property
    def _draws_positions(self) -> bool:
        """Whether noise levels are drawn from all of the pipeline's, or from those of the sampling steps by `step_probabilities`."""
        return self.args.variant in ("diffusion_dpo", "video_dpo")

    def _noise_levels(self, latent_shape: tuple[int, ...]) -> torch.Tensor:
        """Those of latents of a shape, on which the shift of some families depends."""
        scheduler = self.policy.build_scheduler(self.args.num_inference_steps, latent_shape)
        return training_sigmas(scheduler) if self._draws_positions else scheduler.sigmas[:-1]

    def _draw(self, rows: list[int], shape: tuple[int, ...] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Steps `(batch_size,)` and noise `(batch_size, *shape)`, on the CPU. They depend on the seed, the update and
        the row of the dataset alone: not on the number of processes, nor on whether the run was resumed.
        """
        steps, noise = [], []
        for row in rows:
            generator = seeded_generator("diffusion_dpo", self.args.seed, self.state.global_step, row)
            if self._draws_positions:
                position = draw_uniform_or_logit_normal(self.args.timestep_sampling, generator)
                steps.append((position * len(self.sigmas)).long())
            else:
                steps.append(torch.multinomial(self.step_probabilities, 1, generator=generator))
            noise.append(torch.randn(shape or self.latent_shape, generator=generator))
        return torch.cat(steps), torch.stack(noise)

    def _noisy_latents(
        self, inputs: dict[str, Any], steps: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy latents, their velocities and their noise levels at `steps`, of [chosen; rejected]."""
        clean = torch.cat([inputs["chosen_latents"], inputs["rejected_latents"]])
        steps = steps.repeat(2)
        sigmas = self.sigmas if self._draws_positions else self._noise_levels(tuple(clean.shape[1:]))
        sigma = sigmas[steps].to(clean.device)
        broadcast = sigma.view(-1, *[1] * (clean.ndim - 1))
        if self.args.variant == "inversion_dpo":
            first_index, trajectory = self._inverted(inputs, clean, steps.min().item())
            noisy = trajectory[steps - first_index, torch.arange(len(clean))]
            return noisy, (noisy - clean) / broadcast, sigma
        noise = noise.repeat(2, *[1] * (clean.ndim - 1)).to(clean.device)
        return (1 - broadcast) * clean + broadcast * noise, noise - clean, sigma

    @torch.no_grad()
    def _inverted(self, inputs: dict[str, Any], clean: torch.Tensor, first_index: int) -> tuple[int, torch.Tensor]:
        """
        Index of the first step, and the trajectories from there on. They are kept in `inputs`, for a first index that is
        not lower.
        """
        if "inverted" not in inputs:
            prompts, cache = inputs["prompt"] * 2, self.inversion_cache
            first_index = first_index if cache is None else 0
            trajectory = None if cache is None else cache.load(prompts, clean)
            # As many forwards on every process: they are collective where weights are sharded
            state = torch.tensor([[first_index, trajectory is not None]], device=clean.device)
            first_index, everyone_has_it = self.accelerator.gather(state).amin(0).tolist()
            if not everyone_has_it:
                with self.reference(self.model) as reference:
                    trajectory = self.policy.invert(
                        reference,
                        clean,
                        inputs["prompt_embeds"].repeat(2),
                        num_inference_steps=self.args.num_inference_steps,
                        first_index=first_index,
                    )
                if cache is not None:
                    cache.save(prompts, clean, trajectory)
            inputs["inverted"] = first_index, trajectory
        return inputs["inverted"]

    # Loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        rows = inputs["row"].tolist()
        if self.model.training:
            steps, noise = self._draw(rows, inputs["chosen_latents"].shape[1:])
            losses, metrics = self._pair_losses(model, inputs, steps, noise)
            self.nonfinite_guard.watch(losses, loss_description(inputs, self.sigmas[steps]), inputs["prompt"])
            if self.args.variant == "video_dpo":
                losses = losses * self.pair_weights[rows].to(losses)
            loss = self.nonfinite_guard.mark(losses.mean())
        else:
            # The same noise in every evaluation, at each of `eval_steps`
            noise = evaluation_noise(rows, self.latent_shape, self.args.seed)
            levels = [torch.full((len(rows),), step) for step in self.eval_steps]
            results = [self._pair_losses(model, inputs, steps, noise) for steps in levels]
            loss = torch.stack([self._mean_of_real_rows(losses) for losses, _ in results]).mean()
            metrics = {name: torch.stack([values[name] for _, values in results]).mean(0) for name in results[0][1]}
        return (loss, metrics) if return_outputs else loss

    def _pair_losses(
        self, model: torch.nn.Module, inputs: dict[str, Any], steps: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Losses and metrics of each pair, of shape `(batch_size,)`, at `steps`."""
        noisy, target, sigma = self._noisy_latents(inputs, steps, noise)
        embeds = inputs["prompt_embeds"].repeat(2)

        # [chosen; rejected] in one forward each, without guidance
        velocity = self.policy.velocity(model, noisy, sigma, embeds)
        with torch.no_grad(), self.reference(self.model) as reference:
            ref_velocity = self.policy.velocity(reference, noisy, sigma, embeds)

        chosen, rejected = velocity_error_change(velocity, ref_velocity, target).chunk(2)
        labels = inputs["label"]
        losses, metrics = diffusion_dpo_loss(
            chosen,
            rejected,
            beta=transferred_beta(self.args.beta, noisy[0].numel(), self.args.beta_reference_dim),
            label_smoothing=torch.where(labels == TIE, TIE, self.args.label_smoothing),
            margin=inputs.get("margin"),
        )
        self._check_start(metrics["rewards/margins"])

        error = (velocity.detach() - target).square().flatten(1).mean(1)
        metrics["error/chosen"], metrics["error/rejected"] = error.chunk(2)
        by_level = {}
        if not self.model.training:
            by_level[f"rewards/accuracies/sigma_{self.sigmas[steps[0]].item():.2g}"] = metrics["rewards/accuracies"]
        self._record_pairs(metrics | by_level, labels)
        return losses, metrics

    # Trainer hooks

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Loss and rewards of held-out pairs, with the same noise at every evaluation."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None
