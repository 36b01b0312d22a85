# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

__version__ = "0.2.0.dev0"
