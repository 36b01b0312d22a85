# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import io

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from PIL import Image
from torch.utils.data import BatchSampler

from tapo_trl.data.buckets import BucketSampler, assign_buckets, bucket_sizes, cropped_share
from tapo_trl.data.images import BadFileError, ImageReader
from tapo_trl.data.preferences import PreferencePairCollator, is_prepared, prepare_preference_dataset
from tests.data.preference_pairs import mixed_pairs


class Policy:
    """Makes all sizes that are multiples of 16 up to `largest`."""

    def __init__(self, largest=4096):
        self.largest = largest

    def latent_shape(self, height, width):
        if height % 16 or width % 16 or max(height, width) > self.largest:
            raise ValueError
        return 4, height // 8, width // 8


class TestSizes:
    @pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (480, 832), (64, 64)])
    def test_are_nearly_as_large_as_the_square(self, size):
        buckets = bucket_sizes(Policy(), *size)
        assert size in buckets and buckets == sorted(buckets)
        assert {(width, height) for height, width in buckets} == set(buckets)
        areas = np.array([height * width for height, width in buckets]) / (size[0] * size[1])
        ratios = np.array([width / height for height, width in buckets])
        assert areas.max() == 1 and areas.min() > 0.9 and 0.5 <= ratios.min() and ratios.max() <= 2
        assert len(buckets) == len(set(ratios)) >= 3

    def test_limits_of_the_policy(self):
        assert max(max(size) for size in bucket_sizes(Policy(largest=560), 512, 512)) == 544
        assert bucket_sizes(Policy(largest=512), 512, 512) == [(512, 512)]

    def test_both_images_of_a_pair_count(self):
        sizes = np.array(
            [[[100, 100], [50, 50]], [[100, 200], [100, 200]], [[100, 200], [200, 100]], [[9, 900], [9, 900]]]
        )
        assert assign_buckets(sizes, [(24, 40), (32, 32), (40, 24)]).tolist() == [1, 0, 1, 0]

    def test_cropped_share(self):
        assert cropped_share(np.array([[100, 100], [100, 200], [200, 100]]), 32, 32).tolist() == [0, 0.5, 0.5]


class TestSampler:
    LENGTHS = [7, 1, 12]
    BUCKET = np.repeat([0, 1, 2], LENGTHS)

    @pytest.mark.parametrize("batch_size", [1, 3, 4])
    def test_batches_hold_one_bucket(self, batch_size):
        sampler = BucketSampler(self.LENGTHS, batch_size, seed=0)
        batches = list(BatchSampler(sampler, batch_size, drop_last=False))
        assert len(sampler) == sum(map(len, batches)) == len(batches) * batch_size
        assert all(len(set(self.BUCKET[batch])) == 1 for batch in batches)
        assert set(sum(batches, [])) == set(range(20))
        assert len(sampler) - 20 < 3 * batch_size

    def test_depends_on_seed_and_epoch_alone(self):
        sampler = BucketSampler(self.LENGTHS, 3, seed=0)
        first = list(sampler)
        assert list(sampler) == first
        sampler.set_epoch(1)
        assert list(sampler) != first and list(BucketSampler(self.LENGTHS, 3, seed=1)) != first
        sampler.set_epoch(0)
        torch.rand(3)
        assert list(sampler) == first

    @pytest.mark.parametrize("number", [2, 3])
    def test_several_processes(self, number):
        batches = BatchSampler(BucketSampler(self.LENGTHS, 3, seed=0), 3, drop_last=False)
        shards = [list(BatchSamplerShard(batches, number, index)) for index in range(number)]
        assert len({len(shard) for shard in shards}) == 1
        assert all(len(batch) == 3 and len(set(self.BUCKET[batch])) == 1 for shard in shards for batch in shard)
        assert set(sum(sum(shards, []), [])) == set(range(20))


def prepare(dataset, policy, tmp_path, **kwargs):
    return prepare_preference_dataset(
        dataset, policy, 32, 32, cache_dir=tmp_path, aspect_ratio_buckets=True, name="pairs", **kwargs
    )


def sizes_of(prepared):
    sizes = {}
    for index in range(len(prepared)):
        example = prepared[index]
        pixels = example["chosen"] if "chosen" in example else example["chosen_latents"]
        sizes[int(example["slrm_row"])] = tuple(pixels.shape[1:])
    return dict(sorted(sizes.items()))


