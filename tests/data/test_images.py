# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import io

import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image, PngImagePlugin

from tapo_trl.data.images import BadFileError, ImageReader
from tests.data.preference_pairs import color_pairs


IMAGE = color_pairs(1)[0]["chosen"]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class TestImageReader:
    @pytest.mark.parametrize("kind", ["pil", "bytes", "path", "dict", "array", "list"])
    def test_kinds(self, kind, tmp_path):
        IMAGE.save(tmp_path / "image.png")
        value = {
            "pil": IMAGE,
            "bytes": png(IMAGE),
            "path": str(tmp_path / "image.png"),
            "dict": {"bytes": None, "path": str(tmp_path / "image.png")},
            "array": np.array(IMAGE),
            "list": np.array(IMAGE).tolist(),
        }[kind]
        expected = torch.from_numpy(np.array(IMAGE)).permute(2, 0, 1) / 255
        assert torch.equal(ImageReader(32, 32).load(value), expected)

    def test_centre_crop_and_resize(self):
        # 64 x 32 pixels, the middle 32 columns green: only they are left, but for the filter's reach at the edges.
        array = np.zeros((32, 64, 3), dtype=np.uint8)
        array[:, 16:48, 1] = 255
        loaded = ImageReader(16, 16).load(array)
        assert loaded.shape == (3, 16, 16)
        assert (loaded[1] > 0.9).all() and (loaded[0] == 0).all()

    def test_rectangles(self):
        array = np.zeros((64, 32, 3), dtype=np.uint8)
        array[24:40] = 255
        loaded = ImageReader(16, 32).load(array)
        assert loaded.shape == (3, 16, 32) and (loaded == 1).all()

    def test_transparency_is_laid_on_white(self):
        clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
        assert (ImageReader(8, 8).load(clear) == 1).all()

    def test_grey_becomes_rgb(self):
        assert (
            ImageReader(8, 8).load(Image.new("L", (8, 8), 51)).flatten(1).tolist() == [[pytest.approx(0.2)] * 64] * 3
        )

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (b"no image", "`here`: the image cannot be read"),
            ("no/such/file.png", "`here`: the image cannot be read"),
            (png(IMAGE)[:200], "`here`: the image is damaged"),
            (np.zeros((4, 4)), r"`here`: an array of shape \(4, 4\)"),
            (np.zeros((8, 8, 3)), "is not a `uint8` image of shape"),
            (3.0, "a `float` is not an image"),
            (None, "there is no image"),
            ({"bytes": None, "path": None}, "there is no image"),
        ],
    )
    def test_unreadable(self, value, message):
        with pytest.raises(ValueError, match=message):
            ImageReader(32, 32).load(value, "`here`")

    def test_damage_beyond_the_header_is_found_when_the_image_is_read(self):
        reader = ImageReader(32, 32)
        reader.check(png(IMAGE)[:200], "`here`")
        with pytest.raises(BadFileError):
            reader.check(b"no image", "`here`")


RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


class TestDepths:
    """A ramp from black to white stays one, whatever its numbers are."""

    @pytest.mark.parametrize(
        "value",
        [
            Image.fromarray((RAMP * 65535).astype(np.uint16)),
            encoded(Image.fromarray((RAMP * 65535).astype(np.uint16)), "PNG"),
            encoded(Image.fromarray((RAMP * 65535).astype(np.uint16)), "TIFF"),
            Image.frombytes("I;16B", (64, 64), (RAMP * 65535).astype(">u2").tobytes()),
            b"P5 64 64 65535\n" + (RAMP * 65535).astype(">u2").tobytes(),
            b"P5 64 64 1023\n" + (RAMP * 1023).astype(">u2").tobytes(),
            Image.fromarray((RAMP * 65535).astype(np.int32)),
            encoded(Image.fromarray((RAMP * 65535).astype(np.int32)), "TIFF"),
            Image.fromarray((RAMP * 255).astype(np.int32)),
            Image.fromarray(RAMP.astype(np.float32)),
            encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
            Image.fromarray((RAMP * 255).astype(np.float32)),
        ],
        ids=["I;16", "png16", "tiff16", "I;16B", "pgm16", "pgm10", "I", "tiff32", "I8", "F1", "tiff float", "F255"],
    )
    def test_are_scaled(self, value):
        loaded = ImageReader(64, 64).load(value)
        assert (loaded - torch.from_numpy(RAMP)).abs().max() < 0.006

    def test_16_bits_that_are_dark_stay_dark(self):
        dark = Image.fromarray(np.full((8, 8), 200, dtype=np.uint16))
        for value in (dark, encoded(dark, "PNG")):
            assert (ImageReader(8, 8).load(value) < 0.01).all()

    def test_transparent_grey_of_16_bits_is_white(self):
        image = Image.fromarray(np.full((8, 8), 300, dtype=np.uint16))
        assert (ImageReader(8, 8).load(encoded(image, "PNG", transparency=300)) == 1).all()

    @pytest.mark.parametrize(
        "values", [RAMP * -1.0, RAMP * 300, RAMP * np.nan, RAMP * 65535], ids=["negative", "above", "nan", "16 bits"]
    )
    def test_numbers_on_no_scale_are_refused(self, values):
        with pytest.raises(BadFileError, match="`here`: the numbers of the image .mode F. reach from"):
            ImageReader(64, 64).load(Image.fromarray(values.astype(np.float32)), "`here`")
        if not np.isnan(values).any() and values.max() != 300:
            with pytest.raises(BadFileError, match="reach from"):
                ImageReader(64, 64).load(Image.fromarray((values * 300).astype(np.int32)), "`here`")


