# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import io
import os

import pytest
import torch
from datasets import Array4D, Dataset, Features, Image, Value, Video
from PIL import Image as PILImage

from tapo_trl.data.images import BadFileError, ImageReader
from tapo_trl.data.preferences import PreferencePairCollator, check_preference_dataset, prepare_preference_dataset
from tapo_trl.data.videos import UniformVideoReader, VideoReader, write_video
from tapo_trl.policies import SD3Policy, WanPolicy
from tests.data.preference_pairs import color_pairs, latent_pairs
from tests.data.video_files import as_array, color_videos, grey_clip
from tests.testing_utils import tiny_sd3_pipeline


def png(image: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def prepare(dataset, policy, tmp_path, **kwargs):
    return prepare_preference_dataset(dataset, policy, 32, 32, cache_dir=tmp_path, **kwargs)


def prepare_videos(dataset, policy, tmp_path, num_frames=5, fps=16, **kwargs):
    return prepare_preference_dataset(dataset, policy, 32, 32, num_frames, fps, cache_dir=tmp_path / "cache", **kwargs)


@pytest.fixture
def encodings(monkeypatch):
    """Shapes of what policies encode."""
    shapes = []
    for policy_class in (SD3Policy, WanPolicy):

        def encode(self, pixels, original=policy_class.encode):
            shapes.append(tuple(pixels.shape))
            return original(self, pixels)

        monkeypatch.setattr(policy_class, "encode", encode)
    return shapes


@pytest.fixture
def warnings(monkeypatch):
    """What is logged."""
    messages = []
    for module in ("preferences", "latents"):
        monkeypatch.setattr(f"tapo_trl.data.{module}.logger.warning", messages.append)
    return messages


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

    def test_a_transform_is_refused(self):
        for dataset in (color_pairs(2), color_pairs(2).remove_columns("chosen")):
            with pytest.raises(ValueError, match=r"`eval_dataset` has a transform .*`eval_dataset.map\(...\)`"):
                check_preference_dataset(dataset.with_transform(lambda rows: rows), "eval_dataset")

    def test_prompt_that_is_no_text(self):
        dataset = color_pairs(2).remove_columns("prompt").add_column("prompt", ["a", None])
        with pytest.raises(ValueError, match="row 1: `prompt` must be a string, got None"):
            check_preference_dataset(dataset, "train_dataset")


class TestPrepare:
    def test_cached_latents_are_the_policys(self, tiny_sd3_policy, tmp_path):
        pairs = color_pairs(5)
        dataset = prepare(pairs, tiny_sd3_policy, tmp_path, batch_size=2)
        assert set(dataset.column_names) == {"prompt", "slrm_row", "label", "chosen_latents", "rejected_latents"}
        batch = PreferencePairCollator()([dataset[index] for index in (3, 1)])
        assert batch["row"].tolist() == [3, 1] and batch["label"].tolist() == [1, 1]
        assert batch["prompt"] == ["thing 3", "thing 1"]
        for side in ("chosen", "rejected"):
            images = torch.stack([ImageReader(32, 32).load(pairs[index][side]) for index in (3, 1)])
            expected = tiny_sd3_policy.encode(images)
            torch.testing.assert_close(batch[f"{side}_latents"], expected, atol=1e-5, rtol=1e-5)

    def test_cache_is_used_again_and_follows_the_data_the_vae_and_the_size(self, encodings, tmp_path):
        def number_of_encodings(pairs, seed=0, height=32, **vae):
            encodings.clear()
            policy = SD3Policy(tiny_sd3_pipeline(seed=seed))
            policy.vae.to(vae.get("dtype"))
            if vae.get("tiling"):
                policy.vae.enable_tiling()
            prepare_preference_dataset(pairs, policy, height, 32, cache_dir=tmp_path)
            return len(encodings)

        assert number_of_encodings(color_pairs(3)) == 2
        assert number_of_encodings(color_pairs(3)) == 0
        assert number_of_encodings(color_pairs(3, seed=1)) == 2
        assert number_of_encodings(color_pairs(3), seed=1) == 2
        assert number_of_encodings(color_pairs(3), height=16) == 2
        assert number_of_encodings(color_pairs(3), dtype=torch.bfloat16) == 2
        assert number_of_encodings(color_pairs(3), tiling=True) == 2
        assert number_of_encodings(color_pairs(3)) == 0

    def test_cache_follows_all_that_the_vae_does(self, encodings, tmp_path):
        policy = SD3Policy(tiny_sd3_pipeline())

        def encodes_again():
            encodings.clear()
            prepare_preference_dataset(color_pairs(2), policy, 32, 32, cache_dir=tmp_path)
            return len(encodings) > 0

        assert encodes_again() and not encodes_again()
        policy.vae.encoder.conv_in.weight.data *= 1.01  # which turns no sign
        assert encodes_again() and not encodes_again()
        policy.vae.enable_tiling()
        assert encodes_again() and not encodes_again()
        policy.vae.tile_overlap_factor = 0.5
        assert encodes_again()

    def test_cache_that_was_not_finished_is_not_used(self, tiny_sd3_policy, encodings, tmp_path):
        prepare(color_pairs(3), tiny_sd3_policy, tmp_path)
        (record,) = tmp_path.rglob("*.json")
        record.unlink()
        prepare(color_pairs(3), tiny_sd3_policy, tmp_path)
        assert len(encodings) == 4

    @pytest.mark.parametrize("image_column", [True, False])
    def test_cache_follows_files_that_change(self, image_column, tiny_sd3_policy, encodings, tmp_path):
        pairs = color_pairs(2)
        for side in ("chosen", "rejected"):
            for row in range(2):
                pairs[row][side].save(tmp_path / f"{side}_{row}.png")
        files = {side: [str(tmp_path / f"{side}_{row}.png") for row in range(2)] for side in ("chosen", "rejected")}
        dataset = Dataset.from_dict({"prompt": ["a", "b"], **files})
        if image_column:
            dataset = dataset.cast_column("chosen", Image()).cast_column("rejected", Image())

        def number_of_encodings(rows):
            encodings.clear()
            prepare(dataset.select(rows), tiny_sd3_policy, tmp_path)
            return len(encodings)

        assert (number_of_encodings([1, 0]), number_of_encodings([1, 0]), number_of_encodings([0])) == (2, 0, 2)
        os.utime(files["rejected"][1], ns=(0, 1234))
        assert (number_of_encodings([0]), number_of_encodings([1, 0]), number_of_encodings([1, 0])) == (0, 2, 0)

    def test_on_the_fly(self, tiny_sd3_policy, tmp_path):
        pairs = color_pairs(3)
        dataset = prepare(pairs, tiny_sd3_policy, tmp_path, cache_latents=False)
        batch = PreferencePairCollator()([dataset[2]])
        assert torch.equal(batch["chosen"][0], ImageReader(32, 32).load(pairs[2]["chosen"]))
        assert batch["row"].tolist() == [2] and batch["label"].tolist() == [1]
        assert not (tmp_path / "latents").exists()

    @pytest.mark.parametrize("cache_latents", [True, False])
    def test_the_format_does_not_matter(self, cache_latents, tiny_sd3_policy, tmp_path):
        pairs = color_pairs(3).add_column("margin", [0.5, 2.0, 1.0]).add_column("label", [1.0, 0.5, 1.0])
        for weights in (None, {"text": 1.0}):
            if weights is not None:
                pairs = pairs.add_column("label_text", [1.0, 0.0, 0.5])
            options = {"cache_latents": cache_latents, "dimension_weights": weights}
            plain = prepare(pairs, tiny_sd3_policy, tmp_path, **options)
            expected = PreferencePairCollator()([plain[row] for row in range(3)])
            for name in ("torch", "numpy", "pandas", "arrow"):
                check_preference_dataset(pairs.with_format(name), "pairs", weights)
                dataset = prepare(pairs.with_format(name), tiny_sd3_policy, tmp_path, **options)
                batch = PreferencePairCollator()([dataset[row] for row in range(3)])
                assert batch.keys() == expected.keys() and batch["prompt"] == expected["prompt"]
                for column in batch.keys() - {"prompt"}:
                    assert torch.equal(batch[column], expected[column]), (name, column)

    @pytest.mark.parametrize("cache_latents", [True, False])
    def test_latents_pass_unchanged(self, cache_latents, tiny_sd3_policy, tmp_path):
        pairs = latent_pairs(3)
        dataset = prepare(pairs, tiny_sd3_policy, tmp_path, cache_latents=cache_latents)
        batch = PreferencePairCollator()([dataset[0], dataset[1]])
        expected = torch.tensor([pairs[0]["rejected"], pairs[1]["rejected"]])
        assert torch.equal(batch["rejected_latents"], expected)

    def test_margins_and_labels(self, tiny_sd3_policy, tmp_path):
        pairs = color_pairs(2).add_column("margin", [0.5, 2.0]).add_column("label", [1.0, 0.5])
        dataset = prepare(pairs, tiny_sd3_policy, tmp_path)
        batch = PreferencePairCollator()([dataset[0], dataset[1]])
        assert batch["margin"].tolist() == [0.5, 2.0] and batch["label"].tolist() == [1.0, 0.5]

    @pytest.mark.parametrize("cache_latents", [True, False])
    def test_selected_rows_are_numbered_and_not_copied(self, cache_latents, tiny_sd3_policy, tmp_path, monkeypatch):
        monkeypatch.setattr(Dataset, "flatten_indices", lambda *args, **kwargs: pytest.fail("the images were copied"))
        pairs = color_pairs(6).select([5, 2, 4]).with_format("torch")
        dataset = prepare(pairs, tiny_sd3_policy, tmp_path, cache_latents=cache_latents)
        batch = PreferencePairCollator()([dataset[0], dataset[2]])
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
        message = (
            "1 of the files of `pairs` cannot be used:\n- `pairs`, row 1, column `rejected`: the image cannot be read"
        )
        with pytest.raises(BadFileError, match=message):
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
            prepare_preference_dataset(color_pairs(1), tiny_sd3_policy, 30, 32, cache_dir=tmp_path)


class TestVideos:
    def test_cached_latents_are_the_policys(self, tiny_wan_policy, encodings, tmp_path):
        pairs = color_videos(tmp_path, 3)
        dataset = prepare_videos(pairs, tiny_wan_policy, tmp_path)
        assert encodings == [(1, 3, 5, 32, 32)] * 6
        batch = PreferencePairCollator()([dataset[2], dataset[0]])
        for side in ("chosen", "rejected"):
            assert batch[f"{side}_latents"].shape == (2, *tiny_wan_policy.latent_shape(32, 32, 5))
            for row, latent in zip((2, 0), batch[f"{side}_latents"], strict=True):
                pixels = VideoReader(32, 32, 5, 16).load(pairs[row][side])
                assert torch.equal(latent, tiny_wan_policy.encode(pixels[None])[0])

    def test_on_the_fly(self, tiny_wan_policy, encodings, tmp_path):
        pairs = color_videos(tmp_path, 2)
        dataset = prepare_videos(pairs, tiny_wan_policy, tmp_path, cache_latents=False)
        batch = PreferencePairCollator()([dataset[1]])
        assert torch.equal(batch["rejected"][0], VideoReader(32, 32, 5, 16).load(pairs[1]["rejected"]))
        assert encodings == [] and batch["row"].tolist() == [1]

    @pytest.mark.parametrize("kind", ["Video", "bytes", "images", "array", "nested list"])
    def test_kinds_of_columns(self, kind, tiny_wan_policy, tmp_path):
        clip = grey_clip(5)
        write_video(tmp_path / "clip.mp4", clip, 16)
        file, array = str(tmp_path / "clip.mp4"), as_array(clip)
        value, feature = {
            "Video": (file, Video()),
            "bytes": ((tmp_path / "clip.mp4").read_bytes(), Value("binary")),
            "images": ([PILImage.fromarray(frame) for frame in array], None),
            "array": (array, Array4D((5, 32, 32, 3), "uint8")),
            "nested list": (array.tolist(), None),
        }[kind]
        columns = {"prompt": ["a"], "chosen": [value], "rejected": [value]}
        features = feature and Features({"prompt": Value("string"), "chosen": feature, "rejected": feature})
        dataset = Dataset.from_dict(columns, features=features)
        prepared = prepare_videos(dataset, tiny_wan_policy, tmp_path, cache_latents=False)
        expected = VideoReader(32, 32, 5, 16).load(file if kind in ("Video", "bytes") else array)
        assert torch.equal(prepared[0]["chosen"], expected)

    @pytest.mark.parametrize("cache_latents", [True, False])
    def test_latents_pass_unchanged(self, cache_latents, tiny_wan_policy, encodings, tmp_path):
        pairs = latent_pairs(3, tiny_wan_policy.latent_shape(32, 32, 5))
        dataset = prepare_videos(pairs, tiny_wan_policy, tmp_path, cache_latents=cache_latents)
        batch = PreferencePairCollator()([dataset[0], dataset[1]])
        assert torch.equal(batch["rejected_latents"], torch.tensor([pairs[0]["rejected"], pairs[1]["rejected"]]))
        assert encodings == []

    def test_cache_follows_frames_rate_size_and_files(self, tiny_wan_policy, encodings, tmp_path):
        pairs = color_videos(tmp_path, 1, num_frames=12)

        def number_of_encodings(**kwargs):
            encodings.clear()
            size = {"height": 32, "width": 32, "num_frames": 5, "fps": 16} | kwargs
            prepare_preference_dataset(pairs, tiny_wan_policy, **size, cache_dir=tmp_path / "cache")
            return len(encodings)

        assert number_of_encodings() == 2
        assert number_of_encodings() == 0
        assert number_of_encodings(fps=8) == 2
        assert number_of_encodings(num_frames=9) == 2
        assert number_of_encodings(height=16) == 2
        assert number_of_encodings(width=16) == 2
        write_video(pairs[0]["rejected"], grey_clip(12), 16)
        assert number_of_encodings() == 2
        assert number_of_encodings() == 0

    @pytest.mark.parametrize("cache_latents", [True, False])
    def test_short_videos(self, cache_latents, tiny_wan_policy, encodings, warnings, tmp_path):
        pairs = color_videos(tmp_path, 2)
        write_video(pairs[1]["rejected"], grey_clip(3), 16)
        options = {"cache_latents": cache_latents, "name": "pairs"}
        dataset = prepare_videos(pairs, tiny_wan_policy, tmp_path, skip_bad_files=True, **options)
        assert len(dataset) == 1 and "Left out 1 of the 2 pairs of `pairs`" in warnings[-1]
        dataset = prepare_videos(pairs, tiny_wan_policy, tmp_path, short_videos="uniform", **options)
        assert len(dataset) == 2
        pixels = UniformVideoReader(32, 32, 5, 16).load(pairs[1]["rejected"])
        column, expected = "rejected", pixels
        if cache_latents:
            column, expected = "rejected_latents", tiny_wan_policy.encode(pixels[None])[0]
        assert torch.equal(dataset[1][column], expected)

    def test_short_videos_are_not_images(self, tiny_sd3_policy, tmp_path):
        with pytest.raises(ValueError, match="`short_videos='uniform'` has no effect on a policy that makes images"):
            prepare(color_pairs(1), tiny_sd3_policy, tmp_path, short_videos="uniform")

    def test_number_of_frames_is_needed_and_must_fit(self, tiny_wan_policy, tmp_path):
        with pytest.raises(ValueError, match="`num_frames` is missing"):
            prepare_videos(color_videos(tmp_path, 1), tiny_wan_policy, tmp_path, num_frames=None)
        with pytest.raises(ValueError, match="one more than a multiple of 4"):
            prepare_videos(color_videos(tmp_path, 1), tiny_wan_policy, tmp_path, num_frames=4)


class TestBadFiles:
    def pairs(self, tmp_path, damaged=True):
        """5 pairs: a file of row 1 is missing, one of row 2 too short, and one of row 4 damaged after its header."""
        pairs = color_videos(tmp_path, 5, num_frames=9)
        os.remove(pairs[1]["chosen"])
        write_video(pairs[2]["rejected"], grey_clip(4), 16)
        if damaged:
            with open(pairs[4]["chosen"], "r+b") as file:
                start = file.read().index(b"mdat") + 8
                file.seek(start)
                file.write(b"\0" * 2000)
        return pairs

    LISTED = (
        r"- `pairs`, row 1, column `chosen`: the video cannot be decoded .*\n"
        r"- `pairs`, row 2, column `rejected`: the video has 0.25 seconds, but `num_frames=5` at `fps=16` need more"
    )

    @pytest.mark.parametrize("cache_latents", [True, False])
    def test_all_are_named_before_anything_is_encoded(self, cache_latents, tiny_wan_policy, encodings, tmp_path):
        with pytest.raises(BadFileError, match=rf"2 of the files of `pairs` cannot be used:\n{self.LISTED}") as error:
            prepare_videos(self.pairs(tmp_path), tiny_wan_policy, tmp_path, cache_latents=cache_latents, name="pairs")
        assert "`skip_bad_files=True`" in str(error.value)
        assert encodings == []

    def test_are_skipped_if_they_may_be(self, tiny_wan_policy, encodings, warnings, tmp_path):
        pairs = self.pairs(tmp_path)
        dataset = prepare_videos(pairs, tiny_wan_policy, tmp_path, skip_bad_files=True, name="pairs")
        assert dataset["slrm_row"][:].tolist() == [0, 3] and dataset["prompt"][:] == ["thing 0", "thing 3"]
        assert torch.equal(dataset[1]["chosen_latents"], self.latent(pairs[3]["chosen"], tiny_wan_policy))
        assert "Left out 3 of the 5 pairs of `pairs`" in warnings[-1]
        for text in ("row 1, column `chosen`", "row 2, column `rejected`", "row 4, column `chosen`"):
            assert text in warnings[-1]

        # The next run knows it from the cache, whether it may skip them or not.
        number = len(encodings)
        again = prepare_videos(pairs, tiny_wan_policy, tmp_path, skip_bad_files=True, name="pairs")
        assert len(again) == 2 and warnings[-1] == warnings[-2] and len(encodings) == number
        with pytest.raises(BadFileError, match="3 of the files of `pairs` cannot be used"):
            prepare_videos(pairs, tiny_wan_policy, tmp_path, name="pairs")

    def latent(self, file, policy):
        return policy.encode(VideoReader(32, 32, 5, 16).load(file)[None])[0]

    def test_damage_that_is_found_late_is_an_error_at_the_end_and_costs_no_second_encoding(
        self, tiny_wan_policy, encodings, warnings, tmp_path
    ):
        pairs = self.pairs(tmp_path).select([0, 4, 3])
        with pytest.raises(BadFileError, match="1 of the files of `pairs` .*\n- `pairs`, row 1, column `chosen`"):
            prepare_videos(pairs, tiny_wan_policy, tmp_path, name="pairs")
        assert len(encodings) == 4 and "row 1, column `chosen`" in warnings[0]
        dataset = prepare_videos(pairs, tiny_wan_policy, tmp_path, skip_bad_files=True, name="pairs")
        assert dataset["slrm_row"][:].tolist() == [0, 2] and len(encodings) == 4

    def test_on_the_fly_the_next_pair_takes_their_place(self, tiny_wan_policy, warnings, tmp_path):
        pairs = self.pairs(tmp_path)
        dataset = prepare_videos(
            pairs, tiny_wan_policy, tmp_path, cache_latents=False, skip_bad_files=True, name="pairs"
        )
        assert len(dataset) == 3 and "Left out 2 of the 5 pairs" in warnings[0]
        assert [dataset[index]["slrm_row"] for index in range(3)] == [0, 3, 0]
        assert "The next pair takes the place" in warnings[1] and "row 4, column `chosen`" in warnings[1]

    def test_on_the_fly_without_leave_is_an_error(self, tiny_wan_policy, tmp_path):
        pairs = self.pairs(tmp_path).select([0, 4])
        dataset = prepare_videos(pairs, tiny_wan_policy, tmp_path, cache_latents=False, name="pairs")
        with pytest.raises(BadFileError, match="`pairs`, row 1, column `chosen`"):
            dataset[1]

    def test_nothing_left(self, tiny_wan_policy, tmp_path):
        pairs = self.pairs(tmp_path)
        for rows, cache_latents in (([1, 2], True), ([1, 2], False), ([1, 4], True)):
            with pytest.raises(ValueError, match="`pairs` has no pair whose files can be used:\n- `pairs`, row 0"):
                prepare_videos(
                    pairs.select(rows), tiny_wan_policy, tmp_path, cache_latents=cache_latents, skip_bad_files=True,
                    name="pairs",
                )  # fmt: skip

    def test_long_lists_are_counted(self, tiny_sd3_policy, tmp_path):
        missing = [f"{index}.png" for index in range(30)]
        pairs = Dataset.from_dict({"prompt": ["a"] * 30, "chosen": missing, "rejected": missing})
        with pytest.raises(BadFileError, match=r"^60 of the files") as error:
            prepare(pairs, tiny_sd3_policy, tmp_path)
        assert str(error.value).count("cannot be read") == 20 and "- ... and 40 more\n" in str(error.value)

    def test_images(self, tiny_sd3_policy, warnings, tmp_path):
        good, cut = png(color_pairs(1)[0]["chosen"]), png(color_pairs(1)[0]["chosen"])[:200]
        pairs = Dataset.from_dict({"prompt": ["a", "b", "c"], "chosen": [good, cut, b""], "rejected": [good] * 3})
        dataset = prepare(pairs, tiny_sd3_policy, tmp_path, skip_bad_files=True)
        assert dataset["slrm_row"][:].tolist() == [0]
        assert "row 1, column `chosen`: the image is damaged" in warnings[-1]
        assert "row 2, column `chosen`: the image cannot be read" in warnings[-1]


class TestDimensions:
    WEIGHTS = {"quality": 1.0, "text": 2.0}

    def pairs(self):
        pairs = color_pairs(3).add_column("label_quality", [1.0, 1.0, 1.0]).add_column("label_text", [1.0, 0.0, 0.25])
        return pairs.add_column("label", [0.5, 0.5, 1.0])

    @pytest.mark.parametrize("cache_latents", [True, False])
    def test_the_preferred_side_is_the_chosen_one(self, cache_latents, tiny_sd3_policy, tmp_path):
        plain = prepare(self.pairs(), tiny_sd3_policy, tmp_path, cache_latents=cache_latents)
        dataset = prepare(
            self.pairs(), tiny_sd3_policy, tmp_path, cache_latents=cache_latents, dimension_weights=self.WEIGHTS
        )
        assert [float(dataset[row]["label"]) for row in range(3)] == [1, 1, 0.5]
        chosen, rejected = ("chosen_latents", "rejected_latents") if cache_latents else ("chosen", "rejected")
        for row, swapped in enumerate([False, True, False]):
            assert torch.equal(dataset[row][chosen], plain[row][rejected if swapped else chosen])
            assert torch.equal(dataset[row][rejected], plain[row][chosen if swapped else rejected])

    def test_other_weights_give_other_labels(self, tiny_sd3_policy, tmp_path):
        labels = {}
        for text in (2.0, 1.0):
            weights = {"quality": 1.0, "text": text}
            dataset = prepare(self.pairs().select([1]), tiny_sd3_policy, tmp_path, dimension_weights=weights)
            labels[text] = float(dataset[0]["label"])
        assert labels == {2.0: 1.0, 1.0: 0.5}

    def test_labels_are_checked_with_the_dataset(self):
        with pytest.raises(ValueError, match=r"names \['motion'\], but `pairs` has labels of \['quality', 'text'\]"):
            check_preference_dataset(self.pairs(), "pairs", {"motion": 1.0})

    def test_errors_name_the_column_that_the_file_is_in(self, tiny_sd3_policy, tmp_path):
        good = png(color_pairs(1)[0]["chosen"])
        columns = {"prompt": ["a"], "chosen": [good[:200]], "rejected": [good], "label_text": [0.0]}
        with pytest.raises(BadFileError, match="row 0, column `chosen`: the image is damaged"):
            prepare(Dataset.from_dict(columns), tiny_sd3_policy, tmp_path, dimension_weights={"text": 1.0})