class TestPrepare:
    SIZES = [(32, 32), (40, 24), (24, 40), (32, 32), (24, 40)]  # of `mixed_pairs`, in turn

    @pytest.mark.parametrize("cache_latents", [True, False])
    def test_pairs_keep_their_shape(self, cache_latents, tiny_sd3_policy, tmp_path):
        pairs = mixed_pairs(7)
        prepared = prepare(pairs, tiny_sd3_policy, tmp_path, cache_latents=cache_latents)
        assert is_prepared(prepared) and prepare(prepared, tiny_sd3_policy, tmp_path) is prepared
        scale = 4 if cache_latents else 1
        expected = [(height // scale, width // scale) for height, width in self.SIZES]
        assert sizes_of(prepared) == {row: expected[row % 5] for row in range(7)}
        assert [len(part) for part in prepared.datasets] == [2, 3, 2]  # 24 x 40, 32 x 32, 40 x 24
        example = prepared[0]
        pixels = ImageReader(24, 40).load(pairs[int(example["slrm_row"])]["rejected"])
        assert example["prompt"] == pairs[int(example["slrm_row"])]["prompt"]
        if cache_latents:
            torch.testing.assert_close(
                example["rejected_latents"], tiny_sd3_policy.encode(pixels[None])[0], atol=1e-5, rtol=1e-5
            )
        else:
            assert torch.equal(example["rejected"], pixels)
        batch = PreferencePairCollator()([prepared[0], prepared[1]])
        assert len(batch["row"]) == 2

    def test_cache_is_used_again_and_follows_the_size(self, tiny_sd3_policy, tmp_path, monkeypatch):
        shapes, encode = [], type(tiny_sd3_policy).encode
        monkeypatch.setattr(
            type(tiny_sd3_policy), "encode", lambda self, pixels: shapes.append(pixels.shape) or encode(self, pixels)
        )
        prepare(mixed_pairs(5), tiny_sd3_policy, tmp_path)
        assert len(shapes) == 6
        monkeypatch.setattr(ImageReader, "check", lambda *args: pytest.fail("headers were read again"))
        assert sizes_of(prepare(mixed_pairs(5), tiny_sd3_policy, tmp_path)) == {
            row: (height // 4, width // 4) for row, (height, width) in enumerate(self.SIZES)
        }
        assert len(shapes) == 6

    @pytest.mark.parametrize("cache_latents", [True, False])
    def test_bad_files_are_named_by_their_row(self, cache_latents, tiny_sd3_policy, tmp_path):
        pairs = mixed_pairs(5).to_dict()
        pairs["chosen"][1] = b"no image"
        pairs = Dataset.from_dict(pairs)
        with pytest.raises(BadFileError, match="^1 of the files of `pairs` .*\n- `pairs`, row 1, column `chosen`"):
            prepare(pairs, tiny_sd3_policy, tmp_path, cache_latents=cache_latents)
        prepared = prepare(pairs, tiny_sd3_policy, tmp_path, cache_latents=cache_latents, skip_bad_files=True)
        assert list(sizes_of(prepared)) == [0, 2, 3, 4]

    def test_a_bucket_of_damaged_files_alone(self, tiny_sd3_policy, tmp_path):
        pairs = mixed_pairs(5).to_dict()
        pairs["chosen"][1] = pairs["chosen"][1][:150]
        pairs = Dataset.from_dict(pairs)
        with pytest.raises(BadFileError, match="row 1, column `chosen`: the image is damaged"):
            prepare(pairs, tiny_sd3_policy, tmp_path)
        prepared = prepare(pairs, tiny_sd3_policy, tmp_path, skip_bad_files=True)
        assert list(sizes_of(prepared)) == [0, 2, 3, 4] and len(prepared.datasets) == 2

    def test_not_for_videos_or_latents(self, tiny_sd3_policy, tmp_path):
        latents = np.zeros((1, 4, 8, 8), dtype=np.float32)
        dataset = Dataset.from_dict({"prompt": ["a"], "chosen": list(latents), "rejected": list(latents)})
        with pytest.raises(ValueError, match="`aspect_ratio_buckets=True` is for images"):
            prepare(dataset, tiny_sd3_policy, tmp_path)

    def test_size_is_that_on_the_screen(self):
        exif = Image.Exif()
        exif[0x0112] = 6
        for format in ("JPEG", "PNG", "TIFF", "WEBP"):
            buffer = io.BytesIO()
            Image.new("RGB", (30, 20)).save(buffer, format, exif=exif)
            assert ImageReader(8, 8).check(buffer.getvalue()) == (30, 20)
            assert ImageReader(8, 8).check(Image.new("RGB", (30, 20))) == (20, 30)

    def test_much_cropping_is_said_once(self, tiny_sd3_policy, tmp_path, monkeypatch):
        messages = []
        monkeypatch.setattr("tapo_trl.data.preferences.logger.warning", messages.append)
        for _ in range(2):
            prepare_preference_dataset(mixed_pairs(5), tiny_sd3_policy, 32, 32, cache_dir=tmp_path, name="pairs")
        (message,) = messages
        assert message.startswith("On average 40% of an image of `pairs` is cropped off (at most 50%)")
        assert "0.50 to 2.00 times as wide as high" in message and "`aspect_ratio_buckets=True`" in message
        prepare_preference_dataset(mixed_pairs(1), tiny_sd3_policy, 32, 32, cache_dir=tmp_path, name="pairs")
        assert len(messages) == 1
