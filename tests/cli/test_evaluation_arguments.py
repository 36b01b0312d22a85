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

import pytest

from tapo_trl.cli.evaluation_arguments import EvaluateArguments, SampleArguments


class TestEvaluateArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "`slrm` .* `reward_model`"),
            ({"slrm": "x"}, "`slrm` needs `dataset_name`"),
            ({"reward_model": ["a:b"]}, "`reward_model` needs `prompts`"),
            ({"slrm": "x", "dataset_name": "y", "sigmas": [0.5, 1.0]}, "`sigmas` must lie"),
        ],
    )
    def test_bad_combinations(self, options, message):
        with pytest.raises(ValueError, match=message):
            EvaluateArguments(**options)


class TestSampleArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [({}, "`prompts` is missing"), ({"prompts": ["a"], "batch_size": 0}, "`batch_size` must be at least 1")],
    )
    def test_bad_values(self, options, message):
        with pytest.raises(ValueError, match=message):
            SampleArguments(**options)
