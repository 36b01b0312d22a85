# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Parameters, weights and activations of a training, estimated from shapes, which a dry run reports."""

from torch import nn

from ..trainer.model_config import DiffusionModelConfig
from ..networks.float8 import store_base_in_float8
from ..networks.sharing import base_tensors
from ..policies import FlowPolicy
from ..rewards import LatentRewardModel, StepRewardModel
from ..trainer.reward_setup import store_in_float8
from .dry_run import Row
from .meta_models import add_meta_lora


# Bytes that one block keeps for its backward pass, per token and channel: measured on the CPU with saved-tensor hooks, on
# blocks of the width of SD3.5-medium (with dual attention) and Wan2.1-1.3B, with LoRA on the attention projections, bfloat16
# autocast and attention that does not keep its matrix.
BLOCK_BYTES = {"SD3Transformer2DModel": 66, "WanTransformer3DModel": 62}

TRAINED_BYTES = 16  # float32: weight, gradient, and Adam's two moments


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and of the buffers, such as SD3's table of positions."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def _count_buffers(module: nn.Module) -> int:
    return sum(buffer.numel() for buffer in module.buffers())


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


def policy_memory(
    policy: FlowPolicy, model_args: DiffusionModelConfig, parameters: dict[str, int], layerwise_casting: bool = False
) -> list[Row]:
    """Memory of the policy, its reference and the VAE. With LoRA, which is added to the transformer and `parameters`."""
    transformer, buffers = policy.transformer, _count_buffers(policy.transformer)
    if model_args.use_peft:
        parameters["LoRA"] = add_meta_lora(transformer, model_args, policy)
        element = model_args.known_dtype.itemsize
        policy_row = Row(
            "policy", (parameters["policy"] + buffers) * element, f"parameters and buffers x {element} bytes"
        )
        if layerwise_casting:
            store_base_in_float8(nn.Module.to(transformer, model_args.known_dtype))
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
    return [*memory, vae_memory(policy, model_args)]


def vae_memory(policy: FlowPolicy, model_args: DiffusionModelConfig) -> Row:
    element = 4 if policy.modality == "video" else model_args.known_dtype.itemsize
    return Row("VAE", count_parameters(policy.vae) * element, f"parameters x {element} bytes")
