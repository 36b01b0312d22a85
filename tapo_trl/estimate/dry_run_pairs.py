# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What the trainings on preference pairs would do: `slrm` and `dpo`."""

import math
import os

from torch import nn

from ..rewards import REWARD_MODELS, StepRewardModel
from ..trainer.diffusion_dpo_config import DiffusionDPOConfig
from ..trainer.model_config import DiffusionModelConfig
from ..trainer.slrm_config import SLRMConfig
from ..trainer.slrm_loading import is_reward_model
from .dry_run import ESTIMATE_NOTE, DryRun, Row
from .forward_counts import dpo_forwards
from .memory import TRAINED_BYTES, activation_rows, count_parameters, policy_memory, vae_memory
from .meta_models import add_meta_lora, block_tokens, load_meta_policy, sample_sizes


def dry_run_slrm(args: SLRMConfig, model_args: DiffusionModelConfig) -> DryRun:
    """
    What `tapo-trl slrm` would do.

    Args:
        args ([`SLRMConfig`]): The training.
        model_args ([`DiffusionModelConfig`]): The pipeline that the reward model starts from.
    """
    name, revision = model_args.require_model(), model_args.model_revision
    recorded = StepRewardModel.load_config(name) if os.path.isdir(name) and is_reward_model(name) else {}
    args.fill_in(recorded)
    if recorded:
        name, revision = recorded["base_model_name_or_path"], recorded.get("base_revision")
    policy, source = load_meta_policy(name, revision)
    size, latent_shape, tokens = sample_sizes(policy, args)
    model = REWARD_MODELS[args.reward_model_type].without_weights(policy, **args.model_config())
    is_slrm = model.uses_velocity_target
    parameters = {"base model": count_parameters(policy.transformer), "reward model": count_parameters(model)}
    element = model_args.known_dtype.itemsize
    if model_args.use_peft:
        in_full = sum(p.numel() for p in model.trained_in_full().values() if isinstance(p, nn.Parameter))
        parameters["LoRA"] = add_meta_lora(model.backbone, model_args, policy, model.lora_target_modules(policy))
        trained = in_full + parameters["LoRA"]
        memory = [
            Row("reward model", (parameters["reward model"] - in_full) * element, f"backbone x {element} bytes"),
            Row(
                f"LoRA and {model.trained_part}",
                trained * TRAINED_BYTES,
                f"parameters x {TRAINED_BYTES}: weight, gradient, Adam",
            ),
        ]
    else:
        memory = [
            Row(
                "reward model",
                parameters["reward model"] * TRAINED_BYTES,
                f"parameters x {TRAINED_BYTES}: weight, gradient, Adam",
            )
        ]
    enhancement = f"{model.latents_per_score} x " if model.latents_per_score > 1 else ""
    latents = 2 * model.latents_per_score
    forwards = [Row("reward model (forward and backward)", latents, f"{enhancement}both sides of a pair")]
    if model.scores_x0_prediction or (is_slrm and args.velocity_target == "reference"):
        forwards.append(Row("base model", 2, "both sides of a pair"))
        memory.append(Row("base model", parameters["base model"] * element, f"parameters x {element} bytes"))
    if model.scores_x0_prediction or not args.cache_latents:
        memory.append(vae_memory(policy, model_args))
    notes = [ESTIMATE_NOTE]
    if model.scores_x0_prediction:
        notes.append("The activations of the CLIP and of the VAE are not estimated: they come on top.")
    else:
        memory += activation_rows(
            model.transformer,
            latents * args.per_device_train_batch_size,
            block_tokens(policy, tokens) + (args.num_task_tokens if is_slrm else 0),
            args.activation_checkpointing,
        )
    memory.append(Row("sum", sum(row.value for row in memory), "on the accelerator"))
    return DryRun(
        title=f"`slrm` with {model_args.model_name_or_path} ({source})",
        size=size,
        latent_shape=latent_shape,
        sample_tokens=tokens[0],
        text_tokens=tokens[1],
        parameters=parameters,
        unit="pair",
        per_step=args.per_device_train_batch_size * args.gradient_accumulation_steps,
        forwards=forwards,
        memory=memory,
        notes=notes,
    )


def dry_run_dpo(args: DiffusionDPOConfig, model_args: DiffusionModelConfig) -> DryRun:
    """
    What `tapo-trl dpo` would do.

    Args:
        args ([`DiffusionDPOConfig`]): The training.
        model_args ([`DiffusionModelConfig`]): The pipeline to align.
    """
    policy, source = load_meta_policy(model_args.require_model(), model_args.model_revision)
    size, latent_shape, tokens = sample_sizes(policy, args)
    parameters = {"policy": count_parameters(policy.transformer)}
    memory = policy_memory(policy, model_args, parameters)
    memory += activation_rows(
        policy.transformer,
        2 * args.per_device_train_batch_size,
        block_tokens(policy, tokens),
        args.activation_checkpointing,
    )
    memory.append(Row("sum", sum(row.value for row in memory), "on the accelerator"))
    if args.cache_inversions:
        latents = 2 * args.num_inference_steps
        memory.append(
            Row(
                "inversions of one pair",
                latents * 4 * math.prod(latent_shape),
                f"on disk: {latents} latents in float32",
            )
        )
    return DryRun(
        title=f"`dpo` with {model_args.model_name_or_path} ({source})",
        size=size,
        latent_shape=latent_shape,
        sample_tokens=tokens[0],
        text_tokens=tokens[1],
        parameters=parameters,
        unit="pair",
        per_step=args.per_device_train_batch_size * args.gradient_accumulation_steps,
        forwards=dpo_forwards(args),
        memory=memory,
        notes=[ESTIMATE_NOTE],
    )
