# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
Atomic checkpoints. The last thing written into a checkpoint is its seal, a list of its files with their sizes and checksums:
a folder without a seal was never finished, one that does not match it is damaged.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from accelerate.utils import wait_for_everyone
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, rotate_checkpoints
from transformers.utils import logging

from ..field_types import BOOLEANS
from ..files import atomic_write


logger = logging.get_logger(__name__)

SEAL_NAME = "checkpoint_seal.json"


def seal_checkpoint(folder: str | Path) -> None:
    """
    Flush every file of a finished checkpoint to the disk, then write its seal.

    Args:
        folder (`str` or `Path`): the checkpoint.
    """
    folder = Path(folder)
    files = {}
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "crc32": _crc32(path)}
    with atomic_write(folder / SEAL_NAME) as aside, aside.open("w", encoding="utf-8") as file:
        json.dump({"files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for directory in (folder, folder.parent):
        descriptor = os.open(directory, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def checkpoint_damage(folder: str | Path) -> str | None:
    """
    What is wrong with a checkpoint, or `None` if it is whole.

    Args:
        folder (`str` or `Path`): the checkpoint.
    """
    folder = Path(folder)
    if not (folder / SEAL_NAME).is_file():
        return "it was never finished"
    try:
        files = json.loads((folder / SEAL_NAME).read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError):
        return f"its `{SEAL_NAME}` cannot be read"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"`{name}` is missing"
        if path.stat().st_size != expected["size"] or _crc32(path) != expected["crc32"]:
            return f"`{name}` has changed since it was saved"
    return None


def last_good_checkpoint(output_dir: str | Path) -> Path | None:
    """
    The newest checkpoint of a run that is whole. Warns of newer ones that are not.

    Args:
        output_dir (`str` or `Path`): folder of the run.
    """
    for path in reversed(_checkpoints(output_dir)):
        damage = checkpoint_damage(path)
        if damage is None:
            return path
        logger.warning(f"The checkpoint {path} is not used: {damage}.")
    return None


def checkpoint_to_resume(resume_from_checkpoint: str | bool | Path | None, output_dir: str | Path) -> Path | None:
    """
    The checkpoint that a run goes on from, or `None` if it starts from the beginning.

    Args:
        resume_from_checkpoint (`str`, `bool` or `Path`, *optional*):
            Folder of a checkpoint; `True`, or a word for it such as `true` or `yes`, for the last one of `output_dir` that is
            whole; `False`, a word for it or `None` for none. The words may be written in any case.
        output_dir (`str` or `Path`): folder of the run.

    Raises:
        ValueError: if the folder that is named is not a whole checkpoint.
    """
    folder = _folder_to_resume(resume_from_checkpoint)
    if folder is True:
        last = last_good_checkpoint(output_dir)
        if last is None:
            logger.warning(f"There is no checkpoint to resume from in {output_dir}: starting anew.")
        return last
    damage = None if folder is None else checkpoint_damage(folder)
    if damage is not None:
        raise ValueError(
            f"`resume_from_checkpoint`: the checkpoint {folder} cannot be used: {damage}. Pass another one, or `True` for "
            "the last one that is whole."
        )
    return folder


def _folder_to_resume(resume_from_checkpoint: str | bool | Path | None) -> Path | Literal[True] | None:
    """What [`checkpoint_to_resume`] is asked for: a folder, which exists, or the last one, or nothing."""
    if isinstance(resume_from_checkpoint, str):
        word = resume_from_checkpoint.lower()
        resume_from_checkpoint = {**BOOLEANS, "": None, "none": None}.get(word, resume_from_checkpoint)
    if resume_from_checkpoint is True:
        return True
    if resume_from_checkpoint is None or resume_from_checkpoint is False:
        return None
    folder = Path(resume_from_checkpoint).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"`resume_from_checkpoint`: the checkpoint {folder} cannot be used: there is no such folder. Pass another one, or "
            "`True` for the last one that is whole."
        )
    return folder


def check_start(args: TrainingArguments) -> None:
    """
    What can be said of `args.resume_from_checkpoint` before anything is loaded or read.

    Raises:
        ValueError: if it names no folder, or see [`check_keeps_checkpoints`].
    """
    if _folder_to_resume(args.resume_from_checkpoint) is None:
        check_keeps_checkpoints(args, None)


def check_keeps_checkpoints(args: TrainingArguments, checkpoint: Path | None) -> None:
    """
    Refuse a start from the beginning that would overwrite the checkpoints of an earlier run, or rotate them away.

    Args:
        args ([`~transformers.TrainingArguments`]): the configuration.
        checkpoint (`Path`, *optional*): what the run goes on from, see [`checkpoint_to_resume`].

    Raises:
        ValueError: if `args.output_dir` holds finished checkpoints and the run is to save its own there.
    """
    finished = [path for path in _checkpoints(args.output_dir) if (path / SEAL_NAME).is_file()]
    if checkpoint is not None:
        replaced = [path.name for path in finished if _step(path) > (_step(checkpoint) or 0)]
        if replaced:
            logger.warning(
                f"{args.output_dir} has later checkpoints than {checkpoint}, which are replaced: {replaced}."
            )
    elif finished and args.save_strategy != SaveStrategy.NO:
        raise ValueError(
            f"`output_dir={args.output_dir}` holds checkpoints of an earlier run, {[path.name for path in finished]}, which "
            "a start from the beginning would overwrite. Set `resume_from_checkpoint=True` to go on from the last one, "
            "choose another `output_dir`, or remove them."
        )


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """Folders of checkpoints, by step."""
    return sorted((path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step(path)), key=_step)


def _step(path: Path) -> int | None:
    step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(step) if step.isdigit() and path.is_dir() else None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(SEAL_NAME))


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


class Checkpoints(TrainerCallback):
    """
    The checkpoints of a run, which a trainer holds. Add it as the last callback: on a save, it seals the checkpoint once every
    other callback has written into it, and only then deletes older ones.

    Args:
        args ([`~transformers.TrainingArguments`]): the configuration.
    """

    def __init__(self, args: TrainingArguments):
        self.args = args

    def folder(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """
        Inside, all processes write the checkpoint of a step. One that cannot be written leaves nothing behind.

        Raises:
            RuntimeError: if it cannot be written; earlier checkpoints are intact.
        """
        folder = self.folder(step)
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # of a run that was interrupted here
        wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # older ones go in `on_save`
        try:
            yield folder
        except Exception as error:  # a full disk is an OSError, a SafetensorError or a RuntimeError, by who writes
            shutil.rmtree(folder, ignore_errors=True)
            raise RuntimeError(
                f"The checkpoint of step {step} could not be written to {folder}: {error}. Earlier checkpoints are intact. If "
                "the disk is full, free some space; then go on with `resume_from_checkpoint=True`."
            ) from error
        finally:
            self.args.save_total_limit = limit

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        wait_for_everyone()
        if args.should_save:
            seal_checkpoint(self.folder(state.global_step))
            rotate_checkpoints(args.output_dir, args.save_total_limit, state.best_model_checkpoint, use_mtime=True)
        wait_for_everyone()

    def to_resume(self, resume_from_checkpoint: str | bool | None, has_started: bool) -> Path | None:
        """
        The checkpoint that a run goes on from, or `None`.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                See [`checkpoint_to_resume`]. Defaults to `args.resume_from_checkpoint`.
            has_started (`bool`): whether the trainer was trained before, and a second call goes on with its weights.

        Raises:
            ValueError: see [`checkpoint_to_resume`] and [`check_keeps_checkpoints`].
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        if not has_started:
            check_keeps_checkpoints(self.args, checkpoint)
        return checkpoint
