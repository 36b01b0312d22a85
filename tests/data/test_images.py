# Copyright 2026 The tapo_trl authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import io

import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image

from tapo_trl.data.images import BadFileError, ImageReader

from .preference_pairs import color_pairs


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
            (None, "a `NoneType` is not an image"),
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
        with pytest.raises(BadFileError, match="`here`: https://example.org/a.png is an address.*: download it"):
            ImageReader(32, 32).check("https://example.org/a.png", "`here`")
