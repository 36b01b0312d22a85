# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import importlib
import sys
from types import ModuleType

from .launch import is_launch, launch


TRAININGS = {
    "slrm": "train a latent reward model on preference pairs",
    "tapo": "align a text-to-image or text-to-video model with a reward, by TAPO",
    "online_dpo": "align with Diffusion-DPO on the best and the worst of the model's own samples",
    "grpo": "align with Flow-GRPO, a policy gradient on the sampling steps",
    "nft": "align with DiffusionNFT, flow matching towards good samples and away from bad ones",
    "refl": "align with ReFL, the gradient of a differentiable reward",
    "sft": "fine-tune on images or videos with prompts, by flow matching",
    "dpo": "align with Diffusion-DPO on collected preference pairs",
}
COMMANDS = {
    **TRAININGS,
    "evaluate": "measure rewards on held-out pairs, or a model by its samples and on public benchmarks",
    "score": "score the images or videos of a folder",
    "rewards": "list the pretrained rewards, which `reward_model` accepts by name",
    "diagnose": "plot how a reward model ranks pairs at each noise level, and the curves of training runs",
    "reproduce": "repeat the paper's tables and figures on a small test problem",
    "bench": "measure time and memory of TAPO training on this machine, with random weights",
    "sample": "draw images or videos, with or without a trained LoRA",
    "merge": "write a pipeline with a trained LoRA merged, or the LoRA for ComfyUI",
    "prompts": "write the prompts of a study from meta elements, by templates or a language model",
    "pairs": "draw the images or videos of a study with two or more models, and pair them",
    "study": "compare several methods in a blind user study, and print its results",
    "annotate": "serve the page on which people compare the pairs of a study",
    "votes": "report agreement and win rates of a study, and export its votes as preference pairs",
    "rounds": "sample, annotate, train a reward model and align with it, round after round",
}

USAGE = """usage: tapo-trl COMMAND [--config recipe.yaml] [--any_field value ...]

commands:
{commands}

`tapo-trl COMMAND --help` lists every field. To train on several processes, pass `--accelerate_config multi_gpu` (a
file, or the name of one in recipes/accelerate). It runs
`accelerate launch --config_file ... -m tapo_trl.cli COMMAND ...`."""


def command_module(name: str) -> ModuleType:
    """The module of a command, with its `make_parser` and `main`."""
    if name == "reproduce":
        return importlib.import_module("tapo_trl.reproduction.command")
    package = "scripts" if name in TRAININGS else "cli"
    return importlib.import_module(f"tapo_trl.{package}.{name}")


def main(argv: list[str] | None = None) -> int:
    """Entry point of `tapo-trl`. Runs one command and returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    usage = USAGE.format(commands="\n".join(f"  {name:<11}{text}" for name, text in COMMANDS.items()))
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0
    if argv[0] == "--version":
        from ..version import __version__

        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"tapo-trl: error: unknown command `{argv[0]}`\n\n{usage}", file=sys.stderr)
        return 2
    name, flags = argv[0], argv[1:]
    try:
        if name in TRAININGS and is_launch(flags):
            launch(name, flags)
            return 0
        command = command_module(name)
    except (ImportError, ValueError) as error:
        if isinstance(error, ImportError) and name != "reproduce":
            raise
        print(f"tapo-trl {name}: error: {error}", file=sys.stderr)
        return 2
    command.main(*command.make_parser().parse_args_and_config(flags))
    return 0
