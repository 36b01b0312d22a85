# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The models of a study, and the media that they make: one file per prompt and model."""

import hashlib
import json
import re
import shutil
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import PartialState

from ..data.videos import write_video
from ..evaluation.baselines import Baseline
from ..evaluation.scores import find_samples
from ..files import atomic_write
from ..media.pictures import images_to_pil
from ..policies import load_policy
from ..policies.loading import family_of
from .study import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Study


@dataclass
class Source:
    """
    Where media come from: a pipeline of diffusers, called as its own `__call__` does, or a folder of files.

    Args:
        name (`str`): What it is called in results. People never see it.
        model (`str`, *optional*): Hub id or folder of a text-to-image or text-to-video pipeline.
        lora (`str`, *optional*): LoRA for it.
        options (`dict[str, Any]`, *optional*): Arguments of the pipeline's `__call__`.
        folder (`str`, *optional*): In place of `model`: a folder with a file per prompt, in the order of the prompts or named by `prompt_id`.
        fps (`float`, *optional*, defaults to `16.0`): Frames per second of videos.
        dtype (`str`, *optional*, defaults to `"bfloat16"`): Precision of the weights.
        seed (`int`, *optional*, defaults to `0`): Added to the seeds. Another one gives other samples of the same model.
    """

    name: str
    model: str | None = None
    lora: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    folder: str | None = None
    fps: float = 16.0
    dtype: str = "bfloat16"
    seed: int = 0

    def __post_init__(self):
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"{self.name!r} is no name of a source: use letters, digits, `.`, `_` and `-`.")
        if (self.model is None) == (self.folder is None):
            raise ValueError(f"The source {self.name} needs either `model` or `folder`.")
        if self.folder is not None and (self.lora or self.options):
            raise ValueError(f"The source {self.name} is a folder: leave out `lora` and `options`.")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"The source {self.name}: {self.dtype!r} is no precision, such as bfloat16.")


def seed_of(study: Study, source: Source, prompt_id: str) -> int:
    """Seed of a medium: it depends on neither the process nor the other prompts. Models of one `seed` start from the same noise."""
    digest = hashlib.sha256(f"{study.seed} {source.seed} {prompt_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _settings(study: Study, source: Source) -> dict[str, Any]:
    return {**asdict(source), "study_seed": study.seed}


def check_source(study: Study, source: Source) -> Path:
    """
    The folder of a source's media. Its `source.json` tells how they were made.

    Raises:
        ValueError: if it holds media that were made otherwise.
    """
    folder = study.folder / "media" / source.name
    file, text = folder / "source.json", json.dumps(_settings(study, source), indent=2, sort_keys=True) + "\n"
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{folder} has media that were made with other settings (see source.json): give the source another name."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as aside:
        aside.write_text(text, encoding="utf-8")
    return folder


def find_medium(folder: Path, prompt_id: str) -> Path | None:
    """The finished file of a prompt, if there is one."""
    for suffix in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES):
        if (folder / (prompt_id + suffix)).exists():
            return folder / (prompt_id + suffix)
    return None


def make_media(
    study: Study, source: Source, prompts: Sequence[dict[str, Any]], batch_size: int = 1, retry_failed: bool = False
) -> list[str]:
    """
    Make the media of a source that are missing, a file per prompt. Processes of `accelerate launch` share the prompts, and never wait for each
    other. A file is whole or not there, so that an interrupted run goes on where it stopped, with any number of processes, to the same bytes
    (on a GPU: with the same `batch_size`).

    Args:
        study ([`Study`]): The study.
        source ([`Source`]): The model.
        prompts (`Sequence[dict]`): Rows of `prompts.jsonl`.
        batch_size (`int`, *optional*, defaults to `1`): Prompts at once.
        retry_failed (`bool`, *optional*, defaults to `False`): Try what failed before again.

    Returns:
        `list[str]`: What failed, here or before: source, prompt and reason. A failed prompt does not stop the others.
    """
    state, folder = PartialState(), check_source(study, source)
    own = prompts[state.process_index :: state.num_processes]
    if source.folder is not None:
        _take_files(source, folder, prompts, own)
        return []
    errors = {row["prompt_id"]: folder / f"{row['prompt_id']}.error.json" for row in own}
    missing = [row for row in own if find_medium(folder, row["prompt_id"]) is None]
    missing = [row for row in missing if retry_failed or not errors[row["prompt_id"]].exists()]
    if missing:
        _draw(study, source, folder, missing, batch_size, state.device)
    return [
        f"{source.name}, prompt {row['prompt_id']} ({row['prompt'][:60]}): "
        + json.loads(errors[row["prompt_id"]].read_text(encoding="utf-8"))["error"]
        for row in own
        if errors[row["prompt_id"]].exists()
    ]


