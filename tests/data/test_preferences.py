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
from datasets import Dataset, Image
from PIL import Image as PILImage

from tapo_trl.data.preferences import (
    PreferencePairCollator,
    check_preference_dataset,
    load_image,
    prepare_preference_dataset,
)

from .preference_pairs import color_pairs, latent_pairs


def png(image: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def prepare(dataset, policy, tmp_path, **kwargs):
    return prepare_preference_dataset(dataset, policy, 32, cache_dir=tmp_path, **kwargs)


class TestCheck:
    def test_type(self):
        with pytest.raises(TypeError, match="`train_dataset` must be a `datasets.Dataset`, got `list`"):
            check_preference_dataset([{"prompt": "a"}], "train_dataset")

    def test_missing_columns(self):
        dataset = Dataset.from_dict({"prompt": ["a"], "chosen": ["a.png"], "image": ["b.png"]})
        with pytest.raises(ValueError, match=r"`train_dataset` lacks the columns \['rejected'\]; it has"):
            check_preference_dataset(dataset, "train_dataset")

    def test_empty(self):
        with pytest.raises(ValueError, match="`eval_dataset` is empty"):
            check_preference_dataset(color_pairs(2).select([]), "eval_dataset")

    @pytest.mark.parametrize(
        ("column", "values", "message"),
        [
            ("label", [1.0, 0.0], "Swap `chosen` and `rejected`"),
            ("margin", [0.1, float("nan")], "`margin` of `train_dataset` must hold finite"),
            ("margin", [0.1, None], "`margin` of `train_dataset` must hold finite"),
        ],
    )
    def test_labels_and_margins(self, column, values, message):
        with pytest.raises(ValueError, match=message):
            check_preference_dataset(color_pairs(2).add_column(column, values), "train_dataset")

    def test_prompt_that_is_no_text(self):
        dataset = color_pairs(2).remove_columns("prompt").add_column("prompt", ["a", None])
        with pytest.raises(ValueError, match="row 1: `prompt` must be a string, got None"):
            check_preference_dataset(dataset, "train_dataset")


class TestLoadImage:
    image = color_pairs(1)[0]["chosen"]

    @pytest.mark.parametrize("kind", ["pil", "bytes", "path", "dict", "array", "list"])
    def test_kinds(self, kind, tmp_path):
        self.image.save(tmp_path / "image.png")
        value = {
            "pil": self.image,
            "bytes": png(self.image),
            "path": str(tmp_path / "image.png"),
            "dict": {"bytes": None, "path": str(tmp_path / "image.png")},
            "array": np.array(self.image),
            "list": np.array(self.image).tolist(),
        }[kind]
        expected = torch.from_numpy(np.array(self.image)).permute(2, 0, 1) / 255
        assert torch.equal(load_image(value, 32), expected)

    def test_centre_crop_and_resize(self):
        # 64 x 32 pixels, the middle 32 columns green: only they are left, but for the filter's reach at the edges.
        array = np.zeros((32, 64, 3), dtype=np.uint8)
        array[:, 16:48, 1] = 255
        loaded = load_image(array, 16)
        assert loaded.shape == (3, 16, 16)
        assert (loaded[1] > 0.9).all() and (loaded[0] == 0).all()

    def test_transparency_is_laid_on_white(self):
        clear = PILImage.new("RGBA", (8, 8), (255, 0, 0, 0))
        assert (load_image(clear, 8) == 1).all()

    def test_grey_becomes_rgb(self):
        assert load_image(PILImage.new("L", (8, 8), 51), 8).flatten(1).tolist() == [[pytest.approx(0.2)] * 64] * 3

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (b"no image", "`here`: the image cannot be read"),
            ("no/such/file.png", "`here`: the image cannot be read"),
            (png(color_pairs(1)[0]["chosen"])[:200], "`here`: the image is damaged"),
            (np.zeros((4, 4)), r"`here`: an array of shape \(4, 4\)"),
            (np.zeros((8, 8, 3)), "neither a latent"),
            (3.0, "a `float` is not an image"),
            (None, "a `NoneType` is not an image"),
        ],
    )
    def test_unreadable(self, value, message):
        with pytest.raises(ValueError, match=message):
            load_image(value, 32, "`here`")


