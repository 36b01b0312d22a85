# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from transformers import EvalPrediction, TrainerCallback, set_seed
from trl import RewardTrainer
from trl.models import get_act_offloading_ctx_manager
from trl.trainer.utils import disable_dropout_in_model

from ..callbacks.base import PolicyCallback
from ..data.preferences import TIE
from ..losses import slrm_loss, thurstone_loss
from ..metrics.pair_scores import evaluation_noise
from ..metrics.preference_accuracy import pair_accuracies
from ..moved import moved_names
from ..policies import FlowPolicy
from ..rewards import SLRMModel, StepRewardModel
from ..rewards.slrm import SLRMOutput, enhanced_log_score, log_score, score_distance
from ..rewards.targets import training_targets
from ..schedulers.noise_levels import draw_uniform_or_logit_normal
from ..seeding import seeded_generator
from .base import COMMON_OPTIONS
from .policy_setup import check_peft_config, make_config_trackable
from .preference_trainer import PreferenceTrainer, loss_description
from .slrm_config import SLRM_FIELDS, SLRMConfig
from .slrm_loading import check_engine, load_base_and_reward_model


class SLRMTrainer(PreferenceTrainer, RewardTrainer):
    r"""
    Trainer for the Score-based Latent Reward Model (SLRM), which scores noisy latents, and for related reward models
    (`args.reward_model_type`).

    Both sides of a preference pair are noised to the same level, x_t = (1 - t) x_0 + t x_1, and scored in one forward
    pass. The loss is Bradley-Terry on the scores (Eq. 9; SLRM uses enhanced scores), unless `args.loss_type` says
    otherwise.

    Example:

    ```python
    from datasets import load_dataset
    from tapo_trl import SLRMConfig, SLRMTrainer

    trainer = SLRMTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        args=SLRMConfig("sd35-slrm", resolution=512),
        train_dataset=load_dataset("my-name/pairs", split="train"),  # columns: prompt, chosen, rejected
    )
    trainer.train()
    ```

    Args:
        model (`str`, [`~diffusers.DiffusionPipeline`], [`FlowPolicy`] or [`StepRewardModel`]):
            - `str`: Hub id or folder of a diffusers pipeline, or of a reward model, whose training goes on.
            - [`~diffusers.DiffusionPipeline`] or [`FlowPolicy`]: its transformer is copied; it is not trained itself.
            - [`StepRewardModel`]: its base model is loaded by the name in its configuration.
        args ([`SLRMConfig`], *optional*):
            Configuration. Defaults to one with a folder named after the model.
        train_dataset ([`~datasets.Dataset`]):
            Preference pairs with columns `prompt`, `chosen`, `rejected`, and optionally `margin`, `label` and
            `label_<dimension>`, see [`~data.preferences.prepare_preference_dataset`].
        eval_dataset ([`~datasets.Dataset`] or `dict` of those, *optional*):
            Held-out pairs.
        compute_metrics (`Callable`, *optional*):
            Further metrics. `predictions` are the scores of shape `(number of pairs, 2)`, chosen first, averaged over
            `args.eval_sigmas`.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning rate scheduler.
        peft_config ([`~peft.LoraConfig`], *optional*):
            LoRA of the backbone, beside which the score stream, the head or the modulation is trained in full.
            `target_modules` defaults to the attention projections. Without it the whole model is trained.
    """

    config_class = SLRMConfig
    method_card = SLRMModel.card
    _template_file = "slrm_model_card.md"
    _card_metrics = ("accuracy", "eval_")

    def __init__(
        self,
        model: str | DiffusionPipeline | FlowPolicy | StepRewardModel,
        args: SLRMConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: LoraConfig | None = None,
    ):
        self._compute_metrics = compute_metrics
        super().__init__(model, args, train_dataset, eval_dataset, callbacks, optimizers, peft_config)

    def _check_options(self, args: SLRMConfig, peft_config: LoraConfig | None) -> None:
        check_peft_config(peft_config, has_reference=False)
        if args.freeze_backbone and peft_config is not None:
            raise ValueError("`freeze_backbone=True` and `peft_config` exclude each other: set one of them.")

    def _check_callback(self, callback: TrainerCallback) -> None:
        if isinstance(callback, PolicyCallback):
            raise ValueError(
                f"`{type(callback).__name__}` is for trainers of a policy, but `SLRMTrainer` trains a reward model: leave it out."
            )

    def _load_policy(self, model: Any, args: SLRMConfig, peft_config: LoraConfig | None) -> FlowPolicy:
        set_seed(args.seed)  # what is beside the backbone starts at random
        policy, self._reward_model = load_base_and_reward_model(model, args, peft_config)
        self._reward_model_class = type(self._reward_model)
        self.method_card = self._reward_model_class.card
        return policy

    def _build_network(self, args: SLRMConfig, peft_config: LoraConfig | None) -> StepRewardModel:
        model = self._reward_model
        check_engine(model, args)
        recorded = ("rho", "score_link", "enhancement", "velocity_target") if model.uses_velocity_target else ()
        for name in (*recorded, "max_sequence_length", "resolution", "height", "width", "num_frames"):
            model.register_to_config(**{name: getattr(args, name)})
        model.register_to_config(trained=True)
        if peft_config is not None:
            if peft_config.target_modules is None:
                peft_config.target_modules = model.lora_target_modules(self.policy)
            model.add_lora(peft_config)
        elif not model.config.lora:
            model.train_whole()
            if args.freeze_backbone:
                model.freeze_backbone()
        make_config_trackable(model)
        if args.disable_dropout:
            disable_dropout_in_model(model)
        return model

    def _release_encoders(self, model: Any, args: SLRMConfig) -> None:
        self.policy.move_text_encoders("cpu")
        if args.cache_latents and not self._reward_model.scores_x0_prediction:
            self.policy.vae.to("cpu")

    def _set_up(self) -> None:
        """What `RewardTrainer.__init__` sets up for its methods, and the base model, if it is compared with."""
        self.label_names = []
        if self.args.activation_offloading:
            self.maybe_activation_offload_context = get_act_offloading_ctx_manager(self.model, warn_if_no_head=False)
        else:
            self.maybe_activation_offload_context = contextlib.nullcontext()
        self.base_model = self.policy.transformer
        rules = (self.args.velocity_target, *self.args.eval_rules)
        if self.model.scores_x0_prediction or (self.model.uses_velocity_target and "reference" in rules):
            self.base_model.to(self.accelerator.device).eval()

    # Loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if self.model.training:
            sigma, noise = self._draw_noise(inputs["row"].tolist(), inputs["chosen_latents"].shape[1:])
            losses, scores = self._pair_loss(model, inputs, sigma, noise)
            self.nonfinite_guard.watch(losses, loss_description(inputs, sigma), inputs["prompt"])
        else:
            # The same noise in every evaluation, at each of `eval_sigmas`
            noise = evaluation_noise(inputs["row"].tolist(), self.latent_shape, self.args.seed)
            noise = torch.cat([noise, noise]).to(self.accelerator.device)
            levels = [torch.full_like(inputs["label"], sigma) for sigma in self.args.eval_sigmas]
            results = [self._pair_loss(model, inputs, sigma, noise) for sigma in levels]
            losses, scores = (torch.stack(parts).mean(dim=0) for parts in zip(*results, strict=True))
        loss = self.nonfinite_guard.mark(losses.mean()) if self.model.training else self._mean_of_real_rows(losses)
        return (loss, {"rewards": scores}) if return_outputs else loss

    def _draw_noise(self, rows: list[int], shape: tuple[int, ...] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Noise levels `(batch_size,)` and noise `(2 * batch_size, *shape)`, chosen first. They depend on the
        seed, the step and the row of the dataset alone: not on the number of processes, nor on whether the run was
        resumed.
        """
        shape = shape or self.latent_shape
        sigmas, chosen_noise, rejected_noise = [], [], []
        for row in rows:
            generator = seeded_generator("slrm", self.args.seed, self.state.global_step, row)
            sigmas.append(draw_uniform_or_logit_normal(self.args.timestep_sampling, generator))
            noise = torch.randn(shape, generator=generator)
            chosen_noise.append(noise)
            other = noise if self.args.shared_noise else torch.randn(shape, generator=generator)
            rejected_noise.append(other)
        device = self.accelerator.device
        return torch.cat(sigmas).to(device), torch.stack(chosen_noise + rejected_noise).to(device)

    def _pair_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], sigma: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses `(batch_size,)` and scores `(batch_size, 2)` of the pairs at noise levels `sigma`."""
        args, mode = self.args, "train" if self.model.training else "eval"
        labels, embeds = inputs["label"], inputs["prompt_embeds"].repeat(2)

        # Both sides of the pairs in one forward, the chosen ones first
        clean = torch.cat([inputs["chosen_latents"], inputs["rejected_latents"]])
        sigmas = sigma.repeat(2)
        broadcast = sigmas.view(-1, *[1] * (clean.ndim - 1))
        noisy = (1 - broadcast) * clean + broadcast * noise
        velocity = noise - clean
        with self.accelerator.autocast():  # as the model's own forward
            read = self.model.forward_inputs(self.policy, noisy, sigmas, inputs["prompt"] * 2, embeds)
        # By name: DeepSpeed casts what is passed by position to float16, in which noise levels collapse
        output = model(**read)

        own_rule = args.velocity_target if self.model.uses_velocity_target else "none"
        rules = {own_rule} if mode == "train" else {own_rule, *args.eval_rules}
        with self.accelerator.autocast():  # as the model's own forward
            targets = training_targets(sorted(rules), self.policy, self.base_model, noisy, velocity, sigmas, embeds)
        if self.model.uses_velocity_target:
            scores, penalty, velocity_metrics = self._enhanced_scores(output, targets[own_rule], velocity, sigmas)
        else:
            scores, penalty, velocity_metrics = output.logits, 0.0, {}
        chosen, rejected = scores.chunk(2)

        smoothing = torch.where(labels == TIE, TIE, args.label_smoothing)
        if args.loss_type == "thurstone":
            losses, metrics = thurstone_loss(chosen, rejected, sigma, inputs.get("margin"), smoothing)
        else:  # Eq. 9
            losses, metrics = slrm_loss(chosen, rejected, args.eta, inputs.get("margin"), smoothing)
        losses = losses + penalty
        if args.center_rewards_coefficient is not None:
            losses = losses + args.center_rewards_coefficient * (chosen + rejected).square()

        metrics = {
            "accuracy": pair_accuracies(chosen - rejected, labels),
            "margin": metrics["margin"],
            **velocity_metrics,
        }
        if mode == "eval":
            for rule in args.eval_rules:
                values = self.model.score_output(output, sigmas, targets[rule])
                margins = torch.sub(*values.chunk(2))
                metrics[f"accuracy_{rule}/sigma_{sigma[0].item():.3g}"] = pair_accuracies(margins, labels)
        scores = torch.stack([chosen, rejected], dim=1).detach()
        self._record_pairs(metrics, labels)
        everyones = self._gather(scores)
        self._record({"min_reward": everyones.min(), "mean_reward": everyones.mean(), "max_reward": everyones.max()})
        return losses, torch.stack([chosen, rejected], dim=1)

    def _enhanced_scores(
        self, output: SLRMOutput, target: torch.Tensor | None, velocity: torch.Tensor, sigmas: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Of an SLRM: scores by Eq. 7 and 8, the term that is added to the loss of each pair, and metrics of each pair."""
        args = self.args
        if target is None:
            distance = torch.zeros_like(output.logits)
            scores = log_score(output.logits, args.score_link)
        else:
            distance = score_distance(output.velocity, target)
            enhancing = distance.detach() if args.detach_score else distance
            scores = enhanced_log_score(output.logits, enhancing, sigmas, args.rho, args.score_link, args.enhancement)
        preservation, _ = score_distance(output.velocity, velocity).chunk(2)  # flow matching on the chosen ones
        chosen_distance, rejected_distance = distance.chunk(2)
        metrics = {
            "score_distance/chosen": chosen_distance,
            "score_distance/rejected": rejected_distance,
            "score_preservation_loss": preservation,
        }
        return scores, args.score_preservation_coef * preservation, metrics

    # Saving and loading

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        self.model.save_pretrained(output_dir, state_dict=state_dict)
        self.create_model_card()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.model.load_trained_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self.model.load_trained_weights(self.state.best_model_checkpoint)

    @property
    def _base_model_name(self) -> str:
        return self.model.config.base_model_name_or_path

    def _method_table(self) -> dict[str, Any]:
        args, config = self.args, self.model.config
        table = {name: config[name] for name in (*args.model_config(), "lora")}
        table |= {name: Path(value).name for name, value in table.items() if Path(str(value)).is_dir()}  # no path
        names = (
            "reward_model_type",
            "loss_type",
            *(SLRM_FIELDS if self.model.uses_velocity_target else ()),
            "eta",
            "freeze_backbone",
            "timestep_sampling",
            "dimension_weights",
            *COMMON_OPTIONS,
        )
        return table | {name: getattr(args, name) for name in names}


__getattr__ = moved_names(__name__)
