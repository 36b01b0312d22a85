# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What the trainings with rollouts would do: `tapo`, `online_dpo` and `grpo`."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..policies import FlowPolicy
from ..policies.loading import pop_dtype
from ..rollouts import PAIRINGS
from ..scripts.utils import TAPOScriptArguments
from ..trainer.flow_grpo_config import FlowGRPOConfig
from ..trainer.model_config import DiffusionModelConfig
from ..trainer.online_dpo_config import OnlineDiffusionDPOConfig
from ..trainer.reward_setup import check_has_transformer
from ..trainer.rollout_config import RolloutConfig
from ..trainer.tapo_config import TAPOConfig
from .dry_run import ESTIMATE_NOTE, DryRun, Row
from .forward_counts import grpo_forwards, online_dpo_forwards, tapo_forwards
from .memory import activation_rows, count_parameters, policy_memory, reward_memory, shared_reward_memory
from .meta_models import block_tokens, load_meta_policy, load_meta_reward_model, sample_sizes


@dataclass
class _RolloutRun:
    """
    What all trainings with rollouts have in common.

    Args:
        source (`str`): Where the pipeline's configuration is from.
        policy ([`FlowPolicy`]): The policy on the meta device, with its LoRA.
        size (`tuple[int, ...]`): Height, width and, for video, frames of a sample.
        latent_shape (`tuple[int, ...]`): Shape of one latent.
        tokens (`tuple[int, int]`): Tokens of a sample and of a prompt.
        parameters (`dict[str, int]`): Number of parameters of each network.
        memory (`list[Row]`): Memory of all weights.
        notes (`list[str]`): Remarks.
        latents_per_score (`int`): Latents that the latent reward model looks at for one score, 0 if there is none.
        velocity_target (`str`, *optional*): What an SLRM's velocity is compared to.
        has_function (`bool`): Whether there is a function of decoded samples.
        scores_x0_prediction (`bool`): Whether there is a reward model of them.
    """

    source: str
    policy: FlowPolicy
    size: tuple[int, ...]
    latent_shape: tuple[int, ...]
    tokens: tuple[int, int]
    parameters: dict[str, int]
    memory: list[Row]
    notes: list[str]
    latents_per_score: int
    velocity_target: str | None
    has_function: bool
    scores_x0_prediction: bool

    @property
    def latent_bytes(self) -> int:
        """Bytes of one latent in float32."""
        return 4 * math.prod(self.latent_shape)


def _rollout_run(
    script_args: TAPOScriptArguments, args: RolloutConfig, model_args: DiffusionModelConfig
) -> _RolloutRun:
    policy, source = load_meta_policy(model_args.require_model(), model_args.model_revision)
    size, latent_shape, tokens = sample_sizes(policy, args)
    parameters = {"policy": count_parameters(policy.transformer)}
    notes = [ESTIMATE_NOTE]

    specs = script_args.reward_model or []
    functions = [spec for spec in specs if ":" in spec and not Path(spec).exists()]
    reward_model, velocity_target = None, None
    if len(functions) < len(specs):
        reward_model, note = load_meta_reward_model(policy, next(spec for spec in specs if spec not in functions))
        notes += note
        velocity_target = reward_model.rollout_target(args.velocity_target)
        check_has_transformer(reward_model, args)
        parameters["reward model"] = count_parameters(reward_model)

    memory = policy_memory(policy, model_args, parameters, args.layerwise_casting)
    if reward_model is not None and args.share_backbone:
        memory.append(shared_reward_memory(reward_model, parameters.get("LoRA", 0)))
    elif reward_model is not None:
        dtype = pop_dtype(dict(args.reward_model_init_kwargs or {})) or torch.float32
        reward_model = nn.Module.to(reward_model, dtype)
        memory.append(reward_memory(reward_model, args.reward_layerwise_casting, args.reward_group_offload))
    return _RolloutRun(
        source=source,
        policy=policy,
        size=size,
        latent_shape=latent_shape,
        tokens=tokens,
        parameters=parameters,
        memory=memory,
        notes=notes,
        latents_per_score=0 if reward_model is None else reward_model.latents_per_score,
        velocity_target=velocity_target,
        has_function=bool(functions),
        scores_x0_prediction=reward_model is not None and reward_model.scores_x0_prediction,
    )


def _rollout_report(
    command: str,
    run: _RolloutRun,
    args: RolloutConfig,
    model_args: DiffusionModelConfig,
    forwards: list[Row],
    drawn: Row,
    latents_per_chunk: int,
    stored: Row,
) -> DryRun:
    """
    The report of a training with rollouts.

    Args:
        command (`str`): Its name.
        run (`_RolloutRun`): What it has in common with others.
        args ([`RolloutConfig`]): The training.
        model_args ([`DiffusionModelConfig`]): The pipeline.
        forwards (`list[Row]`): Latents through each network for one prompt.
        drawn (`Row`): Memory of what is drawn at once.
        latents_per_chunk (`int`): Latents in one training forward.
        stored (`Row`): Memory of what is kept of a rollout; where it lies is put before its formula.
    """
    memory = [*run.memory, drawn]
    memory += activation_rows(
        run.policy.transformer, latents_per_chunk, block_tokens(run.policy, run.tokens), args.activation_checkpointing
    )
    memory.append(Row("sum", sum(row.value for row in memory), "on the accelerator"))
    offload = run.policy.modality == "video" if args.offload_transitions is None else args.offload_transitions
    place = "on the CPU" if offload else "on the accelerator, beside the sum"
    memory.append(Row(stored.name, stored.value, f"{place}: {stored.formula}"))
    return DryRun(
        title=f"`{command}` with {model_args.model_name_or_path} ({run.source})",
        size=run.size,
        latent_shape=run.latent_shape,
        sample_tokens=run.tokens[0],
        text_tokens=run.tokens[1],
        parameters=run.parameters,
        unit="prompt",
        per_step=args.per_device_train_batch_size * args.gradient_accumulation_steps,
        forwards=forwards,
        memory=memory,
        notes=run.notes,
    )


