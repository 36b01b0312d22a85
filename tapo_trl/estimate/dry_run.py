# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Dry runs of the training commands."""

import copy
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from ..policies import FlowPolicy
from ..policies.loading import pop_dtype
from ..rewards import REWARD_MODELS, StepRewardModel
from ..rewards.loading import init_kwargs_of
from ..rewards.pretrained import is_reward_name, reward_class
from ..rollouts import Rollout
from ..runs.checks import autocast_dtype
from ..trainer.diffusion_dpo_config import DiffusionDPOConfig
from ..trainer.diffusion_dpo_trainer import DiffusionDPOTrainer
from ..trainer.model_config import DiffusionModelConfig, get_lora_config
from ..trainer.nft_trainer import DiffusionNFTTrainer
from ..trainer.policy_setup import fill_in_sizes, leave_out_experts
from ..trainer.refl_trainer import ReFLTrainer
from ..trainer.reward_setup import check_has_transformer
from ..trainer.rollout_config import RolloutConfig
from ..trainer.sft_config import DiffusionSFTConfig
from ..trainer.sft_trainer import DiffusionSFTTrainer
from ..trainer.slrm_config import SLRMConfig
from ..trainer.slrm_loading import choose_expert, is_reward_model
from ..trainer.slrm_trainer import SLRMTrainer
from ..trainer.tapo_config import TAPOConfig
from .fitting import Chunks, fitting_lines
from .forward_counts import count_pair, count_reward_pair, count_rollout, count_sample
from .memory import (
    TRAINED,
    TRAINED_BYTES,
    Activations,
    count_lora,
    count_parameters,
    policy_activations,
    policy_memory,
    reward_activations,
    reward_memory,
    scorer_memory,
    shared_reward_memory,
    vae_memory,
)
from .meta_models import load_meta_policy, load_meta_reward_model
from .report import DryRun, Row


NOTE = (
    "The memory is an estimate from shapes, not a measurement: temporary buffers, the CUDA context and fragmentation come "
    "on top, and sharding (DeepSpeed, FSDP) is not counted. Text encoders are in memory only before the training."
)
TRAINING = "policy, training (forward and backward)"


def print_dry_run(report: DryRun, device_memory: float | None = None) -> None:
    """
    Print the report on one process of several.

    Args:
        report ([`~estimate.report.DryRun`]): The report.
        device_memory (`float`, *optional*): Memory of a device in GiB, for which it says what fits.

    Raises:
        ValueError: if that is not known, because the activations are not estimated.
    """
    if device_memory is not None:
        if report.chunks is None:
            raise ValueError(
                f"`device_memory={device_memory:g}`: what fits is not known, since some of the activations (of the VAE, and of what "
                "reads images) are not estimated. Leave it unset."
            )
        report.fitting = [*fitting_lines(report.chunks, device_memory), ""]
    if PartialState().is_main_process:
        print(report)


def _report(command: str, unit: str, policy: FlowPolicy, source: str, args: Any, **findings: Any) -> DryRun:
    """The report, with what all commands say of samples."""
    latent_shape = policy.latent_shape(args.height, args.width, args.num_frames)
    findings["memory"].append(Row("sum", sum(row.value for row in findings["memory"]), "on the accelerator"))
    findings["memory"] += findings.pop("beside", [])
    return DryRun(
        title=f"`{command}` with {policy.name_or_path} ({source})",
        size=(args.height, args.width) if args.num_frames is None else (args.height, args.width, args.num_frames),
        latent_shape=latent_shape,
        tokens=policy.num_tokens(latent_shape, args.max_sequence_length),
        unit=unit,
        per_step=args.per_device_train_batch_size * args.gradient_accumulation_steps,
        **findings,
    )


