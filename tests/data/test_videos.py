# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import io
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tapo_trl.data.images import BadFileError
from tapo_trl.data.videos import UniformVideoReader, VideoReader, write_video
from tests.data.video_files import as_array, frame_numbers, grey_clip, set_rotation, sound_file, write_matroska


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """40 frames at 24 per second."""
    file = tmp_path_factory.mktemp("videos") / "clip.mp4"
    write_video(file, grey_clip(40), 24)
    return file


class TestWrite:
    @pytest.mark.parametrize(("height", "width"), [(32, 48), (31, 48), (32, 47), (31, 47)])
    def test_any_size_becomes_a_file_that_plays_everywhere(self, height, width, tmp_path):
        torch.manual_seed(0)
        video = torch.rand(3, 1, 3, 4).repeat(1, 5, 1, 1)
        video = torch.nn.functional.interpolate(video, size=(height, width), mode="bilinear")
        write_video(tmp_path / "folder" / "video.mp4", video, 12.5)
        with av.open(str(tmp_path / "folder" / "video.mp4")) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.format.name, stream.frames) == ("h264", "yuv420p", 5)
            assert stream.average_rate == Fraction(25, 2)
            assert (stream.height, stream.width) == (32, 48)
        data = (tmp_path / "folder" / "video.mp4").read_bytes()
        assert data.index(b"moov") < data.index(b"mdat")
        loaded = VideoReader(32, 48, 5, 12.5).load(tmp_path / "folder" / "video.mp4")
        assert (loaded[:, :, :height, :width] - video).abs().mean() < 0.02

    def test_colours_come_back(self, tmp_path):
        colors = torch.tensor([[0.9, 0.2, 0.1], [0.1, 0.8, 0.2], [0.1, 0.2, 0.9], [0.5, 0.5, 0.5]])
        video = colors.T[:, None, None].repeat_interleave(32, dim=-1).repeat(1, 3, 32, 1)
        write_video(tmp_path / "video.mp4", video, 16)
        loaded = VideoReader(32, 128, 3, 16).load(tmp_path / "video.mp4")
        torch.testing.assert_close(loaded[..., 16, 16::32], video[..., 16, 16::32], atol=0.015, rtol=0)

    def test_values_are_cut_off(self, tmp_path):
        video = torch.tensor([-0.5, 1.5]).view(1, 2, 1, 1).expand(3, -1, 32, 32)
        write_video(tmp_path / "video.mp4", video, 16)
        loaded = VideoReader(32, 32, 2, 16).load(tmp_path / "video.mp4")
        assert (loaded[:, 0] < 0.02).all() and (loaded[:, 1] > 0.98).all()

    def test_shape(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"must have the shape \(3, frames, height, width\), got \(5, 3, 32, 32\)"
        ):
            write_video(tmp_path / "video.mp4", torch.zeros(5, 3, 32, 32), 16)


