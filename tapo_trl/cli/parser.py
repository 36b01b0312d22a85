# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import difflib
import os
import sys
from argparse import ArgumentParser
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers.hf_argparser import string_to_bool
from trl import TrlParser

from ..field_types import convert, convert_fields, field_types
from ..files import check_folder_name


FOLDERS = {"output_dir", "cache_dir", "runs_dir"}


class _RecipeLoader(yaml.SafeLoader):
    """PyYAML's own keeps the last of several equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for position, (key, _) in enumerate(node.value):
            if key.value in keys[:position]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key.value}` is there twice: leave one out", key.start_mark
                )
        return super().construct_mapping(node, deep)


class RecipeParser(TrlParser):
    """
    A [`~trl.TrlParser`] whose errors are one line: a YAML key or a flag that no dataclass has is refused with the nearest
    one that exists, and a value that a dataclass refuses is reported in that dataclass's words, without a traceback. Values
    in the file are brought to the types of the fields, see [`~field_types.convert`].

    Flags override the file of `--config`, and the file overrides the defaults. Flags cannot be abbreviated.
    """

    def __init__(self, dataclass_types, prog: str, **kwargs):
        super().__init__(dataclass_types, prog=prog, allow_abbrev=False, **kwargs)
        resume = self._option_string_actions.get("--resume_from_checkpoint")
        if resume is not None:  # a word or a folder, but alone it means what a boolean flag does
            resume.nargs, resume.const = "?", "true"

    def error(self, message: str) -> NoReturn:
        """Prints `message` without the usage, which has hundreds of flags, and exits with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs) -> tuple:
        """
        Parses the command line and the file of `--config`.

        Args:
            args (`Iterable[str]`, *optional*): Command line; `sys.argv[1:]` by default.

        Returns:
            `tuple`: One instance of each dataclass.
        """
        args = list(sys.argv[1:] if args is None else args)
        args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
        config = {}
        if "--config" in args:
            position = args.index("--config")
            if position + 1 == len(args):
                self.error("`--config` needs the path of a YAML file.")
            config = self._read_config(Path(args[position + 1]).expanduser())
            del args[position : position + 2]
        self._check_flags(args)
        os.environ.update({name: str(value) for name, value in config.pop("env", {}).items()})
        self.set_defaults_with_config(**config)
        is_dry_run = self._is_dry_run(args, config)
        if is_dry_run:
            # It needs no accelerator, without which `bf16: true` would be refused.
            args += ["--use_cpu", "true"]
        try:
            parsed = super().parse_args_and_config(args, **kwargs)
            for part in parsed:
                convert_fields(part)
                for name in FOLDERS & vars(part).keys():
                    if getattr(part, name) is not None:
                        check_folder_name(getattr(part, name), name)
            if "resume_from_checkpoint" in self._field_names():
                self._check_training(parsed, is_dry_run)
        except ValueError as error:
            self.error(" ".join(str(error).split()))
        return parsed

    @staticmethod
    def _check_training(parsed: Iterable[Any], is_dry_run: bool) -> None:
        """What the parts of a training command must agree on. Imported here, for other commands start faster without."""
        from transformers import TrainingArguments

        from ..runs.checkpoints import check_start
        from ..runs.checks import check_precision
        from ..trainer.model_config import DiffusionModelConfig

        training = [part for part in parsed if isinstance(part, TrainingArguments)]
        for part in training if not is_dry_run else ():
            check_start(part)
        for part in parsed:
            if training and isinstance(part, DiffusionModelConfig):
                check_precision(training[0], torch_dtype=part.dtype)

    def _is_dry_run(self, args: list[str], config: dict[str, Any]) -> bool:
        if "dry_run" not in self._field_names():
            return False
        wanted = config.get("dry_run", False)
        flags = ArgumentParser(add_help=False, allow_abbrev=False)
        flags.add_argument("--dry_run", "--dry-run", type=string_to_bool, nargs="?", const=True, default=wanted)
        return flags.parse_known_args(args)[0].dry_run

    def _check_flags(self, args: list[str]) -> None:
        for arg in args:
            flag = arg.split("=", 1)[0]
            if flag.startswith("--") and flag != "--config" and flag not in self._option_string_actions:
                self.error(f"unknown flag `{flag}`." + self._nearest(flag.lstrip("-"), "--"))

    def _read_config(self, path: Path) -> dict[str, Any]:
        """The fields in a file, each in the type that its dataclass asks for."""
        if not path.is_file():
            self.error(f"`--config`: there is no file {path}.")
        try:
            text = path.read_text(encoding="utf-8-sig")
            config = yaml.load(text, _RecipeLoader)
            texts = yaml.load(text, yaml.BaseLoader)  # leaves all as text
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(f"{path} is not valid YAML: {' '.join(str(error).split())}")
        if not isinstance(config, dict):
            self.error(f"{path} must hold a YAML mapping of fields to values.")
        if not isinstance(config.get("env", {}), dict):
            self.error(f"`env` in {path} must be a mapping of environment variables to values.")
        types = {name: hint for kind in self.dataclass_types for name, hint in field_types(kind).items()}
        for key, value in config.items():
            if key == "env":
                continue
            if key not in self._field_names():
                self.error(f"unknown key `{key}` in {path}." + self._nearest(str(key)))
            try:
                config[key] = convert(key, value, types[key], texts.get(key))
            except ValueError as error:
                self.error(f"{path}: {error} (As a flag: `--{key}`.)")
        return config

    def _field_names(self) -> set[str]:
        return {action.dest for action in self._actions if action.dest != "help"}

    def _nearest(self, name: str, prefix: str = "") -> str:
        near = difflib.get_close_matches(name.replace("-", "_"), sorted(self._field_names()), n=1, cutoff=0.5)
        return f" Did you mean `{prefix}{near[0]}`?" if near else f" `{self.prog} --help` lists the fields."


class FolderParser(RecipeParser):
    """A [`RecipeParser`] that takes the field `folder` as its first word, too."""

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs) -> tuple:
        args = list(sys.argv[1:] if args is None else args)
        if args and not args[0].startswith("-"):
            args = ["--folder", *args]
        return super().parse_args_and_config(args, **kwargs)
