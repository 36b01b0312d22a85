# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Clips and files of clips, made in a moment."""

import io
import struct
from pathlib import Path

import av
import numpy as np
import torch
from datasets import Dataset

from tapo_trl.data.videos import write_video


STEP = 5  # between the grey levels of two frames: far more than H.264 changes


def grey_clip(num_frames: int, height: int = 32, width: int = 32) -> torch.Tensor:
    """Frame k has the grey level k * STEP / 255."""
    levels = torch.arange(num_frames) * STEP / 255
    return levels.view(1, -1, 1, 1).expand(3, -1, height, width)


def frame_numbers(video: torch.Tensor) -> list[int]:
    """Which frames of a `grey_clip` these are."""
    return (video.mean(dim=(0, 2, 3)) * 255 / STEP).round().int().tolist()


def as_array(video: torch.Tensor) -> np.ndarray:
    return (video * 255).round().byte().permute(1, 2, 3, 0).numpy()


def set_rotation(file: Path, degrees_clockwise: int) -> None:
    """Write the matrix into the header of an MP4 file with which a phone says how it was held."""
    data = bytearray(file.read_bytes())
    start = data.index(b"tkhd") + 4
    start += 52 if data[start] == 1 else 40
    cos = {0: 1, 90: 0, 180: -1, 270: 0}[degrees_clockwise]
    sin = {0: 0, 90: 1, 180: 0, 270: -1}[degrees_clockwise]
    one = 1 << 16
    data[start : start + 36] = struct.pack(">9i", cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 1 << 30)
    file.write_bytes(bytes(data))


def write_matroska(file: Path, video: torch.Tensor, fps: int, start: float) -> None:
    """A file whose first frame is shown at `start` seconds, and whose header does not tell the length of its stream."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("h264", rate=fps, options={"crf": "18"})
        stream.height, stream.width, stream.pix_fmt = *video.shape[2:], "yuv420p"
        for index, array in enumerate(as_array(video)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame.pts = index + round(start * fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def sound_file() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    return buffer.getvalue()


def color_videos(folder: Path, number: int, num_frames: int = 5, fps: int = 16, seed: int = 0) -> Dataset:
    """Pairs of MP4 files with a rule that anything can learn: reddish videos win over bluish ones."""
    rng = np.random.default_rng(seed)
    files = {"chosen": [], "rejected": []}
    for index in range(number):
        for side, channel in (("chosen", 0), ("rejected", 2)):
            video = torch.from_numpy(rng.uniform(0, 0.3, (3, num_frames, 1, 1)).astype(np.float32))
            video = video.repeat(1, 1, 32, 32)
            video[channel] += 0.6
            file = folder / f"{side}_{seed}_{index}.mp4"
            write_video(file, video, fps)
            files[side].append(str(file))
    return Dataset.from_dict({"prompt": [f"thing {index % 4}" for index in range(number)], **files})
