# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
What a training would do: shapes, tokens, parameters, forwards and memory. Its own samplers and losses run on PyTorch's meta
device, where tensors have shapes and no values: no weight is loaded, no dataset is opened and nothing is computed.
"""