def dry_run_tapo(script_args: TAPOScriptArguments, args: TAPOConfig, model_args: DiffusionModelConfig) -> DryRun:
    """
    What `tapo-trl tapo` would do.

    Args:
        script_args ([`TAPOScriptArguments`]): The reward models.
        args ([`TAPOConfig`]): The training.
        model_args ([`DiffusionModelConfig`]): The pipeline to align.
    """
    run = _rollout_run(script_args, args, model_args)
    sigmas = run.policy.build_scheduler(args.num_inference_steps, run.latent_shape).sigmas.tolist()
    prompts, pairs = args.per_device_train_batch_size, args.transition_batch_size or args.per_device_train_batch_size
    pairing = PAIRINGS[args.pairing]
    pairs_per_step = prompts * pairing.pairs_per_prompt
    guidance = 2 if args.train_cfg and args.guidance_scale > 1 else 1
    return _rollout_report(
        "tapo",
        run,
        args,
        model_args,
        forwards=tapo_forwards(
            args, sigmas, run.velocity_target, run.latents_per_score, run.has_function or run.scores_x0_prediction
        ),
        drawn=Row(
            "candidates of a step",
            5 * pairing.num_branches * args.num_candidates * prompts * run.latent_bytes,
            f"{prompts} prompts x {pairing.num_branches} x P x 5 (noise, x', parent's estimate, x_T, target) x one latent",
        ),
        latents_per_chunk=pairs * pairing.num_parents * guidance,
        stored=Row(
            "transitions of a rollout",
            args.num_sde_steps * pairs_per_step * (pairing.num_parents + 2) * run.latent_bytes,
            f"n x {pairs_per_step} pairs x {pairing.num_parents + 2} ends x one latent",
        ),
    )


def _drawn_samples(args: OnlineDiffusionDPOConfig | FlowGRPOConfig, run: _RolloutRun) -> Row:
    prompts = args.per_device_train_batch_size
    value = 4 * args.num_generations * prompts * run.latent_bytes
    return Row("samples of a step", value, f"{prompts} prompts x K x 4 (x_T, x, velocity, x') x one latent")


def dry_run_online_dpo(
    script_args: TAPOScriptArguments, args: OnlineDiffusionDPOConfig, model_args: DiffusionModelConfig
) -> DryRun:
    """
    What `tapo-trl online_dpo` would do.

    Args:
        script_args ([`TAPOScriptArguments`]): The reward models.
        args ([`OnlineDiffusionDPOConfig`]): The training.
        model_args ([`DiffusionModelConfig`]): The pipeline to align.
    """
    run = _rollout_run(script_args, args, model_args)
    prompts = args.per_device_train_batch_size
    return _rollout_report(
        "online_dpo",
        run,
        args,
        model_args,
        forwards=online_dpo_forwards(args, run.latents_per_score),
        drawn=_drawn_samples(args, run),
        latents_per_chunk=2 * (args.transition_batch_size or prompts),
        stored=Row(
            "pairs of a rollout",
            (2 + args.num_noise_levels) * prompts * run.latent_bytes,
            f"{prompts} prompts x (2 samples + noise at {args.num_noise_levels} levels) x one latent",
        ),
    )


def dry_run_grpo(script_args: TAPOScriptArguments, args: FlowGRPOConfig, model_args: DiffusionModelConfig) -> DryRun:
    """
    What `tapo-trl grpo` would do.

    Args:
        script_args ([`TAPOScriptArguments`]): The reward models.
        args ([`FlowGRPOConfig`]): The training.
        model_args ([`DiffusionModelConfig`]): The pipeline to align.
    """
    run = _rollout_run(script_args, args, model_args)
    prompts, guidance = args.per_device_train_batch_size, 2 if args.guidance_scale > 1 else 1
    trajectories = prompts * args.num_generations
    return _rollout_report(
        "grpo",
        run,
        args,
        model_args,
        forwards=grpo_forwards(args, run.latents_per_score),
        drawn=_drawn_samples(args, run),
        latents_per_chunk=guidance * (args.transition_batch_size or prompts),
        stored=Row(
            "transitions of a rollout",
            3 * len(args.step_indices) * trajectories * run.latent_bytes,
            f"n x {trajectories} trajectories x 3 (x, x', mean) x one latent",
        ),
    )
