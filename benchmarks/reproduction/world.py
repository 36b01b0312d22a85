# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What the experiments need to know of the models, the data and the judges that they are made with."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


Judge = Callable[[torch.Tensor, list[str]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class World:
    """
    A base pipeline with preference pairs, prompts and judges.

    Args:
        name (`str`): its name.
        recipes (`dict[str, str]`):
            Recipe of each command (`slrm`, `tapo`, `dpo`, `online_dpo`, `grpo`) and of each other reward model
            (`slrm_lrm`, `slrm_dina`, `slrm_spm`). They hold all that no experiment changes: the pipeline, the data, its size.
        pairs (`dict[str, str]`): parquet file of preference pairs of the splits `validation` and `test`.
        prompts (`dict[str, str]`): text file of prompts, one per line, of the same splits.
        judge (`Callable`):
            `judge(samples, prompts) -> {name: values}`: samples as [`FlowPolicy.decode`] gives them, and one value per
            sample, the higher the better. Judges never enter a training.
        primary (`str`): the judge that learning rates are chosen by, on `validation`.
        describe (`dict[str, str]`): what each judge says, for the tables.
        learning_rates (`dict[str, tuple[float, ...]]`):
            Those that are tried for every method first, by command. The search goes on by their factor, see [`Lab.at_budget`].
        prompts_per_step (`int`): prompts per step of the online methods.
        num_steps (`int`): steps of TAPO with its default options. Other methods get as many as cost the same.
        num_inference_steps (`int`): T, of rollouts and of samples that are judged.
        guidance_scale (`float`): that of both.
    """

    name: str
    recipes: dict[str, str]
    pairs: dict[str, str]
    prompts: dict[str, str]
    judge: Judge
    primary: str
    describe: dict[str, str]
    learning_rates: dict[str, tuple[float, ...]]
    prompts_per_step: int
    num_steps: int
    num_inference_steps: int
    guidance_scale: float


def load_world(name: str) -> World:
    """
    Read the variable `WORLD` of a file `world.py`.

    Args:
        name (`str`): a folder, or the name of one in `examples`.

    Raises:
        ValueError: if there is no such file or variable, or if one of the files that it names is missing.
    """
    folders = [Path(name), Path("examples") / name]
    file = next((folder / "world.py" for folder in folders if (folder / "world.py").is_file()), None)
    if file is None:
        raise ValueError(
            f"`world={name}`: there is neither {folders[0] / 'world.py'} nor {folders[1] / 'world.py'}. Start from the "
            "repository's root, or name a folder with a `world.py`."
        )
    folder = str(file.parent.resolve())
    if folder not in sys.path:  # a world may import the scripts beside it
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(f"tapo_trl_world_{file.parent.name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    world = vars(module).get("WORLD")
    if not isinstance(world, World):
        raise ValueError(f"{file} must define `WORLD`, a `tapo_trl.reproduction.World`.")
    files = [*world.recipes.values(), *world.pairs.values(), *world.prompts.values()]
    missing = [path for path in files if not Path(path).is_file()]
    if missing:
        raise ValueError(f"{file} names files that do not exist: {missing}. Its README says how they are made.")
    return world