class TestPrepare:
    def test_cached_latents_are_the_policys(self, tiny_sd3_policy, tmp_path):
        pairs = color_pairs(5)
        dataset = prepare(pairs, tiny_sd3_policy, tmp_path, batch_size=2)
        assert set(dataset.column_names) == {"prompt", "slrm_row", "label", "chosen_latents", "rejected_latents"}
        batch = PreferencePairCollator(32)([dataset[index] for index in (3, 1)])
        assert batch["row"].tolist() == [3, 1] and batch["label"].tolist() == [1, 1]
        assert batch["prompt"] == ["thing 3", "thing 1"]
        for side in ("chosen", "rejected"):
            images = torch.stack([load_image(pairs[index][side], 32) for index in (3, 1)])
            expected = tiny_sd3_policy.encode_images(images)
            torch.testing.assert_close(batch[f"{side}_latents"], expected, atol=1e-5, rtol=1e-5)

    def test_cache_is_used_again_and_follows_the_data_the_vae_and_the_size(self, tmp_path, monkeypatch):
        from tapo_trl.policies import SD3Policy

        from ..testing_utils import tiny_sd3_pipeline

        encoded = []
        original = SD3Policy.encode_images
        monkeypatch.setattr(SD3Policy, "encode_images", lambda *args: (encoded.append(1), original(*args))[1])

        def number_of_encodings(pairs, seed=0, resolution=32):
            encoded.clear()
            policy = SD3Policy(tiny_sd3_pipeline(seed=seed))
            prepare_preference_dataset(pairs, policy, resolution, cache_dir=tmp_path)
            return len(encoded)

        assert number_of_encodings(color_pairs(3)) == 2
        assert number_of_encodings(color_pairs(3)) == 0
        assert number_of_encodings(color_pairs(3, seed=1)) == 2
        assert number_of_encodings(color_pairs(3), seed=1) == 2
        assert number_of_encodings(color_pairs(3), resolution=16) == 2

    def test_on_the_fly(self, tiny_sd3_policy, tmp_path):
        pairs = color_pairs(3)
        dataset = prepare(pairs, tiny_sd3_policy, tmp_path, cache_latents=False)
        batch = PreferencePairCollator(32)([dataset[2]])
        assert torch.equal(batch["chosen"][0], load_image(pairs[2]["chosen"], 32))
        assert batch["row"].tolist() == [2] and batch["label"].tolist() == [1]
        assert not (tmp_path / "latents").exists()

    @pytest.mark.parametrize("cache_latents", [True, False])
    def test_latents_pass_unchanged(self, cache_latents, tiny_sd3_policy, tmp_path):
        pairs = latent_pairs(3)
        dataset = prepare(pairs, tiny_sd3_policy, tmp_path, cache_latents=cache_latents)
        batch = PreferencePairCollator(32)([dataset[0], dataset[1]])
        expected = torch.tensor([pairs[0]["rejected"], pairs[1]["rejected"]])
        assert torch.equal(batch["rejected_latents"], expected)

    def test_margins_and_labels(self, tiny_sd3_policy, tmp_path):
        pairs = color_pairs(2).add_column("margin", [0.5, 2.0]).add_column("label", [1.0, 0.5])
        dataset = prepare(pairs, tiny_sd3_policy, tmp_path)
        batch = PreferencePairCollator(32)([dataset[0], dataset[1]])
        assert batch["margin"].tolist() == [0.5, 2.0] and batch["label"].tolist() == [1.0, 0.5]

    @pytest.mark.parametrize("cache_latents", [True, False])
    def test_selected_rows_are_numbered_and_not_copied(self, cache_latents, tiny_sd3_policy, tmp_path, monkeypatch):
        monkeypatch.setattr(Dataset, "flatten_indices", lambda *args, **kwargs: pytest.fail("the images were copied"))
        pairs = color_pairs(6).select([5, 2, 4]).with_format("torch")
        dataset = prepare(pairs, tiny_sd3_policy, tmp_path, cache_latents=cache_latents)
        batch = PreferencePairCollator(32)([dataset[0], dataset[2]])
        assert batch["row"].tolist() == [0, 2] and batch["prompt"] == ["thing 1", "thing 0"]

    @pytest.mark.parametrize("cache_latents", [True, False])
    def test_twice_is_once(self, cache_latents, tiny_sd3_policy, tmp_path):
        dataset = prepare(color_pairs(2), tiny_sd3_policy, tmp_path, cache_latents=cache_latents)
        assert prepare(dataset, tiny_sd3_policy, tmp_path) is dataset

    @pytest.mark.parametrize("cache_latents", [True, False])
    def test_unreadable_image_names_its_place(self, cache_latents, tiny_sd3_policy, tmp_path):
        pairs = Dataset.from_dict(
            {
                "prompt": ["a", "b"],
                "chosen": [{"bytes": png(color_pairs(1)[0]["chosen"]), "path": None}] * 2,
                "rejected": [
                    {"bytes": png(color_pairs(1)[0]["rejected"]), "path": None},
                    {"bytes": b"", "path": None},
                ],
            }
        ).cast_column("rejected", Image(decode=False))
        with pytest.raises(ValueError, match="`pairs`, row 1, column `rejected`: the image cannot be read"):
            prepare(pairs, tiny_sd3_policy, tmp_path, cache_latents=cache_latents, name="pairs")

    def test_latents_of_another_size(self, tiny_sd3_policy, tmp_path):
        with pytest.raises(ValueError, match=r"row 0.*\(4, 4, 4\).*neither a latent of shape \(4, 8, 8\)"):
            prepare(latent_pairs(2, (4, 4, 4)), tiny_sd3_policy, tmp_path)

    def test_latents_that_are_not_finite(self, tiny_sd3_policy, tmp_path):
        pairs = latent_pairs(1).to_dict()
        pairs["chosen"][0][0][0][0] = float("nan")
        with pytest.raises(ValueError, match="row 0, column `chosen`: the latent has values that are not finite"):
            prepare(Dataset.from_dict(pairs), tiny_sd3_policy, tmp_path)

    def test_resolution_that_does_not_fit(self, tiny_sd3_policy, tmp_path):
        with pytest.raises(ValueError, match="multiple of 8 pixels"):
            prepare_preference_dataset(color_pairs(1), tiny_sd3_policy, 30, cache_dir=tmp_path)
