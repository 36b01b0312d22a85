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

import gc
import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("CI", None)  # TRL sends telemetry only if `CI` is unset: test what users run

import pytest  # noqa: E402
import torch  # noqa: E402

from tapo_trl.policies import SD3Policy, WanPolicy  # noqa: E402

from .testing_utils import tiny_sd3_pipeline as make_tiny_sd3_pipeline  # noqa: E402
from .testing_utils import tiny_wan_pipeline as make_tiny_wan_pipeline  # noqa: E402


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
