# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What people see of the media of a study: the part, size and frame rate that training will read."""

from pathlib import Path

import torch

from ..data.images import ImageReader, open_image
from ..data.videos import VideoReader, read_video, write_video
from ..files import atomic_write
from ..media.pictures import images_to_pil
from .study import Study, View, is_video


def check_medium(study: Study, medium: str) -> None:
    """
    Raises:
        BadFileError: if a medium does not exist, cannot be read, or is shorter than the view of the study.
    """
    file, place = study.folder / medium, f"{study.folder / medium}"
    if is_video(medium):
        view = study.view
        if view is None or view.num_frames is None:
            read_video(file)
        else:
            VideoReader(view.height, view.width, view.num_frames, view.fps).check(file, place)
    else:
        open_image(file, place)


def viewed_file(study: Study, medium: str) -> Path:
    """
    The file that people see of a medium. With a view it is cut and scaled once, as a trainer would, and kept in the folder `view`.

    Args:
        study ([`Study`]): The study.
        medium (`str`): File of the medium, relative to the folder.

    Raises:
        BadFileError: if the medium cannot be read.
    """
    view = study.view
    if view is None:
        return study.folder / medium
    size = f"{view.height}x{view.width}" + (f"x{view.num_frames}_{view.fps:g}" if is_video(medium) else "")
    shown = study.folder / "view" / size / Path(medium).with_suffix(".mp4" if is_video(medium) else ".png")
    if not shown.exists() or shown.stat().st_mtime < (study.folder / medium).stat().st_mtime:
        shown.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(shown) as aside:
            _cut(study.folder / medium, view, aside)
    return shown


def _cut(file: Path, view: View, target: Path) -> None:
    if is_video(file):
        if view.num_frames is None:
            raise ValueError(f"`view` of study.yaml needs `num_frames` for videos such as {file}.")
        frames = VideoReader(view.height, view.width, view.num_frames, view.fps).load(file, str(file))
        write_video(target, frames, view.fps)
    else:
        picture: torch.Tensor = ImageReader(view.height, view.width).load(file, str(file))
        images_to_pil(picture[None])[0].save(target, format="PNG")