def dry_run_slrm(args: SLRMConfig, model_args: DiffusionModelConfig) -> DryRun:
    """
    What `tapo-trl slrm` would do.

    Args:
        args ([`SLRMConfig`]): The training.
        model_args ([`DiffusionModelConfig`]): The pipeline that the reward model starts from, or the reward model.
    """
    args, dtype = copy.copy(args), model_args.known_dtype
    name, revision = model_args.require_model(), model_args.model_revision
    recorded = StepRewardModel.load_config(name) if os.path.isdir(name) and is_reward_model(name) else {}
    args.fill_in(recorded)
    if recorded:
        name, revision = recorded["base_model_name_or_path"], recorded.get("base_revision")
    policy, source = load_meta_policy(name, revision)
    policy = choose_expert(policy, args.expert, recorded)
    latent_shape = fill_in_sizes(args, policy)
    config = args.model_config() | {"max_sequence_length": args.max_sequence_length}
    model = REWARD_MODELS[args.reward_model_type].without_weights(policy, **config)
    forwards = count_reward_pair(SLRMTrainer, args, policy, model).rows()
    parameters = {"base model": count_parameters(policy.transformer), "reward model": count_parameters(model)}
    lora_config = get_lora_config(model_args, policy, model.lora_target_modules(policy))
    if lora_config is None:
        memory = [Row("reward model", parameters["reward model"] * TRAINED_BYTES, TRAINED)]
    else:
        in_full = sum(p.numel() for p in model.trained_in_full().values() if isinstance(p, nn.Parameter))
        parameters["LoRA"] = count_lora(copy.deepcopy(model.backbone), lora_config)
        frozen = (parameters["reward model"] - in_full) * dtype.itemsize
        memory = [
            Row("reward model", frozen, f"backbone x {dtype.itemsize} bytes"),
            Row(f"LoRA and {model.trained_part}", (in_full + parameters["LoRA"]) * TRAINED_BYTES, TRAINED),
        ]
        model._cast_backbone(dtype)
        model.add_lora(lora_config)
    if any(row.name == "base model" for row in forwards):
        base = parameters["base model"] * dtype.itemsize
        memory.append(Row("base model", base, f"parameters x {dtype.itemsize} bytes"))
    notes, chunks = [NOTE], None
    if model.scores_x0_prediction or not args.cache_latents:
        memory.append(vae_memory(policy, dtype))
    if model.scores_x0_prediction:
        notes.append("The activations of the CLIP and of the VAE are not estimated: they come on top.")
    else:
        activations = reward_activations(model, policy, latent_shape, autocast_dtype(args))
        chunks = _chunks(activations, 2, args, memory)
        memory += chunks.rows()
    facts = {"parameters": parameters, "forwards": forwards, "memory": memory, "notes": notes, "chunks": chunks}
    return _report("slrm", "pair", policy, source, args, **facts)


def dry_run_dpo(args: DiffusionDPOConfig, model_args: DiffusionModelConfig) -> DryRun:
    """
    What `tapo-trl dpo` would do.

    Args:
        args ([`DiffusionDPOConfig`]): The training.
        model_args ([`DiffusionModelConfig`]): The pipeline to align.
    """
    policy, source = _policy_to_train(args, model_args)
    args = copy.copy(args)
    latent_shape = fill_in_sizes(args, policy)
    forwards = count_pair(DiffusionDPOTrainer, args, policy).rows()
    parameters, memory = _policy_memory(policy, args, model_args)
    activations = policy_activations(policy, latent_shape, args.max_sequence_length, autocast_dtype(args))
    chunks = _chunks(activations, 2, args, memory)
    memory += chunks.rows()
    beside = []
    if args.cache_inversions:
        latents = 2 * args.num_inference_steps
        words = f"on disk: {latents} latents in float32"
        beside.append(Row("inversions of one pair", latents * 4 * math.prod(latent_shape), words))
    return _report(
        "dpo",
        "pair",
        policy,
        source,
        args,
        parameters=parameters,
        forwards=forwards,
        memory=memory,
        beside=beside,
        notes=[NOTE],
        chunks=chunks,
    )


