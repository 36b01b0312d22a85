# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from transformers import TrainerCallback

from ..callbacks.reward_guard import RewardHackingGuardCallback
from ..data.columns import Splits, named_splits
from ..data.samples import SampleCollator, check_sample_dataset, prepare_sample_dataset
from ..losses import flow_matching_loss
from ..method_card import MethodCard
from ..metrics.pair_scores import evaluation_noise
from ..schedulers.noise_levels import draw_uniform_or_logit_normal, training_sigmas
from ..seeding import seeded_generator
from .policy_setup import make_trainable, trained_levels
from .preference_trainer import PreferenceTrainer, loss_description
from .sft_config import DiffusionSFTConfig


class DiffusionSFTTrainer(PreferenceTrainer):
    r"""
    Trainer for supervised fine-tuning by flow matching on images or videos with prompts.

    It teaches a model a domain or a style from examples, and is a warm start for all preference trainers.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from tapo_trl import DiffusionSFTConfig, DiffusionSFTTrainer

    trainer = DiffusionSFTTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        args=DiffusionSFTConfig("sd35-sft", resolution=512),
        train_dataset=load_dataset("my-name/images", split="train"),  # columns: prompt, image
        peft_config=LoraConfig(r=64, lora_alpha=64, init_lora_weights="gaussian"),
    )
    trainer.train()
    ```

    Args:
        model (`str`, [`~diffusers.DiffusionPipeline`] or [`FlowPolicy`]):
            Hub id or folder of a diffusers pipeline, or a loaded one.
        args ([`DiffusionSFTConfig`], *optional*):
            Configuration. Defaults to one with a folder named after the model.
        train_dataset ([`~datasets.Dataset`]):
            Columns `prompt` and `image`, or `video` for a policy that makes videos, see
            [`~data.samples.prepare_sample_dataset`].
        eval_dataset ([`~datasets.Dataset`] or `dict` of those, *optional*):
            Held-out samples.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Callbacks. Those that are a [`PolicyCallback`] get the trainer and have their prompts encoded.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning rate scheduler.
        peft_config ([`~peft.PeftConfig`], *optional*):
            LoRA configuration. `target_modules` defaults to the policy's. Without it the transformer is fully
            fine-tuned, in float32 whatever precision it comes in.
    """

    config_class = DiffusionSFTConfig
    method_card = MethodCard(
        name="Diffusion-SFT",
        tags=("sft", "diffusion-sft"),
        paper="lipman2023flow",
        title="**supervised fine-tuning** with flow matching",
        text="Samples are noised to random levels, and the model is trained to predict the velocity from the sample to the noise.",
        from_samples=True,
    )
    _collator = SampleCollator()
    _card_metrics = ("loss", "eval_")
    _card_options = ("timestep_sampling", "prompt_dropout", "num_inference_steps", "guidance_scale")

    def _check_callback(self, callback: TrainerCallback) -> None:
        if isinstance(callback, RewardHackingGuardCallback):
            raise ValueError(
                "`RewardHackingGuardCallback` compares a held-out reward with the training reward, which supervised fine-tuning "
                "does not have. Watch samples with `SampleGridCallback`, or the loss of an `eval_dataset`."
            )

    def _build_network(self, args: DiffusionSFTConfig, peft_config: PeftConfig | None) -> torch.nn.Module:
        return make_trainable(self.policy, args, peft_config, has_reference=False)[0]

    # Data: one image or video per row

    def _check_datasets(
        self, args: DiffusionSFTConfig, train_dataset: Dataset | None, eval_dataset: Splits
    ) -> tuple[Dataset, Splits]:
        if train_dataset is None:
            raise ValueError("`train_dataset` is missing: give images or videos with prompts.")
        for name, split in {"train_dataset": train_dataset, **named_splits(eval_dataset)}.items():
            check_sample_dataset(split, name)
        return train_dataset, eval_dataset

    def _check_split(self, dataset: Dataset, args: DiffusionSFTConfig, name: str) -> None:
        check_sample_dataset(dataset, name, self.policy.modality)

    def _prepare_split(self, dataset: Dataset, args: DiffusionSFTConfig, name: str, **options: Any) -> Dataset:
        return prepare_sample_dataset(
            dataset, self.policy, args.height, args.width, args.num_frames, args.fps, name=name, **options
        )

    @property
    def _media_columns(self) -> tuple[str, ...]:
        return (self.policy.modality,)

    def _encode_datasets(
        self, args: DiffusionSFTConfig, train_dataset: Dataset, eval_dataset: Splits, prompts: list[str]
    ) -> tuple[Dataset, Splits]:
        return super()._encode_datasets(args, train_dataset, eval_dataset, [args.negative_prompt, *prompts])

    def _set_up(self) -> None:
        """Noise levels of the training, from noise to data."""
        super()._set_up()
        scheduler = self.policy.build_scheduler(self.args.num_inference_steps, self.latent_shape)
        sigmas = training_sigmas(scheduler)
        self.sigmas = sigmas[trained_levels(self.policy, sigmas)]
        self.eval_steps = sorted({(self.sigmas - sigma).abs().argmin().item() for sigma in self.args.eval_sigmas})

    def _draw(self, rows: list[int], shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Noise levels and noise of samples, and whose prompt is dropped, on the CPU. They depend on the seed, the update and
        the row of the dataset alone: not on the number of processes, nor on whether the run was resumed.
        """
        steps, noise, dropped = [], [], []
        for row in rows:
            generator = seeded_generator("diffusion_sft", self.args.seed, self.state.global_step, row)
            position = draw_uniform_or_logit_normal(self.args.timestep_sampling, generator)
            steps.append((position * len(self.sigmas)).long())
            noise.append(torch.randn(shape, generator=generator))
            dropped.append(torch.rand(1, generator=generator) < self.args.prompt_dropout)
        return torch.cat(steps), torch.stack(noise), torch.cat(dropped)

    # Loss: flow matching

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        rows, latents = inputs["row"].tolist(), inputs[f"{self.policy.modality}_latents"]
        if not self.model.training:
            losses = self._evaluation_losses(model, inputs, latents, rows)
            loss = self._mean_of_real_rows(losses)
            return (loss, {"losses": losses}) if return_outputs else loss
        steps, noise, dropped = self._draw(rows, latents.shape[1:])
        if dropped.any():
            prompts = [
                self.args.negative_prompt if drop else prompt
                for prompt, drop in zip(inputs["prompt"], dropped.tolist(), strict=True)
            ]
            inputs["prompt_embeds"] = self.prompt_cache.load(prompts).to(latents.device)
        losses = self._sample_losses(model, inputs, latents, steps, noise)
        self.nonfinite_guard.watch(losses, loss_description(inputs, self.sigmas[steps]), inputs["prompt"])
        loss = self.nonfinite_guard.mark(losses.mean())
        return (loss, {"losses": losses}) if return_outputs else loss

    def _sample_losses(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        latents: torch.Tensor,
        steps: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """Losses of shape `(batch_size,)` at `steps`, without classifier-free guidance."""
        noise, sigma = noise.to(latents.device), self.sigmas[steps].to(latents.device)
        broadcast = sigma.view(-1, *[1] * (latents.ndim - 1))
        noisy = (1 - broadcast) * latents + broadcast * noise
        velocity = self.policy.velocity(model, noisy, sigma, inputs["prompt_embeds"])
        return flow_matching_loss(velocity, noise - latents)

    def _evaluation_losses(
        self, model: torch.nn.Module, inputs: dict[str, Any], latents: torch.Tensor, rows: list[int]
    ) -> torch.Tensor:
        """Means over `eval_steps`, with the same noise at every evaluation. The loss of each level is logged."""
        noise = evaluation_noise(rows, self.latent_shape, self.args.seed)
        by_level = [
            self._sample_losses(model, inputs, latents, torch.full((len(rows),), step), noise)
            for step in self.eval_steps
        ]
        for step, losses in zip(self.eval_steps, by_level, strict=True):
            real = losses[: self._num_real_rows(len(losses))]
            self._record({f"loss/sigma_{self.sigmas[step].item():.2g}": real})
        return torch.stack(by_level).mean(0)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Loss of held-out samples, with the same noise at every evaluation."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None
