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

import json
from typing import Any

from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict


class TrackedConfig(FrozenDict):
    """A diffusers configuration with the two methods that transformers' tracking callbacks call."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(dict(self), indent=2, sort_keys=True, default=str) + "\n"


def make_config_trackable(model: ModelMixin) -> None:
    """
    Lets `report_to` work with a diffusers model. transformers' callbacks for TensorBoard, MLflow, Comet and ClearML call
    `model.config.to_json_string()` or `.to_dict()`, which diffusers' [`FrozenDict`] lacks, and stop the training.

    Args:
        model ([`~diffusers.ModelMixin`]): The bare model, wrapped in PEFT or not yet. Changed in place.
    """
    model._internal_dict = TrackedConfig(model._internal_dict)