def dry_run_sft(args: DiffusionSFTConfig, model_args: DiffusionModelConfig) -> DryRun:
    """
    What `tapo-trl sft` would do.

    Args:
        args ([`DiffusionSFTConfig`]): The training.
        model_args ([`DiffusionModelConfig`]): The pipeline to fine-tune.
    """
    policy, source = _policy_to_train(args, model_args)
    args = copy.copy(args)
    latent_shape = fill_in_sizes(args, policy)
    forwards = count_sample(DiffusionSFTTrainer, args, policy).rows()
    parameters, memory = _policy_memory(policy, args, model_args)
    memory = [row for row in memory if row.name != "reference"]
    activations = policy_activations(policy, latent_shape, args.max_sequence_length, autocast_dtype(args))
    chunks = _chunks(activations, 1, args, memory)
    memory += chunks.rows()
    facts = {"parameters": parameters, "forwards": forwards, "memory": memory, "notes": [NOTE], "chunks": chunks}
    return _report("sft", "sample", policy, source, args, **facts)


def dry_run_rollouts(
    command: str,
    trainer_class: type,
    args: RolloutConfig,
    model_args: DiffusionModelConfig,
    rewards: Sequence[str] | None,
    guard: str | None = None,
    guard_init_kwargs: dict[str, Any] | None = None,
) -> DryRun:
    """
    What `tapo-trl tapo`, `online_dpo` or `grpo` would do.

    Args:
        command (`str`): Its name.
        trainer_class (`type`): Its trainer.
        args ([`RolloutConfig`]): The training.
        model_args ([`DiffusionModelConfig`]): The pipeline to align.
        rewards (`Sequence[str]`, *optional*): Names of pretrained rewards, folders or Hub ids of reward models, and
            `package.module:function`.
        guard (`str`, *optional*): Reward of the guard.
        guard_init_kwargs (`dict[str, Any]`, *optional*): Its keyword arguments.
    """
    policy, source = _policy_to_train(args, model_args)
    args = copy.copy(args)
    latent_shape = fill_in_sizes(args, policy)
    scorers = [spec for spec in rewards or [] if is_reward_name(spec)]
    functions = [spec for spec in rewards or [] if ":" in spec and not Path(spec).exists()]
    models, names, notes = [], [], [NOTE]
    for spec in rewards or []:
        if spec not in (*functions, *scorers):
            model, remarks = load_meta_reward_model(policy, spec)
            check_has_transformer(model, args)
            models.append(model)
            names.append(spec)
            notes += remarks
    counts, rollout, scored = count_rollout(trainer_class, args, policy, models, bool(functions or scorers))
    parameters, memory = _policy_memory(policy, args, model_args, args.layerwise_casting)
    if issubclass(trainer_class, DiffusionNFTTrainer):
        trained = parameters.get("LoRA", parameters["policy"])
        memory.append(Row("old policy", trained * 4, "trained parameters x 4 bytes"))
    if isinstance(args, TAPOConfig) and (args.reward_min_sigma or args.reward_max_sigma):
        notes.append("Rewards that count at some noise levels alone are counted at all of them.")
    for spec in scorers:
        reward_class(spec).check_reads(policy)
        parameters[f"reward `{spec}`"] = reward_class(spec).num_parameters
        memory.append(scorer_memory(spec, init_kwargs_of(spec, args.reward_model_init_kwargs)))
    if guard is not None and is_reward_name(guard):
        reward_class(guard).check_reads(policy)
        memory.append(scorer_memory(guard, guard_init_kwargs or {}, "; only while the guard checks"))
    for model, spec in zip(models, names, strict=True):
        parameters["reward model"] = parameters.get("reward model", 0) + count_parameters(model)
        if args.share_backbone:
            memory.append(shared_reward_memory(model, parameters.get("LoRA", 0) // len(policy.trained_experts)))
        else:
            dtype = pop_dtype(init_kwargs_of(spec, args.reward_model_init_kwargs)) or torch.float32
            model = nn.Module.to(model, dtype)
            memory.append(reward_memory(model, args.reward_layerwise_casting, args.reward_group_offload))

    # One prompt has been counted
    prompts, latent_bytes = args.per_device_train_batch_size, 4 * math.prod(latent_shape)
    words = f"{prompts} prompts x {scored} samples x 5 (noise, x, x', estimate, target) x one latent"
    memory.append(Row("samples that are scored at once", 5 * scored * prompts * latent_bytes, words))
    per_example = sum(counts.sizes[TRAINING]) // rollout.num_examples
    activations = policy_activations(policy, latent_shape, args.max_sequence_length, autocast_dtype(args))
    stored = _stored_latents(rollout, policy, args, latent_shape)
    resident = [*memory, *([] if _is_offloaded(policy, args) else [stored])]
    chunks = _chunks(activations, per_example, args, resident, rollout.num_examples * prompts)
    memory += chunks.rows()
    return _report(
        command,
        "prompt",
        policy,
        source,
        args,
        parameters=parameters,
        forwards=counts.rows(),
        memory=memory,
        beside=[stored],
        notes=notes,
        chunks=None if issubclass(trainer_class, ReFLTrainer) else chunks,  # which goes on through the reward
    )


def _chunks(activations: Activations, latents: int, args: Any, memory: list[Row], most: int | None = None) -> Chunks:
    """
    The forward and backward passes of a training.

    Args:
        activations ([`~estimate.memory.Activations`]): Bytes that one latent keeps.
        latents (`int`): Latents of an example.
        args (`TrainingArguments`): The training.
        memory (`list[Row]`): All else on the accelerator.
        most (`int`, *optional*): Examples of the rollouts of a step, if there are rollouts.
    """
    option, number = "per_device_train_batch_size", args.per_device_train_batch_size
    if most is not None:
        option, number = "transition_batch_size", min(args.transition_batch_size or number, most)
    other, recomputes = sum(row.value for row in memory), args.activation_checkpointing
    return Chunks(activations, latents, option, number, most, recomputes, other)


def _is_offloaded(policy: FlowPolicy, args: RolloutConfig) -> bool:
    """Whether the latents of a rollout are on the CPU."""
    return policy.modality == "video" if args.offload_transitions is None else args.offload_transitions


def _stored_latents(rollout: Rollout, policy: FlowPolicy, args: RolloutConfig, latent_shape: tuple[int, ...]) -> Row:
    """Memory of the latents of a rollout, which was made of one prompt."""
    stored = {
        name: math.prod(value.shape[: -len(latent_shape)])
        for name, value in vars(rollout).items()
        if isinstance(value, torch.Tensor) and value.shape[-len(latent_shape) :] == latent_shape
    }
    prompts = args.per_device_train_batch_size
    place = "on the CPU" if _is_offloaded(policy, args) else "on the accelerator, beside the sum"
    words = f"{place}: {prompts} prompts x ({', '.join(f'{number} {name}' for name, number in stored.items())})"
    return Row("latents of a rollout", prompts * sum(stored.values()) * 4 * math.prod(latent_shape), words)


def _policy_to_train(args: Any, model_args: DiffusionModelConfig) -> tuple[FlowPolicy, str]:
    policy, source = load_meta_policy(model_args.require_model(), model_args.model_revision)
    policy.configure_experts(args.expert, args.guidance_scale_2, args.guidance_scale)
    return policy, source


def _policy_memory(
    policy: FlowPolicy, args: Any, model_args: DiffusionModelConfig, layerwise_casting: bool = False
) -> tuple[dict[str, int], list[Row]]:
    """Parameters and memory of the policy, its reference and the VAE. With LoRA, the policy has it from then on."""
    parameters, dtype = {"policy": count_parameters(policy.transformer)}, model_args.known_dtype
    lora_config = get_lora_config(model_args, policy)
    if lora_config is not None:
        lora_config = leave_out_experts(policy, lora_config)
    memory = policy_memory(policy, lora_config, dtype, layerwise_casting)
    if lora_config is not None:
        parameters["LoRA"] = memory[-1].value // TRAINED_BYTES
    return parameters, [*memory, vae_memory(policy, dtype)]
