# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
