# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import gc
import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("CI", None)  # TRL sends telemetry only if `CI` is unset: test what users run

import pytest  # noqa: E402
import torch  # noqa: E402

from tapo_trl.policies import SD3Policy, WanPolicy
from tests.testing_utils import tiny_sd3_pipeline as make_tiny_sd3_pipeline  # noqa: E402
from tests.testing_utils import tiny_wan_pipeline as make_tiny_wan_pipeline  # noqa: E402


@pytest.fixture
def tiny_sd3_pipeline():
    return make_tiny_sd3_pipeline()


@pytest.fixture
def tiny_sd3_policy(tiny_sd3_pipeline):
    return SD3Policy(tiny_sd3_pipeline)


@pytest.fixture
def tiny_wan_pipeline():
    return make_tiny_wan_pipeline()


@pytest.fixture
def tiny_wan_policy(tiny_wan_pipeline):
    return WanPolicy(tiny_wan_pipeline)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def imported_modules_are_not_collected():
    """`Trainer` collects garbage several times a training: without what was imported, that takes no time."""
    gc.collect()
    gc.freeze()
