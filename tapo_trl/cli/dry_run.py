# Copyright 2026 The tapo_trl authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
What a training command would do, found out on the meta device: shapes, tokens, parameters, forwards and an estimate of the
memory. No weight is loaded and no data set is opened.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

from ..policies import FlowPolicy, SD3Policy
from ..rewards import REWARD_MODELS, LatentRewardModel, StepRewardModel
from ..rewards.sharing import base_tensors
from ..rewards.velocity_targets import MIN_SIGMA
from ..rollouts import PAIRINGS
from ..schedulers import sde_step_indices
from ..trainer.diffusion_dpo_config import DiffusionDPOConfig
from ..trainer.flow_grpo_config import FlowGRPOConfig
from ..trainer.online_dpo_config import OnlineDiffusionDPOConfig
from ..trainer.reward_loading import check_has_transformer, store_in_float8
from ..trainer.rollout_config import RolloutConfig
from ..trainer.slrm_config import SLRMConfig
from ..trainer.speed import store_base_in_float8
from ..trainer.tapo_config import TAPOConfig
from .arguments import DiffusionModelConfig, TAPOScriptArguments
from .meta_models import add_meta_lora, load_meta_policy, load_meta_reward_model


# Bytes that one block keeps for its backward pass, per token and channel: measured on the CPU with saved-tensor hooks, on
# blocks of the width of SD3.5-medium (with dual attention) and Wan2.1-1.3B, with LoRA on the attention projections, bfloat16
# autocast and attention that does not keep its matrix.
BLOCK_BYTES = {"SD3Transformer2DModel": 66, "WanTransformer3DModel": 62}

TRAINED_BYTES = 16  # float32: weight, gradient, and Adam's two moments


@dataclass
class Row:
    """A line of a table: a name, a number, and where the number comes from."""

    name: str
    value: int
    formula: str


@dataclass
class DryRun:
    """
    What a dry run found.

    Args:
        title (`str`): Command, pipeline and where its configuration is from.
        size (`tuple[int, ...]`): Height, width and, for video, frames of a sample.
        latent_shape (`tuple[int, ...]`): Shape of one latent.
        sample_tokens (`int`): Tokens of an image or a video in the transformer.
        text_tokens (`int`): Tokens of a prompt.
        parameters (`dict[str, int]`): Number of parameters of each network.
        unit (`str`): What a batch consists of, `"prompt"` or `"pair"`.
        per_step (`int`): Units per optimizer step on one process.
        forwards (`list[Row]`): Latents that go through a network for one unit.
        memory (`list[Row]`): Estimated bytes of one process.
        notes (`list[str]`): Remarks.
    """

    title: str
    size: tuple[int, ...]
    latent_shape: tuple[int, ...]
    sample_tokens: int
    text_tokens: int
    parameters: dict[str, int]
    unit: str
    per_step: int
    forwards: list[Row]
    memory: list[Row]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        height, width, *frames = self.size
        size = "".join(f"{number} frames of " for number in frames) + f"{height} x {width} pixels (height x width)"
        lines = [
            f"Dry run of {self.title}. Nothing was loaded or trained.",
            "",
            f"samples    {size}",
            f"latents    {' x '.join(map(str, self.latent_shape))}",
            f"tokens     {self.sample_tokens:,} of a sample + {self.text_tokens:,} of its prompt",
            *(
                f"{'parameters' if index == 0 else '':<11}{number:>14,} {name}"
                for index, (name, number) in enumerate(self.parameters.items())
            ),
            "",
            f"Latents through a network for one {self.unit}, of which an optimizer step has {self.per_step} on each process:",
            *(f"{row.value:>8,} {row.name:<42}{row.formula}" for row in self.forwards),
            "",
            "Estimate of the memory of one process, in GiB (1024^3 bytes):",
            *(f"{row.value / 2**30:>8.2f} {row.name:<42}{row.formula}" for row in self.memory),
            "",
            *self.notes,
        ]
        return "\n".join(lines).rstrip() + "\n"


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and of the buffers, such as SD3's table of positions."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def _count_buffers(module: nn.Module) -> int:
    return sum(buffer.numel() for buffer in module.buffers())


