# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import torch

from tapo_trl.seeding import seeded_generator


def test_generators_differ_by_every_part_of_the_key():
    keys = [
        ("a", 1, 2, 3),
        ("a", 1, 2, 4),
        ("a", 1, 3, 2),
        ("a", 2, 1, 3),
        ("b", 1, 2, 3),
        ("a", -1, 2, 3),
        ("a", 1, 23),
    ]
    draws = [torch.rand(4, generator=seeded_generator(*key)) for key in keys]
    assert torch.equal(draws[0], torch.rand(4, generator=seeded_generator(*keys[0])))
    assert len({tuple(draw.tolist()) for draw in draws}) == len(keys)


def test_integers_of_other_libraries_are_the_same_key():
    expected = torch.rand(4, generator=seeded_generator("a", 1, 2, 3))
    for three in (np.int64(3), np.array(3), torch.tensor(3)):
        assert torch.equal(torch.rand(4, generator=seeded_generator("a", 1, 2, three)), expected)
