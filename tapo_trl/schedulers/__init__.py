# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from .flow_match_sde import (
    FlowMatchSDEScheduler,
    cps_mean,
    draw_candidates,
    flow_sde_mean,
    gaussian_kl,
    gaussian_log_prob,
    gaussian_log_ratio,
    normalised_log_ratio,
    sde_step_indices,
    window_step_indices,
)


__all__ = [
    "FlowMatchSDEScheduler",
    "cps_mean",
    "draw_candidates",
    "flow_sde_mean",
    "gaussian_kl",
    "gaussian_log_prob",
    "gaussian_log_ratio",
    "normalised_log_ratio",
    "sde_step_indices",
    "window_step_indices",
]
