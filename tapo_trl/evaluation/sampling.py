# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Samples of a benchmark's prompts, in the files that its own tool expects."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from datasets import Dataset

from ..data.videos import write_video
from ..files import atomic_write
from ..media.pictures import images_to_pil
from .prompts import find_benchmark


FLICKERING_SAMPLES = 25  # per prompt of VBench's dimension temporal_flickering


class Item(NamedTuple):
    """One file of a benchmark, with the row of its prompt."""

    row: int
    prompt: str
    seed: int
    file: Path


def _file_name(name: str) -> str:
    if "/" in name or len(name.encode()) > 255:
        raise ValueError(f"This benchmark names a file after its prompt, and no file can be named {name!r}.")
    return name


def _items_of_geneval(rows: Dataset, samples: int) -> list[list[Path]]:
    return [
        [Path(f"{row:05d}", "samples", f"{index:04d}.png") for index in range(samples)] for row in range(len(rows))
    ]


def _items_of_compbench(rows: Dataset, samples: int) -> list[list[Path]]:
    # The last six digits are the id of the sample, not its number within the prompt
    return [
        [Path("samples", _file_name(f"{prompt}_{row * samples + index:06d}.png")) for index in range(samples)]
        for row, prompt in enumerate(rows["prompt"])
    ]


def _items_of_vbench(rows: Dataset, samples: int) -> list[list[Path]]:
    found: dict[str, list[Path]] = {}
    for row in rows:
        number = max(samples, FLICKERING_SAMPLES) if "temporal_flickering" in row["dimension"] else samples
        # In a folder of their own: the tool takes the suffix of whatever file it lists first for that of the videos
        files = [Path("videos", _file_name(f"{row['prompt']}-{index}.mp4")) for index in range(number)]
        if len(files) > len(found.get(row["prompt"], [])):
            found[row["prompt"]] = files
    # The same prompt may stand in two rows, and is sampled once
    return [found.pop(prompt, []) for prompt in rows["prompt"]]


def _items_of_others(rows: Dataset, samples: int) -> list[list[Path]]:
    return [[Path(f"{row:05d}_{index}.png") for index in range(samples)] for row in range(len(rows))]


_LAYOUTS = {"geneval": _items_of_geneval, "compbench": _items_of_compbench, "vbench": _items_of_vbench}


def list_items(name: str, rows: Dataset, samples_per_prompt: int | None = None, seed: int = 0) -> list[Item]:
    """
    The files of a benchmark. Each has a seed of its own, so that a sample does not depend on which others are drawn.

    Args:
        name (`str`): Name of the benchmark.
        rows (`Dataset`): Its prompts, from [`load_prompts`].
        samples_per_prompt (`int`, *optional*): By default the benchmark's. VBench's flickering prompts take 25.
        seed (`int`, *optional*, defaults to `0`): Seed of the first file.
    """
    samples = samples_per_prompt or find_benchmark(name).samples_per_prompt
    files = _LAYOUTS.get(name.split("/")[0], _items_of_others)(rows, samples)
    flat = [(row, file) for row, of_row in enumerate(files) for file in of_row]
    prompts = rows["prompt"]
    return [Item(row, prompts[row], seed + index, file) for index, (row, file) in enumerate(flat)]


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """
    Make sure that all samples of a folder have the same settings: write the settings to a new folder, or compare with
    those of an existing one.

    Raises:
        ValueError: if the folder has samples that were drawn otherwise.
    """
    file, text = folder / "sampling.json", json.dumps(settings, indent=2, sort_keys=True) + "\n"
    if file.exists() and file.read_text(encoding="utf-8") != text:
        settings = json.loads(text)  # lists in place of tuples, as in the file
        try:
            before = dict(json.loads(file.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{file}, which says how the samples in {folder} were drawn, cannot be read ({error}): give another `samples_dir`."
            ) from error
        changed = sorted(name for name in {**before, **settings} if before.get(name) != settings.get(name))
        raise ValueError(
            f"{folder} has samples with other settings ({', '.join(changed)}): give another `samples_dir`."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as aside:
        aside.write_text(text, encoding="utf-8")


def sample_benchmark(
    name: str,
    rows: Dataset,
    draw: Callable[[list[str], Sequence[int]], torch.Tensor],
    folder: str | Path,
    *,
    settings: dict[str, Any],
    samples_per_prompt: int | None = None,
    batch_size: int = 4,
    fps: int = 16,
    seed: int = 0,
) -> list[Item]:
    """
    Draw the samples of a benchmark that are missing in a folder. Processes of `accelerate launch` share the work.
    Files are written atomically, so an interrupted run continues where it stopped.

    Args:
        name (`str`): Name of the benchmark.
        rows (`Dataset`): Its prompts, from [`load_prompts`].
        draw (`Callable`): Prompts and their seeds to samples of shape `(B, 3, H, W)` or `(B, 3, F, H, W)` in [0, 1].
        folder (`str` or `Path`): Where the files go.
        settings (`dict[str, Any]`): Everything that the samples depend on: model, LoRA, sampling options. Saved in
        `sampling.json`.
        samples_per_prompt (`int`, *optional*): By default the benchmark's.
        batch_size (`int`, *optional*, defaults to `4`): Samples at once.
        fps (`int`, *optional*, defaults to `16`): Frames per second of videos.
        seed (`int`, *optional*, defaults to `0`): Seed of the first file.

    Returns:
        `list[Item]`: All files of the benchmark, with their prompts.
    """
    folder, state = Path(folder), PartialState()
    items = list_items(name, rows, samples_per_prompt, seed)
    digest = hashlib.sha256("\n".join(rows["prompt"]).encode()).hexdigest()
    with state.main_process_first():
        check_settings(folder, {**settings, "seed": seed, "samples_per_prompt": samples_per_prompt, "prompts": digest})
        if state.is_main_process and name == "geneval":
            for row, metadata in enumerate(rows["metadata"]):
                (folder / f"{row:05d}").mkdir(exist_ok=True)
                (folder / f"{row:05d}" / "metadata.jsonl").write_text(metadata + "\n", encoding="utf-8")

    missing = [item for item in items if not (folder / item.file).exists()][state.process_index :: state.num_processes]
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        samples = draw([item.prompt for item in batch], [item.seed for item in batch])
        for item, sample in zip(batch, samples, strict=True):
            file = folder / item.file
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as aside:
                if sample.ndim == 4:
                    write_video(aside, sample, fps)
                else:
                    images_to_pil(sample[None])[0].save(aside, format="PNG")
    state.wait_for_everyone()
    return items
