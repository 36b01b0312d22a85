# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Short hashes of networks."""

import hashlib
import json

import torch
from diffusers import ModelMixin


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def update_with_weights(digest: "hashlib._Hash", model: torch.nn.Module) -> None:
    """
    Feed a hash with the shape of every parameter, its start and the sum of its bits as an integer, which is exact in any order
    and moves with any of its values, such as the embedding of a single token.
    """
    for parameter in model.parameters():
        parameter = parameter.detach()
        bits = parameter.view(_INTEGERS[parameter.element_size()]).sum(dtype=torch.int64).item()
        digest.update(f"{tuple(parameter.shape)} {bits}".encode())
        digest.update(parameter.flatten()[:16].float().cpu().numpy().tobytes())


def weights_fingerprint(model: ModelMixin) -> str:
    """Short hash of a configuration, a precision and weights."""
    digest = hashlib.sha256(f"{json.dumps(_config(model), sort_keys=True, default=str)} {model.dtype}".encode())
    update_with_weights(digest, model)
    return digest.hexdigest()[:16]


def signs_fingerprint(model: ModelMixin) -> str:
    """Short hash of a configuration and the signs of all weights, which no change of precision moves."""
    digest = hashlib.sha256(json.dumps(_config(model), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().signbit().numpy().tobytes())
    return digest.hexdigest()[:16]


def _config(model: ModelMixin) -> dict:
    return {key: value for key, value in model.config.items() if not key.startswith("_")}
