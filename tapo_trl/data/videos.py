# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Videos in whatever form a dataset holds them, read and written with [PyAV](https://pyav.basswood-io.com)."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from .images import BadFileError, as_pixels, file_of, fit_image, open_image


if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream


# Largest denominator of a frame rate, such as 24000 / 1001
_RATE_DENOMINATOR = 1001

# Numbers of ITU-T H.273 and of FFmpeg
_BT709 = 1
_LIMITED_RANGE = 1


@dataclass(frozen=True)
class VideoReader:
    """
    Reads the start of videos at one size and frame rate.

    A video is a path, encoded bytes, `{"bytes": ..., "path": ...}` (a [`~datasets.Video`] column that is not decoded), a
    list of frames (images in any form that [`ImageReader`] takes) or a `uint8` array of shape `(frames, height, width,
    3)`.

    - Frame k of the result is the frame of the file whose time is nearest to k / `fps`, counted from the file's first
      frame; the earlier one if two are equally near. A file with fewer frames per second gives some of them twice.
    - Frames in a list or an array are taken one by one, as if they had `fps` already.
    - Each frame is turned as the file says, cropped around its centre, and resized (Lanczos).
    - What comes after the last frame that is needed is not read.
    - A video that ends before is an error, see [`UniformVideoReader`].

    Args:
        height (`int`): height of the result in pixels.
        width (`int`): width of the result in pixels.
        num_frames (`int`): number of frames of the result.
        fps (`float`): frames per second of the result.
    """

    height: int
    width: int
    num_frames: int
    fps: float

    @property
    def rate(self) -> Fraction:
        """`fps` as a fraction."""
        return Fraction(self.fps).limit_denominator(_RATE_DENOMINATOR)

    def check(self, value: Any, place: str = "`video`") -> None:
        """
        Read a video as far as its header, and the times of its frames if that does not tell the length. Damage further
        on is found by [`~VideoReader.load`].

        Args:
            value: the video.
            place (`str`, *optional*): where it is, for error messages.

        Raises:
            BadFileError: if it cannot be read, has no video stream or is too short.
            ValueError: if it is no video.
        """
        value = file_of(value, place)
        if isinstance(value, (np.ndarray, list)):
            for index, frame in enumerate(self._first_frames(value, place)):
                open_image(frame, f"{place}, frame {index}")
            return
        with _open_stream(value, place) as (container, stream):
            seconds = _header_seconds(stream)
            if seconds is None:
                seconds = _packets_seconds(container, stream, enough=self.num_frames / self.rate)
        if seconds is not None and self._frames_until(seconds, inclusive=False) < self.num_frames:
            self._check_short_file(seconds, place)

    def load(self, value: Any, place: str = "`video`") -> torch.Tensor:
        """
        Read a video. The arguments are those of [`~VideoReader.check`].

        Returns:
            `torch.Tensor` of shape `(3, num_frames, height, width)`: float32 in [0, 1].

        Raises:
            BadFileError: if it cannot be read, has no video stream, is damaged or is too short.
            ValueError: if it is no video.
        """
        value = file_of(value, place)
        if isinstance(value, (np.ndarray, list)):
            frames = [
                fit_image(open_image(frame, f"{place}, frame {index}"), self.height, self.width, place)
                for index, frame in enumerate(self._first_frames(value, place))
            ]
        else:
            frames = self._decode(value, place)
        return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float().div_(255)

    def _first_frames(self, value: np.ndarray | list, place: str) -> np.ndarray | list:
        if len(value) == 0:
            raise BadFileError(f"{place}: the video has no frames.")
        images = isinstance(value, list) and value and not isinstance(value[0], list)
        frames = value if images else as_pixels(value, place, "video", ("frames", "height", "width", 3))
        if len(frames) < self.num_frames:
            return self._frames_of_short_list(frames, place)
        return frames[: self.num_frames]

    def _decode(self, value: str | Path | bytes, place: str) -> list[np.ndarray]:
        """The frames of a file at 0, 1 / fps, 2 / fps, ... seconds, each `uint8` of shape `(height, width, 3)`."""
        taken: list[np.ndarray] = []
        with _open_stream(value, place) as (container, stream):
            promised = _header_seconds(stream)
            current, current_time, end = None, Fraction(0), Fraction(0)
            for frame, time, duration in _timed_frames(container, stream, place):
                if current is not None:
                    taken += self._repeat(current, self._frames_until((current_time + time) / 2) - len(taken), place)
                    if len(taken) == self.num_frames:
                        return taken
                current, current_time, end = frame, time, time + duration
            if current is not None:
                taken += self._repeat(current, self._frames_until(end, inclusive=False) - len(taken), place)
        if len(taken) == self.num_frames:
            return taken
        if promised is not None and self._frames_until(promised, inclusive=False) >= self.num_frames:
            raise BadFileError(
                f"{place}: the video is damaged: it ends after {float(end):.3g} of {float(promised):.3g} seconds."
            )
        return self._frames_of_short_file(value, promised, end, place)

    def _repeat(self, frame: "VideoFrame", times: int, place: str) -> list[np.ndarray]:
        if times <= 0:
            return []
        return [fit_image(_upright(frame), self.height, self.width, place)] * times

    def _frames_until(self, seconds: Fraction, inclusive: bool = True) -> int:
        """How many of the times k / fps, k = 0 ... num_frames - 1, lie before `seconds`, or at it if `inclusive`."""
        position = seconds * self.rate
        number = floor(position) + 1 if inclusive else -floor(-position)
        return min(max(number, 0), self.num_frames)

    def _check_short_file(self, seconds: Fraction, place: str) -> None:
        raise self._too_short(f"{float(seconds):.3g} seconds", place)

    def _frames_of_short_list(self, frames: np.ndarray | list, place: str) -> np.ndarray | list:
        raise self._too_short(f"{len(frames)} frames", place)

    def _frames_of_short_file(
        self, value: str | Path | bytes, promised: Fraction | None, end: Fraction, place: str
    ) -> list[np.ndarray]:
        raise self._too_short(f"{float(end):.3g} seconds", place)

    def _too_short(self, found: str, place: str) -> BadFileError:
        return BadFileError(
            f"{place}: the video has {found}, but `num_frames={self.num_frames}` at `fps={self.fps:g}` need more than "
            f"{float((self.num_frames - 1) / self.rate):.3g} seconds ({self.num_frames} frames). "
            "`short_videos='uniform'` takes frames from all over such a video."
        )


