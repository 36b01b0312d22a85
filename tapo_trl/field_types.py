# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Values of configurations as people write them, brought to the types that the fields of a dataclass ask for."""

import functools
import json
import os
from dataclasses import field, fields
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .moved import moved_names


_NAMES = {
    bool: "true or false",
    int: "an integer, such as 4",
    float: "a number, such as 0.5",
    str: "text",
    list: "a list, such as [a, b]",
    dict: "a mapping, such as {a: 1}",
}
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def option(help: str, default: Any = None, choices: list | None = None) -> Any:
    """
    Field of a dataclass of options.

    Args:
        help (`str`): What it does, for `--help` and the documentation.
        default (`Any`, *optional*): Its default. A list is copied for each instance.
        choices (`list`, *optional*): The values that the command line takes.
    """
    metadata = {"help": help} | ({} if choices is None else {"choices": choices})
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@functools.cache
def field_types(dataclass_type: type) -> dict[str, Any]:
    """Types of the fields of a dataclass, by name."""
    hints = get_type_hints(dataclass_type)
    return {own.name: hints[own.name] for own in fields(dataclass_type)}


def convert_fields(config: Any) -> None:
    """
    Convert the fields of a dataclass in place, see [`convert`]. Call it at the start of `__post_init__`. `None` stays.

    Args:
        config: an instance of a dataclass.

    Raises:
        ValueError: if a value cannot be what its field is declared as.
    """
    for name, hint in field_types(type(config)).items():
        value = getattr(config, name)
        if value is not None:
            converted = convert(name, value, hint)
            if converted is not value:
                setattr(config, name, converted)


def read_mapping(config: Any, name: str) -> None:
    """[`convert_fields`], and the mapping of a field that may be written as JSON."""
    convert_fields(config)
    if isinstance(getattr(config, name), str):
        setattr(config, name, json.loads(getattr(config, name)))


def convert(name: str, value: Any, hint: Any, text: Any = None) -> Any:
    """
    A value as its field asks for it, if there is one way to read it: a single value for a list is a list of one, 4.0 and "4"
    are the integer 4, "0.5" is a number, and `~/` at the start of a text is the home directory. Objects of other types than
    those of YAML are left alone, and so is what a text field gets that is none, unless its `text` is known.

    Args:
        name (`str`): name of the field, for the error.
        value: what was written.
        hint: type of the field.
        text (`str`, *optional*): how a file spells `value`, which is what text fields get: `no` and `2024` in YAML.

    Raises:
        ValueError: if the value cannot be read so; one line with the field, what it wants and what it got.
    """
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and NoneType not in options:
        raise ValueError(f"`{name}` is null, but must be {_describe(options)}: leave it out for the default.")
    if isinstance(value, float) and value != value:
        raise ValueError(f"`{name}` must be {_describe(options)}, but is NaN.")
    if value is None or (text is None and not isinstance(value, (str, bool, int, float, list, tuple, dict))):
        return value
    for option in options:
        if _is(value, option):
            return _convert_parts(name, value, option, options, text)
    for option in options:
        converted = _convert_scalar(name, value, option, text)
        if converted is not None:
            return converted
    if str in options and text is None and isinstance(value, (bool, int, float)):
        return value
    raise ValueError(f"`{name}` must be {_describe(options)}, but is {value!r}{_fix(value)}.")


def _is(value: Any, option: Any) -> bool:
    """Whether `value` has the type `option`, parts of lists and mappings left aside."""
    origin = get_origin(option) or option
    if origin is Any:
        return True
    if origin is Literal:
        return value in get_args(option)
    if isinstance(value, bool):
        return origin is bool
    if origin is float:
        return isinstance(value, (int, float))
    if origin is list:
        return isinstance(value, (list, tuple))
    return isinstance(origin, type) and isinstance(value, origin)


def _convert_parts(name: str, value: Any, option: Any, options: tuple, text: Any) -> Any:
    """`value`, which has the type `option`, with its parts converted."""
    arguments = get_args(option)
    if isinstance(value, str):
        if any(get_origin(other) is dict for other in options):
            _check_json(name, value)
        return os.path.expanduser(value) if value.startswith("~/") and str in options else value
    if isinstance(value, (list, tuple)) and arguments:
        texts = text if isinstance(text, list) and len(text) == len(value) else [None] * len(value)
        parts = [
            convert(f"{name}[{index}]", part, arguments[0], part_text)
            for index, (part, part_text) in enumerate(zip(value, texts, strict=True))
        ]
        is_same = isinstance(value, list) and all(new is old for new, old in zip(parts, value, strict=True))
        return value if is_same else parts
    if isinstance(value, dict) and arguments and arguments[0] is str and isinstance(text, dict):
        if len(text) == len(value) and not all(isinstance(key, str) for key in value):  # `no` and `1` are keys, too
            value = dict(zip(text, value.values(), strict=True))
    if isinstance(value, dict) and arguments and arguments[1] is not Any:
        parts = {key: convert(f"{name}[{key}]", part, arguments[1]) for key, part in value.items()}
        return value if all(parts[key] is value[key] for key in value) else parts
    return value


def _convert_scalar(name: str, value: Any, option: Any, text: Any) -> Any:
    """`value`, which does not have the type `option`, in that type, or `None`."""
    if get_origin(option) is list and not isinstance(value, (list, dict)):
        return [convert(name, value, get_args(option)[0], text)]
    if option is str or (isinstance(option, type) and issubclass(option, Enum)):
        return text if isinstance(text, str) and not isinstance(value, (list, dict)) else None
    if get_origin(option) is Literal:
        return text if text in get_args(option) else None
    if option is bool:
        return BOOLEANS.get(str(value).lower()) if not isinstance(value, float) else None
    if option in (int, float) and isinstance(value, (str, float)):
        try:
            number = float(value)
            return number if option is float else int(number) if number == int(number) else None
        except (ValueError, OverflowError):
            return None
    return None


def _check_json(name: str, value: str) -> None:
    try:
        is_mapping = isinstance(json.loads(value), dict)
    except json.JSONDecodeError:
        is_mapping = False
    if not is_mapping:
        raise ValueError(f"`{name}` must be a mapping, or JSON of one such as '{{\"a\": 1}}', but is {value!r}.")


def _describe(options: tuple) -> str:
    words = []
    for option in options:
        origin = get_origin(option) or option
        if origin is Literal:
            words.append("one of " + ", ".join(map(repr, get_args(option))))
        elif origin is not NoneType and not (origin is str and any(get_origin(other) is dict for other in options)):
            words.append(_NAMES.get(origin, "text"))
    return " or ".join(dict.fromkeys(words))


def _fix(value: Any) -> str:
    """What is written in another way than it is meant to be."""
    if isinstance(value, (list, tuple)):
        return ", a list: write one value without brackets"
    if isinstance(value, dict):
        return ", a mapping: write one value"
    return ", true or false" if isinstance(value, bool) else ""


__getattr__ = moved_names(__name__)
