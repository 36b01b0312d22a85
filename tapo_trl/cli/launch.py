# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""`--accelerate_config`: start a training on several processes, as TRL's command line does."""

from argparse import ArgumentParser
from pathlib import Path


ACCELERATE_CONFIG = "--accelerate_config"


def is_launch(argv: list[str]) -> bool:
    """Whether a command line asks for `accelerate launch`."""
    return any(arg.split("=", 1)[0] == ACCELERATE_CONFIG for arg in argv)


def launch(command: str, argv: list[str]) -> None:
    """
    Start a training command with `accelerate launch`.

    Args:
        command (`str`): Name of the command.
        argv (`list[str]`): Its flags, with `--accelerate_config`. Flags that only `accelerate launch` has, such as
            `--num_processes`, go to the launcher.

    Raises:
        ValueError: if there is no such configuration.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    from .main import command_module

    launcher, command_flags = launch_command_parser(), command_module(command).make_parser()._option_string_actions
    flags = ArgumentParser(prog=f"tapo-trl {command}", add_help=False, allow_abbrev=False)
    flags.add_argument(ACCELERATE_CONFIG, required=True)
    for action in launcher._actions:
        if action.option_strings and not command_flags.keys() & set(action.option_strings):
            flags._add_action(action)
    launch_args, command_argv = flags.parse_known_args(argv)
    args = launcher.parse_args(["tapo_trl.cli", command, *command_argv], namespace=launch_args)
    args.module, args.config_file = True, str(find_accelerate_config(launch_args.accelerate_config))
    launch_command(args)


def find_accelerate_config(name: str) -> Path:
    """
    An accelerate configuration: a file, or the name of one in `recipes/accelerate` or in TRL.

    Raises:
        ValueError: if there is none.
    """
    if Path(name).is_file():
        return Path(name)
    import trl

    from ..checkout import find_in_checkout

    folders = [find_in_checkout("recipes/accelerate"), Path(trl.__file__).parent / "accelerate_configs"]
    found = {file.stem: file for folder in reversed(folders) if folder is not None for file in folder.glob("*.yaml")}
    if name not in found:
        raise ValueError(f"`{ACCELERATE_CONFIG}`: {name} is neither a file nor one of {', '.join(sorted(found))}.")
    return found[name]