def _draw(
    study: Study, source: Source, folder: Path, rows: Sequence[dict[str, Any]], batch_size: int, device: torch.device
) -> None:
    model = Baseline(source.name, source.model, getattr(torch, source.dtype), source.options)
    model.load(device)
    if source.lora is not None:
        if family_of(model.pipeline) is None:
            model.pipeline.load_lora_weights(source.lora, use_safetensors=True)
        else:  # of some families it is in two files, or another method loads it
            load_policy(model.pipeline).load_lora_weights(source.lora)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        if _draw_batch(study, source, folder, batch, model, device) or len(batch) == 1:
            continue
        for row in batch:  # one of them is at fault, and the others go on
            _draw_batch(study, source, folder, [row], model, device)


def _draw_batch(
    study: Study, source: Source, folder: Path, rows: Sequence[dict[str, Any]], model: Baseline, device: torch.device
) -> bool:
    seeds = [seed_of(study, source, row["prompt_id"]) for row in rows]
    try:
        samples = model.draw([row["prompt"] for row in rows], seeds, len(rows), device)
    except Exception as error:  # whatever a pipeline raises for one prompt: it is written down, and named at the end
        for row in rows if len(rows) == 1 else ():
            report = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            (folder / f"{row['prompt_id']}.error.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
        return False
    for row, seed, sample in zip(rows, seeds, samples, strict=True):
        _write(folder / row["prompt_id"], sample, source.fps)
        facts = {"prompt": row["prompt"], "seed": seed, **_settings(study, source), "shape": list(sample.shape)}
        facts |= {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "pipeline": type(model.pipeline).__name__,
        }
        (folder / f"{row['prompt_id']}.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
        (folder / f"{row['prompt_id']}.error.json").unlink(missing_ok=True)
    return True


def _write(stem: Path, sample: torch.Tensor, fps: float) -> None:
    is_video = sample.ndim == 4
    with atomic_write(stem.with_name(stem.name + (".mp4" if is_video else ".png"))) as aside:
        if is_video:
            write_video(aside, sample, fps)
        else:
            images_to_pil(sample[None])[0].save(aside, format="PNG")


def _take_files(
    source: Source, folder: Path, prompts: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]]
) -> None:
    files = find_samples(source.folder)
    unshown = [file.name for file in files if file.suffix.lower() not in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)]
    if unshown:
        raise ValueError(
            f"The source {source.name}: the page cannot show {unshown[0]}, only {', '.join((*VIDEO_SUFFIXES, *IMAGE_SUFFIXES))}."
        )
    by_name = {file.stem: file for file in files}
    names = [row["prompt_id"] for row in prompts]
    if not set(names) <= set(by_name):
        if len(files) != len(names):
            raise ValueError(
                f"The source {source.name}: {source.folder} has {len(files)} files for {len(names)} prompts. Give one for each, in the "
                "order of the prompts, or name them by `prompt_id`."
            )
        by_name = dict(zip(names, files, strict=True))
    for row in own:
        file = by_name[row["prompt_id"]]
        target = folder / (row["prompt_id"] + file.suffix.lower())
        if not target.exists():
            with atomic_write(target) as aside:
                shutil.copyfile(file, aside)
