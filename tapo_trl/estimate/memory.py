# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Memory of a training, from the shapes of its weights and of the tensors that its backward pass keeps."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..networks.float8 import store_base_in_float8
from ..networks.sharing import base_tensors
from ..policies import FlowPolicy
from ..policies.base import cast_inputs
from ..policies.loading import pop_dtype
from ..rewards import LatentRewardModel, StepRewardModel
from ..rewards.pretrained import reward_class
from ..trainer.reward_setup import store_in_float8
from .meta_models import blocks_of, prompts_of_shapes, shrink
from .report import Row


TRAINED_BYTES = 16  # float32: weight, gradient, and Adam's two moments
TRAINED = f"parameters x {TRAINED_BYTES}: weight, gradient, Adam"


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and of the buffers, such as a table of positions."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def count_lora(network: nn.Module, lora_config: LoraConfig) -> int:
    """Number of parameters of a LoRA that is added to a network."""
    with torch.device("meta"):
        model = get_peft_model(network, lora_config)
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


@dataclass
class Activations:
    """
    Bytes that one latent keeps for the backward pass.

    Args:
        kept (`int`): Without activation checkpointing.
        inputs (`int`): Inputs of the blocks, which are kept with it.
        num_blocks (`int`): Number of blocks.
    """

    kept: int
    inputs: int
    num_blocks: int

    def rows(self, latents: int, checkpointing: bool) -> list[Row]:
        """Memory of a forward with so many latents."""

        def row(name: str, size: int) -> Row:
            return Row(f"activations{name}", latents * size, f"{latents} latents x {size / 2**20:,.1f} MiB")

        if not checkpointing:
            return [row(f" of {self.num_blocks} blocks", self.kept)]
        return [
            row(f": inputs of {self.num_blocks} blocks", self.inputs),
            row(": one block, recomputed", self.kept // self.num_blocks),
        ]


def measure_activations(
    model: nn.Module, forward: Callable[[nn.Module, int], torch.Tensor], dtype: torch.dtype | None
) -> Activations:
    """
    Find out what autograd keeps.

    Args:
        model (`nn.Module`): The network on the meta device, with its LoRA.
        forward (`Callable`): `(model, batch_size) -> output`. It is called with fake tensors, which have the shapes and the
            devices of real ones, and no memory.
        dtype (`torch.dtype`, *optional*): Precision of the autocast, if there is one.
    """
    network = copy.deepcopy(model)
    counts = shrink(network)
    totals = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to_empty(device="cpu").train()
        for batch_size in (1, 2):
            kept = _KeptTensors(blocks_of(network), counts)
            autocast = torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)
            with autocast, torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
                forward(network, batch_size)
            totals.append(kept.finish())
    # One more latent: the weights, which autograd keeps, too, do not grow
    (kept, inputs), (more_kept, more_inputs) = totals
    return Activations(more_kept - kept, more_inputs - inputs, sum(counts))