def with_text(kind: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    {"zTXt": info.add_text, "iTXt": info.add_itxt}[kind]("workflow", "a" * (2 * 1024 * 1024), zip=True)
    return encoded(IMAGE, "PNG", pnginfo=info)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
class TestDecoders:
    """Whatever a decoder raises is a bad file, which can be left out."""

    @pytest.mark.parametrize(
        "value",
        [
            with_text("zTXt"),
            with_text("iTXt"),
            encoded(IMAGE, "PNG", icc_profile=b"\0" * (2 * 1024 * 1024)),
            encoded(Image.new("1", (20000, 20000)), "PNG"),
            b"P5 4 4 70000\n" + b"\0" * 32,
            b"P3 4 4 255\n1 2 x",
            b"P6 99999999999 1 255\n",
            b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + b"\0" * 64,
            encoded(IMAGE, "WEBP")[:60],
            encoded(IMAGE, "GIF")[:30],
            encoded(IMAGE, "TIFF")[:-100],
            encoded(IMAGE, "BMP")[:40],
            "a\0b.png",
            "",
            None,
        ],
        ids=range(15),
    )
    def test_failures(self, value):
        reader = ImageReader(32, 32)
        with pytest.raises(BadFileError, match="^`here`: "):
            reader.check(value, "`here`")
            reader.load(value, "`here`")

    @pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "ICO", "TGA", "JPEG2000"])
    def test_damage_anywhere(self, format):
        data, rng = encoded(IMAGE, format), np.random.default_rng(0)
        for number in range(60):
            damaged = bytearray(data[: rng.integers(1, len(data))] if number % 2 else data)
            for position in rng.integers(0, min(len(damaged), 400), size=4):
                damaged[position] = rng.integers(0, 256)
            try:
                ImageReader(8, 8).load(bytes(damaged), "`here`")
            except BadFileError as error:
                assert str(error).startswith("`here`: the image ")


class TestAddresses:
    ADDRESS = "https://huggingface.co/datasets/owner/name/{}/main/folder/a%20b.png"

    @pytest.mark.parametrize("kind", ["blob", "resolve"])
    def test_files_of_datasets_on_the_hub(self, kind, tmp_path, monkeypatch):
        asked = []

        def download(repo, file, **options):
            asked.append((repo, file, options))
            IMAGE.save(tmp_path / "image.png")
            return str(tmp_path / "image.png")

        monkeypatch.setattr("tapo_trl.data.images.hf_hub_download", download)
        address = self.ADDRESS.format(kind) + ("?download=true" if kind == "resolve" else "")
        expected = torch.from_numpy(np.array(IMAGE)).permute(2, 0, 1) / 255
        assert torch.equal(ImageReader(32, 32).load(address), expected)
        assert torch.equal(ImageReader(32, 32).load({"bytes": None, "path": address}), expected)
        assert asked == [("owner/name", "folder/a b.png", {"repo_type": "dataset", "revision": "main"})] * 2

    def test_without_a_connection(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        message = (
            "`here`: the file folder/a b.png of the dataset owner/name is not in the Hugging Face cache.*`hf download"
        )
        with pytest.raises(ConnectionError, match=message):
            ImageReader(32, 32).check(self.ADDRESS.format("blob"), "`here`")

    def test_a_file_that_is_not_there_is_a_bad_file(self, monkeypatch):
        def download(*args, **options):
            raise EntryNotFoundError("404")

        monkeypatch.setattr("tapo_trl.data.images.hf_hub_download", download)
        with pytest.raises(BadFileError, match="`here`: the dataset owner/name has no file folder/a b.png"):
            ImageReader(32, 32).check(self.ADDRESS.format("blob"), "`here`")

    def test_other_addresses_are_bad_files(self):
        with pytest.raises(
            BadFileError, match="`here`: https://example.org/a.png is an address of no dataset.*: download it"
        ):
            ImageReader(32, 32).check("https://example.org/a.png", "`here`")


def test_dark_pictures_of_16_bits():
    """Pillow scales Netpbm's numbers to 65535, and has them in 32 bits."""
    values = np.full((4, 4), 200, dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    for encoded in (b"P5 4 4 65535\n" + values.astype(">u2").tobytes(), buffer.getvalue()):
        assert ImageReader(4, 4).load(encoded).max() < 0.01


def test_no_pixels():
    with pytest.raises(BadFileError, match="row 3: the image has no pixels"):
        ImageReader(4, 4).load(Image.new("RGB", (0, 0)), "row 3")
