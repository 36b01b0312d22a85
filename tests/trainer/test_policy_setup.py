# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import math

import pytest

from tapo_trl import TAPOConfig
from tapo_trl.policies import load_policy
from tapo_trl.policies.flux2 import Flux2KleinPolicy
from tapo_trl.trainer.policy_setup import fill_in_sizes


@pytest.fixture(scope="module")
def klein():
    return load_policy(Flux2KleinPolicy.tiny())


class TestShiftOfTheNoiseLevels:
    @pytest.mark.parametrize(
        ("num_inference_steps", "height", "factor"),
        [(50, 1024, None), (20, 1024, 9.01), (50, 512, 6.10), (50, 1088, 3.30)],
    )
    def test_warns_of_another_one(self, tmp_path, klein, caplog, num_inference_steps, height, factor):
        sizes = {"height": height, "width": 1024, "num_inference_steps": num_inference_steps}
        fill_in_sizes(TAPOConfig(str(tmp_path), bf16=False, **sizes), klein)
        expected = "" if factor is None else f"shifted by exp(mu) = {factor:.2f} with"
        assert expected in caplog.text and (caplog.text == "") == (factor is None)

    def test_jumps_where_there_are_more_than_4300_tokens(self, klein):
        """Up to there it depends on the steps."""
        few, many, more = (4, 43, 100), (4, 1, 4300), (4, 1, 4301)
        assert klein.mu(10, few) == klein.mu(10, many) > klein.mu(50, many) > klein.mu(50, more) == klein.mu(10, more)
        assert math.exp(klein.mu(50, many)) / math.exp(klein.mu(50, more)) == pytest.approx(2.3, abs=0.1)

    def test_no_word_where_it_is_one(self, tmp_path, tiny_sd3_policy, caplog):
        sizes = {"resolution": 32, "num_inference_steps": 4, "num_sde_steps": 2}
        assert fill_in_sizes(TAPOConfig(str(tmp_path), bf16=False, **sizes), tiny_sd3_policy) == (4, 8, 8)
        assert caplog.text == ""