class _KeptTensors:
    """Memory behind tensors, each counted once, and as often as the block in which it is kept is there."""

    def __init__(self, blocks: list[nn.Module], counts: list[int]):
        self.kept: dict[int, tuple[torch.UntypedStorage, int]] = {}
        self.inputs: dict[int, tuple[torch.UntypedStorage, int]] = {}
        self._count, self._hooks = 1, []
        for block, count in zip(blocks, counts, strict=True):
            self._hooks += [
                block.register_forward_pre_hook(partial(self._enter, count), with_kwargs=True),
                block.register_forward_hook(self._leave),
            ]

    def _enter(self, count: int, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._count = count
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                self._add(self.inputs, value)

    def _leave(self, *_) -> None:
        self._count = 1

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        self._add(self.kept, tensor)
        return tensor

    def _add(self, found: dict, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        found.setdefault(storage._cdata, (storage, self._count))

    def finish(self) -> tuple[int, int]:
        """Bytes that are kept, and those of the blocks' inputs."""
        for hook in self._hooks:
            hook.remove()
        kept, inputs = (sum(s.nbytes() * n for s, n in found.values()) for found in (self.kept, self.inputs))
        return kept, inputs


def policy_activations(
    policy: FlowPolicy, latent_shape: tuple[int, ...], max_sequence_length: int, dtype: torch.dtype | None
) -> Activations:
    """[`measure_activations`] of a policy's network."""

    def forward(network: nn.Module, batch_size: int) -> torch.Tensor:
        prompts = prompts_of_shapes(policy, batch_size, max_sequence_length, "cpu")
        latents, sigma = torch.empty(batch_size, *latent_shape), torch.empty(batch_size)
        inputs = policy.model_inputs(network.config, latents, sigma, prompts)
        return network(**cast_inputs(inputs, network.dtype, policy.float32_inputs), return_dict=False)[0]

    # A sample goes through one transformer of two
    return measure_activations(policy.experts[policy.trained_experts[0]], forward, dtype)


def reward_activations(
    model: LatentRewardModel, policy: FlowPolicy, latent_shape: tuple[int, ...], dtype: torch.dtype | None
) -> Activations:
    """[`measure_activations`] of a latent reward model."""

    def forward(network: LatentRewardModel, batch_size: int) -> torch.Tensor:
        prompts = prompts_of_shapes(policy, batch_size, model.config.max_sequence_length, "cpu")
        return network(torch.empty(batch_size, *latent_shape), torch.empty(batch_size), **prompts.tensors).logits

    return measure_activations(model, forward, dtype)


# Weights


def policy_memory(
    policy: FlowPolicy, lora_config: LoraConfig | None, dtype: torch.dtype, layerwise_casting: bool = False
) -> list[Row]:
    """
    Memory of the policy and of its reference.

    Args:
        policy ([`FlowPolicy`]): The policy on the meta device. Its transformer gets the LoRA.
        lora_config ([`~peft.LoraConfig`], *optional*): Its LoRA; without it all weights are trained.
        dtype (`torch.dtype`): Precision of the frozen weights.
        layerwise_casting (`bool`, *optional*, defaults to `False`): See [`RolloutConfig`].
    """
    transformer, element = policy.transformer, dtype.itemsize
    if lora_config is None:
        buffers = sum(buffer.numel() for buffer in transformer.buffers())
        number = count_parameters(transformer)
        return [
            Row("policy", number * TRAINED_BYTES, TRAINED),
            Row("reference", (number + buffers) * 4, "parameters and buffers x 4 bytes: a frozen copy"),
        ]
    nn.Module.to(transformer.requires_grad_(False), dtype)
    frozen = Row("policy", count_bytes(transformer), f"parameters and buffers x {element} bytes")
    lora = count_lora(transformer, lora_config)
    if layerwise_casting:
        store_base_in_float8(transformer)
        base = sum(tensor.numel() * tensor.element_size() for tensor in base_tensors(transformer).values())
        frozen = Row("policy", base, f"linear layers x 1 byte and a scale per row, the rest x {element} bytes")
    return [frozen, Row("LoRA", lora * TRAINED_BYTES, TRAINED)]


def vae_memory(policy: FlowPolicy, dtype: torch.dtype) -> Row:
    element = policy.component_dtypes.get("vae", dtype).itemsize
    return Row("VAE", count_parameters(policy.vae) * element, f"parameters x {element} bytes")


def reward_memory(model: StepRewardModel, layerwise_casting: bool, group_offload: bool) -> Row:
    """
    Memory of the weights of a frozen reward model on the accelerator.

    Args:
        model ([`StepRewardModel`]): The reward model on the meta device, in the precision it is loaded in. Changed in place.
        layerwise_casting (`bool`): See `reward_layerwise_casting` of [`RolloutConfig`].
        group_offload (`bool`): See `reward_group_offload` of [`RolloutConfig`].
    """
    words = "all weights"
    if layerwise_casting:
        store_in_float8(model)
        words = "linear layers in float8, the rest as it is"
    if not group_offload:
        return Row("reward model", count_bytes(model), words)
    sizes = [count_bytes(block) for block in blocks_of(model)]
    resident = count_bytes(model) - sum(sizes) + 2 * max(sizes)
    return Row("reward model", resident, f"two of {len(sizes)} blocks and what is outside of them; {words}")


def scorer_memory(name: str, init_kwargs: dict[str, Any], remark: str = "") -> Row:
    """
    Memory of the weights of a pretrained scorer on the accelerator. Its activations are not counted.

    Args:
        name (`str`): Its name, see [`get_reward`].
        init_kwargs (`dict[str, Any]`): Arguments with which it is loaded.
        remark (`str`, *optional*): Addition to the formula.
    """
    scorer = reward_class(name)
    size = scorer.memory(pop_dtype(dict(init_kwargs)))
    words = f"parameters x {size // scorer.num_parameters} bytes" if size else "it computes on the CPU"
    return Row(f"reward `{name}`", size, words + remark)


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