@dataclass(frozen=True)
class UniformVideoReader(VideoReader):
    """
    A [`VideoReader`] that takes the frames of a video which is too short at equal distances from the whole of it: frame k
    at k / `num_frames` of its length. It then moves slower than it did, and frames may come twice. Other videos are read
    as they are there.
    """

    def _check_short_file(self, seconds: Fraction, place: str) -> None:
        if seconds <= 0:
            raise BadFileError(f"{place}: the video has no frames.")

    def _frames_of_short_list(self, frames: np.ndarray | list, place: str) -> np.ndarray | list:
        return [frames[k * len(frames) // self.num_frames] for k in range(self.num_frames)]

    def _frames_of_short_file(
        self, value: str | Path | bytes, promised: Fraction | None, end: Fraction, place: str
    ) -> list[np.ndarray]:
        length = promised or end
        self._check_short_file(length, place)
        return _StretchedReader(self.height, self.width, self.num_frames, self.num_frames / length)._decode(
            value, place
        )


class _StretchedReader(VideoReader):
    """Its `fps` is a fraction, which is not rounded."""

    @property
    def rate(self) -> Fraction:
        return self.fps


def read_video(path: str | Path) -> torch.Tensor:
    """
    All frames of a file, as they are in it.

    Args:
        path (`str` or `Path`): file.

    Returns:
        `torch.Tensor` of shape `(3, frames, height, width)`: float32 in [0, 1].

    Raises:
        BadFileError: if it cannot be read, has no video stream or is damaged.
    """
    with _open_stream(path, str(path)) as (container, stream):
        frames = [
            np.array(_upright(frame).convert("RGB")) for frame, _, _ in _timed_frames(container, stream, str(path))
        ]
    if not frames:
        raise BadFileError(f"{path}: the video has no frames.")
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float().div_(255)


def write_video(path: str | Path, video: torch.Tensor, fps: float) -> None:
    """
    Write an MP4 file that plays everywhere (H.264, yuv420p, BT.709). Where the height or the width is odd, the last row
    or column is repeated once.

    Args:
        path (`str` or `Path`): file, made with its folder.
        video (`torch.Tensor` of shape `(3, frames, height, width)`): pixels, cut off at 0 and 1.
        fps (`float`): frames per second.
    """
    av = _import_av()
    if video.ndim != 4 or video.shape[0] != 3:
        raise ValueError(f"`video` must have the shape (3, frames, height, width), got {tuple(video.shape)}.")
    pixels = (video.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(1, 2, 3, 0).numpy()
    _, height, width, _ = pixels.shape
    pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        rate = Fraction(fps).limit_denominator(_RATE_DENOMINATOR)
        stream = container.add_stream("h264", rate=rate, options={"crf": "18"})
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = _LIMITED_RANGE
        for array in pixels:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED_RANGE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _upright(frame: "VideoFrame") -> Image.Image:
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _import_av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ImportError("Video files need PyAV: `pip install av`.") from error
    return av


@contextmanager
def _open_stream(value: str | Path | bytes, place: str) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """A file and its first video stream. What goes wrong while it is open is an error at `place`."""
    av = _import_av()
    if value is None:
        raise BadFileError(f"{place}: there is no video.")
    if not isinstance(value, (str, Path, bytes)):
        raise ValueError(f"{place}: a `{type(value).__name__}` is not a video, a path, bytes, frames or an array.")
    try:
        # Names of the author and so on are not always UTF-8
        file = io.BytesIO(value) if isinstance(value, bytes) else str(value)
        with av.open(file, metadata_errors="replace") as container:
            if not container.streams.video:
                raise BadFileError(f"{place}: the file has no video stream.")
            yield container, container.streams.video[0]
    except BadFileError:
        raise
    except (av.FFmpegError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise BadFileError(f"{place}: the video cannot be decoded ({error}).") from error


def _header_seconds(stream: "VideoStream") -> Fraction | None:
    """Length of a stream, if the file's header tells it."""
    if stream.duration is not None:
        return stream.duration * stream.time_base
    return None


def _packets_seconds(container: "InputContainer", stream: "VideoStream", enough: Fraction) -> Fraction | None:
    """Length of a stream by the times of its packets, which are not decoded; or something longer than `enough`."""
    usual = 1 / _frames_per_second(stream)
    first = last = None
    for packet in container.demux(stream):
        if packet.pts is None:
            continue
        start = packet.pts * packet.time_base
        end = start + (packet.duration * packet.time_base if packet.duration else usual)
        first = start if first is None else min(first, start)
        last = end if last is None else max(last, end)
        if last - first > enough:
            break
    return None if first is None else last - first


def _frames_per_second(stream: "VideoStream") -> Fraction:
    return stream.average_rate or stream.guessed_rate or Fraction(25)


def _timed_frames(
    container: "InputContainer", stream: "VideoStream", place: str
) -> Iterator[tuple["VideoFrame", Fraction, Fraction]]:
    """Frames, the times at which they are shown, from 0, and for how long, in seconds."""
    usual = 1 / _frames_per_second(stream)
    start = None
    for index, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            raise BadFileError(f"{place}: the video is damaged at frame {index}.")
        time = index * usual if frame.pts is None else frame.pts * frame.time_base
        start = time if start is None else start
        yield frame, time - start, frame.duration * frame.time_base if frame.duration else usual
