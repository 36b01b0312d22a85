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
