# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Samples for tracking tools, which `report_to` does not send them."""

from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image

from .pictures import video_to_gif


def send_to_tensorboard(
    folder: str, step: int, picture: Image.Image, video: torch.Tensor | None = None, fps: float | None = None
) -> None:
    """
    Sends samples to TensorBoard: `samples`, and `samples_video` if they are videos.

    Args:
        folder (`str`): Folder of the event files.
        step (`int`): Step of the training.
        picture (`PIL.Image.Image`): Grid of images, or strip of frames.
        video (`torch.Tensor`, *optional*): Video of shape `[3, F, H, W]`, in [0, 1].
        fps (`float`, *optional*): Its frames per second.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import FileWriter, SummaryWriter

    with SummaryWriter(log_dir=folder) as writer:
        writer.add_image("samples", np.asarray(picture), step, dataformats="HWC")
    if video is not None:
        # `SummaryWriter.add_video` makes a GIF, too, but writes nothing without a moviepy of version 1.
        height, width = video.shape[2:]
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=video_to_gif(video, fps))
        writer = FileWriter(folder, filename_suffix=".video")
        writer.add_summary(Summary(value=[Summary.Value(tag="samples_video", image=image)]), step)
        writer.close()


def send_to_tracker(tracker: ModuleType, step: int, picture: Image.Image, video_file: Path | None = None) -> None:
    """
    Sends samples to Weights & Biases or Trackio, whose interfaces agree: `samples`, and `samples_video` if they are
    videos.

    Args:
        tracker (`ModuleType`): `wandb` or `trackio`, with a run that has begun.
        step (`int`): Step of the training.
        picture (`PIL.Image.Image`): Grid of images, or strip of frames.
        video_file (`Path`, *optional*): MP4 file of the videos.
    """
    samples = {"samples": tracker.Image(picture), "train/global_step": step}
    if video_file is not None:
        samples["samples_video"] = tracker.Video(str(video_file), format="mp4")
    tracker.log(samples)
