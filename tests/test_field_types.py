# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from tapo_trl import DiffusionDPOConfig, SLRMConfig, TAPOConfig
from tapo_trl.field_types import convert, convert_fields


Strings, Numbers = list[str] | None, list[float] | None
Mapping = dict[str, Any] | str | None
Precision = Literal["float32", "bfloat16"]


class TestConvert:
    @pytest.mark.parametrize(
        ("value", "hint", "expected"),
        [
            ("outputs/x", Strings, ["outputs/x"]),
            (("a", "b"), Strings, ["a", "b"]),
            (0.5, Numbers, [0.5]),
            ("0.5", Numbers, [0.5]),
            (["2", 1], Numbers, [2.0, 1]),
            (4.0, int, 4),
            ("4", int | None, 4),
            ("1e-4", float, 1e-4),
            (4, float, 4),
            ("no", bool, False),
            ("True", bool | None, True),
            (1, bool, True),
            (None, int | None, None),
            ("bfloat16", Precision, "bfloat16"),
            ({"a": "2"}, dict[str, float], {"a": 2.0}),
            ('{"a": 1}', Mapping, '{"a": 1}'),
            ({"a": None}, Mapping, {"a": None}),
            ("a", None | str | list[str], "a"),
            (Path("a"), str, Path("a")),
        ],
    )
    def test_values_that_can_be_read_in_one_way(self, value, hint, expected):
        converted = convert("field", value, hint)
        assert converted == expected
        assert type(converted) is type(expected)

    @pytest.mark.parametrize(
        ("value", "text", "hint", "expected"),
        [
            (False, "no", str, "no"),
            (2024, "2024", str | None, "2024"),
            (83, "0123", str | None, "0123"),
            (True, "true", str | None, "true"),
            ([False, 5], ["no", "5"], Strings, ["no", "5"]),
            (5, "5", Strings, ["5"]),
            (True, "true", bool | str, True),
            (False, "no", Literal["no", "steps"], "no"),
        ],
    )
    def test_a_file_s_own_spelling_is_a_text(self, value, text, hint, expected):
        assert convert("field", value, hint, text) == expected

    @pytest.mark.parametrize(
        ("value", "hint", "expected"),
        [
            (None, float, "is null, but must be a number, such as 0.5: leave it out"),
            (4.5, int, "must be an integer, such as 4, but is 4.5"),
            ("many", int, "must be an integer, such as 4, but is 'many'"),
            ("nan", int, "must be an integer"),
            (True, int | None, "must be an integer, such as 4, but is True, true or false"),
            ([1], int, "is [1], a list: write one value without brackets"),
            ({"a": 1}, float, "a mapping: write one value"),
            ("a", Numbers, "must be a number, such as 0.5, but is 'a'"),
            ([0.5, None], Numbers, "`field[1]` is null"),
            ({"a": 1}, Strings, "must be a list, such as [a, b], but is {'a': 1}"),
            ("maybe", bool, "must be true or false"),
            ("bf16", Precision, "must be one of 'float32', 'bfloat16', but is 'bf16'"),
            ([1], Mapping, "must be a mapping, such as {a: 1}"),
            ("revision", Mapping, "must be a mapping, or JSON of one"),
            ('{"a": }', Mapping, "must be a mapping, or JSON of one"),
        ],
    )
    def test_others_are_refused_in_one_line(self, value, hint, expected):
        with pytest.raises(ValueError) as error:
            convert("field", value, hint)
        assert str(error.value).startswith("`field")
        assert expected in str(error.value)
        assert "\n" not in str(error.value)

    def test_the_home_directory(self, monkeypatch):
        monkeypatch.setenv("HOME", "/my/home")
        assert convert("field", "~/x", str | None) == "/my/home/x"
        assert convert("field", ["~/x", "a ~ b"], Strings) == ["/my/home/x", "a ~ b"]
        assert convert("field", "~", str) == "~"


@dataclass
class Arguments:
    names: list[str] = field(default_factory=list)
    steps: int = 1


def test_fields_are_converted_in_place():
    arguments = Arguments(names="a", steps=2.0)
    convert_fields(arguments)
    assert arguments == Arguments(["a"], 2)


class TestConfigurations:
    """What people pass to the constructors."""

    def make(self, config_class, tmp_path, **kwargs):
        return config_class(str(tmp_path), use_cpu=True, bf16=False, **kwargs)

    def test_single_values_for_lists(self, tmp_path):
        args = self.make(TAPOConfig, tmp_path, pairing="spo", pair_threshold=0.5, reward_weights=2.0, resolution="64")
        assert (args.pair_threshold, args.reward_weights, args.resolution) == ([0.5], [2.0], 64)
        args = self.make(SLRMConfig, tmp_path, eval_sigmas="0.5", eval_rules="none", resolution=64.0)
        assert (args.eval_sigmas, args.eval_rules, args.resolution) == ([0.5], ["none"], 64)

    @pytest.mark.parametrize("config_class", [TAPOConfig, SLRMConfig, DiffusionDPOConfig])
    def test_errors_name_the_field(self, tmp_path, config_class):
        with pytest.raises(ValueError, match="`max_steps` must be an integer, such as 4, but is 1.5"):
            self.make(config_class, tmp_path, max_steps=1.5)
        with pytest.raises(ValueError, match="`model_init_kwargs` must be a mapping"):
            self.make(config_class, tmp_path, model_init_kwargs="revision")

    def test_a_configuration_can_be_made_of_another(self, tmp_path):
        args = self.make(TAPOConfig, tmp_path)
        convert_fields(args)
        assert self.make(TAPOConfig, tmp_path, lr_scheduler_type=args.lr_scheduler_type).to_dict() == args.to_dict()