class TestFrames:
    @pytest.mark.parametrize(
        ("fps", "num_frames"), [(24, 40), (16, 25), (12, 20), (8, 13), (7, 11), (30, 49), (48, 79)]
    )
    def test_are_the_nearest_in_time(self, fps, num_frames, clip):
        video = VideoReader(32, 32, num_frames, fps).load(clip)
        assert video.shape == (3, num_frames, 32, 32) and video.dtype == torch.float32
        times = [Fraction(index, 24) for index in range(40)]
        expected = [min(range(40), key=lambda k: abs(times[k] - Fraction(j, fps))) for j in range(num_frames)]
        assert frame_numbers(video) == expected

    def test_fractional_rates(self, tmp_path):
        write_video(tmp_path / "ntsc.mp4", grey_clip(20), 24000 / 1001)
        assert frame_numbers(VideoReader(32, 32, 20, 23.976).load(tmp_path / "ntsc.mp4")) == list(range(20))

    def test_are_counted_from_the_first_one(self, tmp_path):
        write_matroska(tmp_path / "late.mkv", grey_clip(10), 10, start=3.0)
        assert frame_numbers(VideoReader(32, 32, 5, 5).load(tmp_path / "late.mkv")) == [0, 2, 4, 6, 8]

    @pytest.mark.parametrize("degrees", [0, 90, 180, 270])
    def test_are_turned_as_the_file_says(self, degrees, tmp_path):
        stored = torch.zeros(3, 2, 32, 64)
        stored[0, :, :16, :32], stored[1, :, 16:, 32:] = 1, 1
        write_video(tmp_path / "phone.mp4", stored, 8)
        set_rotation(tmp_path / "phone.mp4", degrees)
        shown = torch.rot90(stored, -degrees // 90, dims=(2, 3))
        loaded = VideoReader(*shown.shape[2:], 2, 8).load(tmp_path / "phone.mp4")
        assert (loaded - shown).abs().mean() < 0.03

    def test_are_cropped_and_resized(self, tmp_path):
        # The middle 32 columns are white: only they are left, but for the filter's reach at the edges.
        video = torch.zeros(3, 2, 32, 64)
        video[..., 16:48] = 1
        write_video(tmp_path / "wide.mp4", video, 8)
        loaded = VideoReader(16, 16, 2, 8).load(tmp_path / "wide.mp4")
        assert loaded.shape == (3, 2, 16, 16) and (loaded > 0.85).all()


class TestKinds:
    @pytest.mark.parametrize("kind", ["path", "str", "bytes", "dict of path", "dict of bytes"])
    def test_files(self, kind, clip):
        value = {
            "path": clip,
            "str": str(clip),
            "bytes": clip.read_bytes(),
            "dict of path": {"bytes": None, "path": str(clip)},
            "dict of bytes": {"bytes": clip.read_bytes(), "path": "elsewhere.mp4"},
        }[kind]
        reader = VideoReader(32, 32, 9, 16)
        reader.check(value)
        assert torch.equal(reader.load(value), reader.load(clip))

    @pytest.mark.parametrize("kind", ["array", "list", "images", "arrays", "files"])
    def test_frames_are_taken_one_by_one(self, kind, tmp_path):
        video = grey_clip(12)
        array = as_array(video)
        images = [Image.fromarray(frame) for frame in array]
        for index, image in enumerate(images):
            image.save(tmp_path / f"{index}.png")
        value = {
            "array": array,
            "list": array.tolist(),
            "images": images,
            "arrays": list(array),
            "files": [{"bytes": None, "path": str(tmp_path / f"{index}.png")} for index in range(12)],
        }[kind]
        reader = VideoReader(32, 32, 9, 24)
        reader.check(value)
        assert torch.equal(reader.load(value), torch.from_numpy(array[:9]).permute(3, 0, 1, 2) / 255)


NINE_FRAMES = VideoReader(32, 32, 9, 16)


class TestNames:
    """Texts in the header, which are not always UTF-8, do not matter."""

    @pytest.mark.parametrize("name", ["mp4", "mkv", "mov", "avi", "webm"])
    def test_latin_1(self, name):
        buffer = io.BytesIO()
        codec = {"webm": "libvpx-vp9", "avi": "mpeg4"}.get(name, "h264")
        with av.open(buffer, "w", format={"mkv": "matroska"}.get(name, name)) as container:
            container.metadata["title"] = "caf@ title of the clip"
            stream = container.add_stream(codec, rate=16)
            stream.metadata["title"] = stream.metadata["handler_name"] = "caf@ handler of it"
            stream.metadata["language"] = "@ng"
            stream.height = stream.width = 32
            stream.pix_fmt = "yuv420p"
            for array in as_array(grey_clip(9)):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")))
            container.mux(stream.encode())
        data = buffer.getvalue()
        assert b"caf@" in data
        reader = VideoReader(32, 32, 5, 16)
        expected = reader.load(data)
        data = data.replace(b"caf@", b"caf\xe9").replace(b"@ng", b"\xe9ng")
        reader.check(data)
        assert torch.equal(reader.load(data), expected)


class TestShortVideos:
    def test_frames_come_from_all_over(self, tmp_path):
        write_video(tmp_path / "short.mp4", grey_clip(8), 8)
        write_matroska(tmp_path / "short.mkv", grey_clip(8), 8, start=1.0)
        values = [tmp_path / "short.mp4", tmp_path / "short.mkv", as_array(grey_clip(8)), list(as_array(grey_clip(8)))]
        for value in values:
            for num_frames in (9, 16, 17, 48):
                reader = UniformVideoReader(32, 32, num_frames, 16 if isinstance(value, Path) else 8)
                if num_frames < 17 and reader.fps == 16:
                    continue
                reader.check(value)
                taken = frame_numbers(reader.load(value))
                assert len(taken) == num_frames and set(taken) == set(range(8)) and taken == sorted(taken)
                assert max(taken.count(number) for number in taken) <= 1.5 * -(-num_frames // 8)

    def test_longer_ones_are_read_as_they_are(self, clip):
        for num_frames, fps in ((5, 8), (40, 24)):
            expected = VideoReader(32, 32, num_frames, fps).load(clip)
            assert torch.equal(UniformVideoReader(32, 32, num_frames, fps).load(clip), expected)

    def test_damage_is_still_damage(self, clip):
        data = clip.read_bytes()
        end = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2
        with pytest.raises(BadFileError, match="the video (is damaged|cannot be decoded)"):
            UniformVideoReader(32, 32, 81, 24).load(data[:end])
        with pytest.raises(BadFileError, match="has no frames"):
            UniformVideoReader(32, 32, 9, 24).check([])


class TestErrors:
    def refuse(self, value, message, reader=NINE_FRAMES, error=BadFileError, early=True):
        if early:
            with pytest.raises(error, match=message):
                reader.check(value, "`here`")
        else:
            reader.check(value, "`here`")
        with pytest.raises(error, match=message):
            reader.load(value, "`here`")

    def test_no_video(self, tmp_path):
        self.refuse(b"no video", "^`here`: the video cannot be decoded")
        self.refuse("no\0such.mp4", "^`here`: the video cannot be decoded")
        self.refuse("no/such\udce9.mp4", "^`here`: the video cannot be decoded")
        self.refuse("no/such.mp4", "^`here`: the video cannot be decoded .*No such file")
        self.refuse(str(tmp_path), "^`here`: the video cannot be decoded")
        self.refuse(sound_file(), "^`here`: the file has no video stream")
        self.refuse([b"no image"] * 9, "^`here`, frame 0: the image cannot be read")

    def test_nothing(self):
        for value in (None, {"bytes": None, "path": None}):
            self.refuse(value, "^`here`: there is no video")
        for value in ([], np.zeros((0, 8, 8, 3), dtype=np.uint8)):
            self.refuse(value, "^`here`: the video has no frames")

    def test_wrong_kinds(self):
        for value, message in [
            (3.0, "a `float` is not a video"),
            (
                np.zeros((9, 8, 8, 3)),
                r"an array of shape \(9, 8, 8, 3\) and type float64 is not a `uint8` video of shape",
            ),
            (np.zeros((9, 8, 8), dtype=np.uint8), r"an array of shape \(9, 8, 8\)"),
        ]:
            self.refuse(value, f"^`here`: {message}", error=ValueError)

    def test_cut_off(self, clip):
        data = clip.read_bytes()
        self.refuse(data[: data.index(b"moov") + 40], "the (file has no video stream|video cannot be decoded)")
        end = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2
        self.refuse(data[:end], "the video (is damaged|cannot be decoded)", VideoReader(32, 32, 40, 24), early=False)

    def test_damage_after_the_last_frame_that_is_needed_does_no_harm(self, clip):
        assert frame_numbers(VideoReader(32, 32, 3, 24).load(clip.read_bytes()[:-40])) == [0, 1, 2]

    @pytest.mark.parametrize("fps", [8, 16, 24, 30])
    def test_length(self, fps, clip):
        seconds = Fraction(40, 24)
        longest = max(number for number in range(1, 60) if Fraction(number - 1, fps) < seconds)
        assert len(VideoReader(32, 32, longest, fps).load(clip)[0]) == longest
        message = rf"`here`: the video has 1.67 seconds, but `num_frames={longest + 1}` at `fps={fps}` need more than"
        self.refuse(clip, message, VideoReader(32, 32, longest + 1, fps))

    def test_length_that_the_header_does_not_tell(self, tmp_path):
        write_matroska(tmp_path / "short.mkv", grey_clip(10), 10, start=0.0)
        self.refuse(tmp_path / "short.mkv", "the video has 1 seconds", VideoReader(32, 32, 11, 10))
        VideoReader(32, 32, 10, 10).check(tmp_path / "short.mkv")

    def test_start_is_not_length(self, tmp_path):
        write_matroska(tmp_path / "late.mkv", grey_clip(10), 10, start=5.0)
        self.refuse(tmp_path / "late.mkv", "the video has 1 seconds", VideoReader(32, 32, 11, 10))

    def test_the_option_is_named(self, clip):
        with pytest.raises(BadFileError, match="`short_videos='uniform'` takes frames from all over"):
            VideoReader(32, 32, 81, 24).check(clip)

    def test_too_few_frames(self):
        self.refuse(as_array(grey_clip(4)), "the video has 4 frames, but `num_frames=9`")

    def test_without_pyav(self, clip, monkeypatch):
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(ImportError, match=r"pip install av"):
            VideoReader(32, 32, 9, 16).load(clip)
        assert VideoReader(32, 32, 2, 16).load(as_array(grey_clip(2))).shape == (3, 2, 32, 32)
