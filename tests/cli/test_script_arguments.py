# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from typing import get_args

import pytest

from tapo_trl.cli.script_arguments import PreferenceDatasetArguments, SLRMScriptArguments
from tapo_trl.data import PAIR_PRESETS


class TestDatasetArguments:
    def test_pair_columns_need_two_names(self):
        with pytest.raises(ValueError, match="two columns, but it names 1"):
            PreferenceDatasetArguments(pair_columns=["image_0"], label_column="label")

    @pytest.mark.parametrize(
        ("options", "missing"),
        [({"pair_columns": ["a", "b"]}, "label_column"), ({"label_column": "label"}, "pair_columns")],
    )
    def test_pair_columns_and_label_go_together(self, options, missing):
        with pytest.raises(ValueError, match=f"`{missing}` is not"):
            PreferenceDatasetArguments(**options)

    def test_presets_are_those_of_the_api(self):
        names, _ = get_args(PreferenceDatasetArguments.__annotations__["pair_preset"])
        assert set(get_args(names)) == set(PAIR_PRESETS) | {"none"}
        assert (
            PreferenceDatasetArguments(pair_preset="none", pair_columns=["a", "b"], label_column="c").pair_preset
            is None
        )

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"pair_preset": "hpdv3", "pair_columns": ["a", "b"], "label_column": "c"}, "`pair_preset` and `pair_columns`"),
            ({"pair_preset": "hpdv3", "chosen_column": "a"}, "`pair_preset` and `chosen_column` exclude"),
            ({"label_values": {"left": 1}}, "`label_values` is set but `label_column` is not"),
            ({"label_values": "{left"}, "`label_values` is not valid JSON"),
            ({"label_values": "3"}, "`label_values` must map"),
        ],
    )  # fmt: skip
    def test_options_that_exclude_each_other(self, options, message):
        with pytest.raises(ValueError, match=message):
            PreferenceDatasetArguments(**options)

    def test_slrm_needs_a_dataset(self):
        with pytest.raises(ValueError, match="`dataset_name` is missing"):
            SLRMScriptArguments()
