# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Buckets of images with about the same aspect ratio and number of pixels, of which each batch holds one."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Sampler

from ..policies import FlowPolicy
from ..seeding import seeded_generator


MAX_ASPECT_RATIO = 2.0

# Sizes of buckets differ by about this part of a square's side
_STEPS_PER_SIDE = 16


class BucketedPairs(ConcatDataset):
    """Prepared pairs, one dataset per bucket; see [`BucketSampler`]."""


def bucket_sizes(policy: FlowPolicy, height: int, width: int) -> list[tuple[int, int]]:
    """
    Sizes that the policy can make, of at most `height` x `width` pixels and not much less.

    Args:
        policy ([`FlowPolicy`]): policy that makes images.
        height (`int`): height in pixels.
        width (`int`): width in pixels.

    Returns:
        `list[tuple[int, int]]`: heights and widths, by ascending height, with aspect ratios from 1/2 to 2, and
        `(height, width)` itself.
    """

    def is_possible(*size: int) -> bool:
        try:
            policy.latent_shape(*size)
        except ValueError:
            return False
        return True

    finest = next(side for side in range(1, min(height, width) + 1) if is_possible(side, side))
    step = finest * max(1, math.isqrt(height * width) // (_STEPS_PER_SIDE * finest))
    sizes = {(height, width)}
    for side in range(step, int(math.sqrt(height * width * MAX_ASPECT_RATIO)) + 1, step):
        size = (side, height * width // side // step * step)
        if size[1] > 0 and 1 / MAX_ASPECT_RATIO <= size[1] / side <= MAX_ASPECT_RATIO and is_possible(*size):
            sizes |= {size, size[::-1]}
    return sorted(sizes)


def assign_buckets(sizes: np.ndarray, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """
    The bucket of each pair: that whose aspect ratio is nearest to the geometric mean of those of its two images.

    Args:
        sizes (`np.ndarray` of shape `(number of pairs, 2, 2)`): height and width of both images.
        buckets (`Sequence[tuple[int, int]]`): heights and widths.

    Returns:
        `np.ndarray` of shape `(number of pairs,)`: indices into `buckets`.
    """
    wanted = np.log(sizes[:, :, 1] / sizes[:, :, 0]).mean(axis=1)
    there = np.array([math.log(width / height) for height, width in buckets])
    return np.abs(wanted[:, None] - there).argmin(axis=1)


def cropped_share(sizes: np.ndarray, height: int, width: int) -> np.ndarray:
    """
    Which share of images a crop to the aspect ratio of `height` x `width` takes off.

    Args:
        sizes (`np.ndarray` of shape `(..., 2)`): heights and widths of the images.
        height (`int`): height in pixels.
        width (`int`): width in pixels.

    Returns:
        `np.ndarray` of shape `(...)`: from 0 to 1.
    """
    ratios = sizes[..., 1] / sizes[..., 0] * (height / width)
    return 1 - np.minimum(ratios, 1 / ratios)


class BucketSampler(Sampler[int]):
    """
    Rows of a [`BucketedPairs`] in an order of which every `batch_size` rows in a row are of one bucket. All rows come once
    per epoch, and some of a bucket twice where that is needed to fill its last batch. The order depends on the seed and the
    epoch alone.

    Args:
        lengths (`Sequence[int]`): number of rows of each bucket.
        batch_size (`int`): number of rows per batch, on one process.
        seed (`int`): seed.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(math.ceil(length / self.batch_size) * self.batch_size for length in self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = seeded_generator("buckets", self.seed, self.epoch)
        batches, start = [], 0
        for length in self.lengths:
            number = math.ceil(length / self.batch_size) * self.batch_size
            rows = start + torch.randperm(length, generator=generator)
            batches.append(rows.repeat(math.ceil(number / length))[:number].view(-1, self.batch_size))
            start += length
        batches = torch.cat(batches)
        yield from batches[torch.randperm(len(batches), generator=generator)].flatten().tolist()
