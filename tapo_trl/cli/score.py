# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import csv
import json
from pathlib import Path

from .parser import FolderParser, RecipeParser
from .tables import format_mean, format_table


def make_parser() -> RecipeParser:
    """Parser of `tapo-trl score`."""
    from ..trainer.model_config import PipelineConfig
    from .arguments import ScoreArguments

    return FolderParser((ScoreArguments, PipelineConfig), prog="tapo-trl score")


def match_prompts(files: list[Path], prompts: list[str]) -> tuple[list[str], dict[str, list]]:
    """
    The prompt of each file, and further columns.

    Args:
        files (`list[Path]`): The samples.
        prompts (`list[str]`): See [`ScoreArguments`].

    Raises:
        ValueError: if files and prompts do not belong together.
    """
    from ..data.loading import read_prompts_and_columns

    if len(prompts) == 1 and prompts[0].endswith(".json"):
        by_name = read_prompts_by_name(Path(prompts[0]))
        missing = [file.name for file in files if file.name not in by_name]
        if missing:
            raise ValueError(f"`prompts`: {prompts[0]} has no prompt for {missing[:3]}.")
        return [by_name[file.name] for file in files], {}
    prompts, columns = read_prompts_and_columns(prompts, "prompts")
    if len(prompts) != len(files):
        raise ValueError(
            f"`prompts`: there are {len(prompts)} prompts for the {len(files)} files in {files[0].parent}. Give one for each, in the "
            "order of the names, or a .json file `{file name: prompt}`."
        )
    return prompts, columns


def read_prompts_by_name(path: Path) -> dict[str, str]:
    """The prompts of a .json file, by the names of the files that they belong to."""
    if not path.is_file():
        raise FileNotFoundError(f"`prompts`: there is no file {path}.")
    try:
        by_name = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"`prompts`: {path} is no JSON ({error}).") from error
    if not isinstance(by_name, dict) or not all(isinstance(prompt, str) for prompt in by_name.values()):
        raise ValueError(f"`prompts`: {path} must be an object `{{file name: prompt}}`, with a text for each file.")
    return by_name


def score_folder(args, model_args) -> tuple[list[Path], list[str], dict]:
    """
    Rates the samples of a folder.

    Args:
        args ([`ScoreArguments`]): The samples, the prompts and the rewards.
        model_args ([`PipelineConfig`]): The pipeline of latent reward models; by default the one each was trained from.

    Returns:
        `tuple`: The files, their prompts, and their scores as `{reward: torch.Tensor}`.
    """
    from accelerate import PartialState

    from ..evaluation.scores import SampleFiles, check_scorers, find_samples, load_scorers, score_samples
    from ..policies import load_policy
    from ..scripts.utils import load_functions

    device = PartialState().device

    def load_base(name: str):
        name, revision = model_args.model_name_or_path or name, model_args.model_revision
        policy = load_policy(name, torch_dtype=model_args.dtype, revision=revision)
        policy.pipeline.to(device)
        return policy

    files = find_samples(args.folder)
    samples, (prompts, columns) = SampleFiles(files), match_prompts(files, args.prompts)
    samples.check()
    scorers = load_scorers(load_functions(args.reward_model), args.reward_model_init_kwargs, load_base)
    check_scorers(scorers, prompts, columns=columns)
    return files, prompts, score_samples(scorers, samples, prompts, device, columns)


def main(args, model_args) -> None:
    """
    Rates the samples of a folder, prints a table and, with `output_file`, writes the scores, see [`write_scores`].

    Args:
        args ([`ScoreArguments`]): What to rate.
        model_args ([`PipelineConfig`]): The pipeline of latent reward models.
    """
    from ..evaluation.scores import summarize

    files, prompts, scores = score_folder(args, model_args)
    statistics = {spec: summarize(values) for spec, values in scores.items()}
    rows = [
        {"reward": spec, "mean": format_mean(values), "n": str(values["n"])} for spec, values in statistics.items()
    ]
    print(format_table(rows))
    if args.output_file is not None:
        of_files = [
            {"file": file.name, "prompt": prompt, **{spec: values[row].item() for spec, values in scores.items()}}
            for row, (file, prompt) in enumerate(zip(files, prompts, strict=True))
        ]
        write_scores(Path(args.output_file), statistics, of_files)


def write_scores(path: Path, statistics: dict, of_files: list[dict]) -> None:
    """
    Writes `{"rewards": ..., "files": [...]}` as JSON, or the latter alone as CSV.

    Args:
        path (`Path`): The file, made with its folder. `.csv` makes it a table.
        statistics (`dict`): Mean, standard error and number by reward.
        of_files (`list[dict]`): Name, prompt and scores of each file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, of_files[0].keys())
            writer.writeheader()
            writer.writerows(of_files)
        return
    text = json.dumps({"rewards": statistics, "files": of_files}, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