def count_tokens(policy: FlowPolicy, latent_shape: Sequence[int], max_sequence_length: int) -> tuple[int, int]:
    """
    Tokens of a sample and of a prompt.

    Args:
        policy ([`FlowPolicy`]): The policy.
        latent_shape (`Sequence[int]`): Shape of one latent, channels first.
        max_sequence_length (`int`): Tokens of the T5 or UMT5 text encoder.

    Returns:
        `tuple[int, int]`: The number of patches, and that of text tokens (with CLIP's, where the family has them).
    """
    _, *sides = latent_shape
    patch = policy.transformer.config.patch_size
    patches = [patch] * len(sides) if isinstance(patch, int) else patch
    clip = policy.pipeline.tokenizer_max_length if isinstance(policy, SD3Policy) else 0
    return math.prod(side // size for side, size in zip(sides, patches, strict=True)), clip + max_sequence_length


def tapo_forwards(
    args: TAPOConfig,
    sigmas: Sequence[float],
    velocity_target: str | None,
    latents_per_score: int,
    has_function: bool = False,
) -> list[Row]:
    """
    Latents that go through each network for one prompt. Guidance takes two of them for each velocity.

    Args:
        args ([`TAPOConfig`]): The training.
        sigmas (`Sequence[float]`): The grid of noise levels.
        velocity_target (`str`, *optional*): What the SLRM's velocity is compared to.
        latents_per_score (`int`): Latents that the latent reward model looks at for one score, 0 if there is none.
        has_function (`bool`, *optional*, defaults to `False`):
            Whether there is a reward of decoded samples, a function or an SPM.

    Returns:
        `list[Row]`: Networks and numbers of latents.
    """
    steps = sde_step_indices(args.num_inference_steps, args.num_sde_steps, args.t_init)
    compared = [index for index in steps if sigmas[index + 1] >= MIN_SIGMA]  # where the score has a distance
    by_policy = steps if has_function else compared if velocity_target == "policy" else []
    guidance = 2 if args.guidance_scale > 1 else 1
    words = "guidance x " if guidance == 2 else ""
    branches = PAIRINGS[args.pairing].num_branches
    candidates = branches * args.num_candidates
    trajectories = "1 or 2 trajectories" if branches == 2 else "1 trajectory"

    # One trajectory until the first stochastic step. Where the policy has seen the candidates, the next step needs no
    # forward of its own.
    own = [index for index in range(args.num_inference_steps) if index - 1 not in by_policy]
    latents = sum(1 if index <= steps[0] else branches for index in own)
    rows = [Row("policy, rollout", guidance * latents, f"{words}{len(own)} steps, {trajectories}")]
    asked = {"policy": by_policy, "reference": compared if velocity_target == "reference" else []}
    for name, indices in asked.items():
        if indices:
            value = guidance * candidates * len(indices)
            rows.append(Row(f"{name}, at the candidates", value, f"{words}{len(indices)} steps x {branches} x P"))
    if latents_per_score:
        enhancement = f"{latents_per_score} x " if latents_per_score > 1 else ""
        value = latents_per_score * candidates * args.num_sde_steps
        rows.append(Row("reward model", value, f"{enhancement}n x {branches} x P"))
    train_guidance, train_words = (guidance, words) if args.train_cfg else (1, "")
    parents = branches * args.num_sde_steps * train_guidance
    rows.append(Row("policy, training (forward and backward)", parents, f"{train_words}n x {branches}"))
    rows.append(Row("reference, training", parents, f"{train_words}n x {branches}"))
    return rows


def activation_rows(transformer: nn.Module, latents: int, tokens: int, checkpointing: bool) -> list[Row]:
    """
    Memory that the backward pass needs, by [`BLOCK_BYTES`].

    Args:
        transformer (`nn.Module`): The network.
        latents (`int`): Latents in one forward.
        tokens (`int`): Tokens of each in a block.
        checkpointing (`bool`): Whether blocks keep their input only and are computed again.
    """
    config = transformer.config
    dim = config.num_attention_heads * config.attention_head_dim
    class_name = next(name for name in BLOCK_BYTES if name in [base.__name__ for base in type(transformer).__mro__])
    size, per_block = latents * tokens * dim, BLOCK_BYTES[class_name]
    num_blocks = len(_blocks(transformer))
    words = f"{latents} latents x {tokens:,} tokens x {dim:,} channels"
    if not checkpointing:
        return [
            Row(
                "activations",
                num_blocks * size * per_block,
                f"{num_blocks} blocks x {words} x {per_block}",
            )
        ]
    return [
        Row(
            "activations: inputs of the blocks",
            num_blocks * size * 2,
            f"{num_blocks} blocks x {words} x 2",
        ),
        Row("activations: one block, recomputed", size * per_block, f"{words} x {per_block}"),
    ]


def _blocks(transformer: nn.Module) -> nn.ModuleList:
    return next(module for module in transformer.children() if isinstance(module, nn.ModuleList))


def reward_memory(model: StepRewardModel, layerwise_casting: bool, group_offload: bool) -> Row:
    """
    Memory of the weights of a frozen latent reward model on the accelerator.

    Args:
        model ([`StepRewardModel`]): The reward model on the meta device, in the precision it is loaded in. Changed in place.
        layerwise_casting (`bool`): See `reward_layerwise_casting` of [`TAPOConfig`].
        group_offload (`bool`): See `reward_group_offload` of [`TAPOConfig`].
    """
    words = "all weights"
    if layerwise_casting:
        store_in_float8(model)
        words = "linear layers in float8, the rest as it is"
    if not group_offload:
        return Row("reward model", count_bytes(model), words)
    blocks = _blocks(model.transformer)
    resident = count_bytes(model) - count_bytes(blocks) + 2 * max(count_bytes(block) for block in blocks)
    return Row("reward model", resident, f"two of {len(blocks)} blocks and what is outside of them; {words}")


def shared_reward_memory(model: LatentRewardModel, lora_parameters: int) -> Row:
    """
    Memory of a reward model whose backbone is the policy's.

    Args:
        model ([`LatentRewardModel`]): The reward model on the meta device, without its LoRA.
        lora_parameters (`int`): Parameters of its LoRA, taken to be as large as the policy's.
    """
    own = sum(tensor.numel() for tensor in model.trained_in_full().values()) + lora_parameters
    words = f"{model.trained_part} and LoRA (as the policy's) x 4 bytes; the backbone is the policy's"
    return Row("reward model", own * 4, words)


# The commands


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
        reads_estimates (`bool`): Whether there is a reward model of them.
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
    reads_estimates: bool

    @property
    def latent_bytes(self) -> int:
        """Bytes of one latent in float32."""
        return 4 * math.prod(self.latent_shape)


def _rollout_run(
    script_args: TAPOScriptArguments, args: RolloutConfig, model_args: DiffusionModelConfig
) -> _RolloutRun:
    policy, source = load_meta_policy(model_args.require_model(), model_args.model_revision)
    size, latent_shape, tokens = _sizes(policy, args)
    parameters = {"policy": count_parameters(policy.transformer)}
    notes = [_ESTIMATE]

    specs = script_args.reward_model or []
    functions = [spec for spec in specs if ":" in spec and not Path(spec).exists()]
    reward_model, velocity_target = None, None
    if len(functions) < len(specs):
        reward_model, note = load_meta_reward_model(policy, next(spec for spec in specs if spec not in functions))
        notes += note
        velocity_target = reward_model.rollout_target(args.velocity_target)
        check_has_transformer(reward_model, args)
        parameters["reward model"] = count_parameters(reward_model)

    memory = _policy_memory(policy, model_args, parameters, args.layerwise_casting)
    if reward_model is not None and args.share_backbone:
        memory.append(shared_reward_memory(reward_model, parameters.get("LoRA", 0)))
    elif reward_model is not None:
        dtype = (args.reward_model_init_kwargs or {}).get("torch_dtype", "float32")
        reward_model = nn.Module.to(reward_model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
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
        reads_estimates=reward_model is not None and reward_model.reads_estimates,
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
        run.policy.transformer, latents_per_chunk, _block_tokens(run.policy, run.tokens), args.activation_checkpointing
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
            args, sigmas, run.velocity_target, run.latents_per_score, run.has_function or run.reads_estimates
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


def sample_forwards(args: OnlineDiffusionDPOConfig | FlowGRPOConfig, latents_per_score: int) -> list[Row]:
    """
    Latents that go through each network for the rollout of one prompt whose final samples are rewarded.

    Args:
        args ([`OnlineDiffusionDPOConfig`] or [`FlowGRPOConfig`]): The training.
        latents_per_score (`int`): Latents that the latent reward model looks at for one score, 0 if there is none.
    """
    guidance, words = (2, "guidance x ") if args.guidance_scale > 1 else (1, "")
    samples = args.num_generations
    rows = [Row("policy, rollout", guidance * samples * args.num_inference_steps, f"{words}K x T steps")]
    if latents_per_score:
        enhancement = f"{latents_per_score} x " if latents_per_score > 1 else ""
        rows.append(Row("reward model", latents_per_score * samples, f"{enhancement}K"))
    return rows


def _drawn_samples(args: OnlineDiffusionDPOConfig | FlowGRPOConfig, run: _RolloutRun) -> Row:
    prompts = args.per_device_train_batch_size
    value = 4 * args.num_generations * prompts * run.latent_bytes
    return Row("samples of a step", value, f"{prompts} prompts x K x 4 (x_T, x, velocity, x') x one latent")


def online_dpo_forwards(args: OnlineDiffusionDPOConfig, latents_per_score: int) -> list[Row]:
    """Latents that go through each network for one prompt, see [`sample_forwards`]."""
    latents, words = 2 * args.num_noise_levels, "noise levels x both sides of a pair"
    return [
        *sample_forwards(args, latents_per_score),
        Row("policy, training (forward and backward)", latents, words),
        Row("reference, training", latents, words),
    ]


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


def grpo_forwards(args: FlowGRPOConfig, latents_per_score: int) -> list[Row]:
    """Latents that go through each network for one prompt, see [`sample_forwards`]."""
    guidance, words = (2, "guidance x ") if args.guidance_scale > 1 else (1, "")
    latents = guidance * args.num_generations * len(args.step_indices)
    rows = [
        *sample_forwards(args, latents_per_score),
        Row("policy, training (forward and backward)", latents, f"{words}K x n"),
    ]
    return rows if args.beta == 0 else [*rows, Row("reference, training", latents, f"{words}K x n")]


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


def dry_run_slrm(args: SLRMConfig, model_args: DiffusionModelConfig) -> DryRun:
    """
    What `tapo-trl slrm` would do.

    Args:
        args ([`SLRMConfig`]): The training.
        model_args ([`DiffusionModelConfig`]): The pipeline that the reward model starts from.
    """
    policy, source = load_meta_policy(model_args.require_model(), model_args.model_revision)
    size, latent_shape, tokens = _sizes(policy, args)
    model = REWARD_MODELS[args.reward_model_type].without_weights(policy, **args.model_config())
    is_slrm = model.compares_velocities
    parameters = {"base model": count_parameters(policy.transformer), "reward model": count_parameters(model)}
    element = model_args.dtype.itemsize
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
    if model.reads_estimates or (is_slrm and args.velocity_target == "reference"):
        forwards.append(Row("base model", 2, "both sides of a pair"))
        memory.append(Row("base model", parameters["base model"] * element, f"parameters x {element} bytes"))
    if model.reads_estimates or not args.cache_latents:
        memory.append(_vae_memory(policy, model_args))
    notes = [_ESTIMATE]
    if model.reads_estimates:
        notes.append("The activations of the CLIP and of the VAE are not estimated: they come on top.")
    else:
        memory += activation_rows(
            model.transformer,
            latents * args.per_device_train_batch_size,
            _block_tokens(policy, tokens) + (args.num_task_tokens if is_slrm else 0),
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


def dpo_forwards(args: DiffusionDPOConfig) -> list[Row]:
    """Latents that go through each network for one pair."""
    rows = [
        Row("policy, training (forward and backward)", 2, "both sides of a pair"),
        Row("reference, training", 2, "both sides of a pair"),
    ]
    if args.variant == "inversion_dpo":
        when = "in the first epoch" if args.cache_inversions else "at most, less for later steps"
        rows.append(Row("reference, inversion", 2 * args.num_inference_steps, f"both sides x T, {when}"))
    return rows


def dry_run_dpo(args: DiffusionDPOConfig, model_args: DiffusionModelConfig) -> DryRun:
    """
    What `tapo-trl dpo` would do.

    Args:
        args ([`DiffusionDPOConfig`]): The training.
        model_args ([`DiffusionModelConfig`]): The pipeline to align.
    """
    policy, source = load_meta_policy(model_args.require_model(), model_args.model_revision)
    size, latent_shape, tokens = _sizes(policy, args)
    parameters = {"policy": count_parameters(policy.transformer)}
    memory = _policy_memory(policy, model_args, parameters)
    memory += activation_rows(
        policy.transformer,
        2 * args.per_device_train_batch_size,
        _block_tokens(policy, tokens),
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
        notes=[_ESTIMATE],
    )


def print_dry_run(report: DryRun) -> None:
    """Prints the report on one process of several."""
    if PartialState().is_main_process:
        print(report)


_ESTIMATE = (
    "The memory is an estimate from shapes, not a measurement: temporary buffers, the CUDA context and fragmentation come "
    "on top, and sharding (DeepSpeed, FSDP) is not counted. Text encoders are in memory only before the training."
)


def _sizes(
    policy: FlowPolicy, args: SLRMConfig | RolloutConfig | DiffusionDPOConfig
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, int]]:
    """Size of a sample, shape of its latent, and tokens."""
    height, width = args.height or args.resolution, args.width or args.resolution
    latent_shape = policy.latent_shape(height, width, args.num_frames)
    size = (height, width) if args.num_frames is None else (height, width, args.num_frames)
    tokens = count_tokens(policy, latent_shape, args.max_sequence_length or policy.max_sequence_length)
    return size, latent_shape, tokens


def _block_tokens(policy: FlowPolicy, tokens: tuple[int, int]) -> int:
    """Tokens of the stream that a block transforms: SD3 joins the text to the image, Wan only looks at it."""
    return sum(tokens) if isinstance(policy, SD3Policy) else tokens[0]


def _policy_memory(
    policy: FlowPolicy, model_args: DiffusionModelConfig, parameters: dict[str, int], layerwise_casting: bool = False
) -> list[Row]:
    """Memory of the policy, its reference and the VAE. With LoRA, which is added to the transformer and `parameters`."""
    transformer, buffers = policy.transformer, _count_buffers(policy.transformer)
    if model_args.use_peft:
        parameters["LoRA"] = add_meta_lora(transformer, model_args, policy)
        element = model_args.dtype.itemsize
        policy_row = Row(
            "policy", (parameters["policy"] + buffers) * element, f"parameters and buffers x {element} bytes"
        )
        if layerwise_casting:
            store_base_in_float8(nn.Module.to(transformer, model_args.dtype))
            base = sum(tensor.numel() * tensor.element_size() for tensor in base_tensors(transformer).values())
            policy_row = Row("policy", base, f"linear layers x 1 byte and a scale per row, the rest x {element} bytes")
        memory = [
            policy_row,
            Row("LoRA", parameters["LoRA"] * TRAINED_BYTES, f"parameters x {TRAINED_BYTES}: weight, gradient, Adam"),
        ]
    else:
        memory = [
            Row(
                "policy", parameters["policy"] * TRAINED_BYTES, f"parameters x {TRAINED_BYTES}: weight, gradient, Adam"
            ),
            Row("reference", (parameters["policy"] + buffers) * 4, "parameters and buffers x 4 bytes: a frozen copy"),
        ]
    return [*memory, _vae_memory(policy, model_args)]


def _vae_memory(policy: FlowPolicy, model_args: DiffusionModelConfig) -> Row:
    element = 4 if policy.modality == "video" else model_args.dtype.itemsize
    return Row("VAE", count_parameters(policy.vae) * element, f"parameters x {element} bytes")
