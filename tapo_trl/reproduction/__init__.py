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

"""The paper's tables and figures, measured again in a world of one's own."""

from typing import TYPE_CHECKING

from ..lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".experiments": ("EXPERIMENTS", "Experiment"),
        ".lab": ("Lab",),
        ".runs": ("Run", "RunQueue"),
        ".world": ("World", "load_world"),
    },
)

if TYPE_CHECKING:
    from .experiments import EXPERIMENTS, Experiment
    from .lab import Lab
    from .runs import Run, RunQueue
    from .world import World, load_world
