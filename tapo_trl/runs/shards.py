# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Copies of trained weights where each process holds a part of them (ZeRO-3, FSDP2): [`TrainedWeights`]."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


class TrainedWeights:
    """
    The trainable parameters of a trainer's network, and of each the part that this process holds: its shard under ZeRO-3 (a
    piece of the flattened parameter, padded) and FSDP2 (some of its rows), the whole parameter otherwise.

    Args:
        trainer ([`~transformers.Trainer`]): the trainer, whose network may be wrapped later.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trainable parameters by name."""
        self._free_gathered()
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    @property
    def shards(self) -> dict[str, torch.Tensor]:
        """What this process holds of each parameter. Writing into a shard changes the parameter."""
        return {name: shard_of(parameter) for name, parameter in self.parameters.items()}

    @property
    def are_sharded(self) -> bool:
        """Whether a process holds parts of the parameters only."""
        return any(is_sharded(parameter) for parameter in self.parameters.values())

    def gather(self, shards: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole tensors from the parts that each process has of them. Every process must call this."""
        parameters = self.parameters
        return {name: gathered(shard, parameters[name]) for name, shard in shards.items()}

    def split(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What this process holds of whole tensors, each split as the parameter of its name is."""
        parameters = self.parameters
        return {name: split_as(tensor, parameters[name]) for name, tensor in tensors.items()}

    @contextmanager
    def replaced_by(self, shards: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """
        Inside, the network has other weights. Use it without gradients, or before the forward that has them.

        Args:
            shards (`Mapping[str, torch.Tensor]`): those weights by name, of the shapes of `self.shards`, in any precision.
        """
        parameters, are_sharded = self.parameters, self.are_sharded
        torch.clear_autocast_cache()  # half-precision copies of weights are found by the parameter, whatever its values are
        if are_sharded:  # the engine has views of its own: the memory stays, the values change
            trained = {name: shard_of(parameters[name]).clone() for name in shards}
            self._write(shards)
        else:
            trained = {name: parameters[name].data for name in shards}
            for name, shard in shards.items():
                parameters[name].data = shard.to(trained[name].device, trained[name].dtype)
        try:
            yield
        finally:
            if are_sharded:
                self._write(trained)
            else:
                for name, data in trained.items():
                    parameters[name].data = data
            torch.clear_autocast_cache()

    def _write(self, shards: Mapping[str, torch.Tensor]) -> None:
        own = self.shards
        for name, shard in shards.items():
            own[name].copy_(shard)

    def _free_gathered(self) -> None:
        """Let the engine drop whole parameters that it keeps for the next forward: they have the values of before."""
        for module in self.trainer.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        optimizer = getattr(getattr(self.trainer, "deepspeed", None), "optimizer", None)
        if hasattr(optimizer, "empty_partition_cache"):
            optimizer.empty_partition_cache()


def is_sharded(parameter: torch.nn.Parameter) -> bool:
    """Whether a process holds a part of a parameter only, under ZeRO-3 or FSDP2."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_tensor")


def shard_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this process holds of a parameter, without gradient."""
    if isinstance(parameter, DTensor):
        return parameter.data.to_local()
    return parameter.ds_tensor.data if hasattr(parameter, "ds_tensor") else parameter.data


def gathered(shard: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole tensor from the shards of all processes, which are split as `parameter` is."""
    if isinstance(parameter, DTensor):
        layout = (parameter.device_mesh, parameter.placements)
        return DTensor.from_local(shard, *layout, shape=parameter.shape, stride=parameter.stride()).full_tensor()
    if not hasattr(parameter, "ds_tensor"):
        return shard
    group = parameter.ds_process_group
    pieces = [torch.empty_like(shard) for _ in range(dist.get_world_size(group))]
    dist.all_gather(pieces, shard.contiguous(), group=group)
    return torch.cat(pieces)[: parameter.ds_numel].view(parameter.ds_shape)


def split_as(tensor: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this process holds of a whole tensor that is split as `parameter` is, on its device."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor):
        layout = (parameter.device_mesh, parameter.placements)
        return distribute_tensor(tensor, *layout, src_data_rank=None).to_local()
    if not hasattr(parameter, "ds_tensor"):
        return tensor
    length, rank = parameter.ds_tensor.numel(), dist.get_rank(parameter.ds_process_group)
    padded = F.pad(tensor.flatten(), (0, length * dist.get_world_size(parameter.ds_process_group) - tensor.numel()))
    return padded[rank * length : (rank + 1) * length].to(parameter.ds_tensor.device)


def whole_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """The shape of a parameter, of which a process may hold a part only."""
    return getattr(parameter, "ds_shape", parameter.shape)
